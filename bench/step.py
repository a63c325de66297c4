"""A whole training step: our heads and what users write, against our softmax.

    python bench/step.py                        4 layers of 256, V = 50304 (small)
    python bench/step.py --scale=char           6 layers of 384 on 65 characters
    python bench/step.py --scale=gpt2           124M, one block of 1024
    python bench/step.py --scale=study          config/train_wikitext2_8k.py
    python bench/step.py --scale=gpu            124M, 32 blocks of 1024

Our steps run as in training with --compile: compiled, and in bf16 if the hardware is fast at it.
What users write is eager fp32. All have fused AdamW and the malloc setting of training.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from bench import measure
from bench.heads import N_DATA, OURS, PlainHead
from engine.base.distributed import autocast, pick_device
from engine.base.optim import make_optimizer
from heads import HeadConfig
from model import GPT, GPTConfig

USERS = ("plain", "transformers", "torchbnn", "dense_bce")
CASES = (*OURS, "dropout", "muon", *USERS)
SHAPE = (
    "n_layer",
    "n_head",
    "n_embd",
    "block_size",
    "batch_size",
    "vocab_size",
)
SIZES = {
    "small": (4, 4, 256, 256, 8, 50304),
    "char": (6, 6, 384, 256, 12, 65),
    "gpt2": (12, 12, 768, 1024, 1, 50304),
    "study": (3, 3, 192, 256, 8, 8192),
    "gpu": (12, 12, 768, 1024, 32, 50304),
    "quick": (1, 2, 16, 16, 2, 307),
}


class PlainGPT(torch.nn.Module):
    """A GPT like nanoGPT's: the backbone of model.py under a PlainHead of this kind."""

    def __init__(self, kind: str, config: GPTConfig):
        super().__init__()
        self.backbone = GPT(config)
        self.head = PlainHead(kind, config.vocab_size, config.n_embd)
        if kind != "torchbnn":  # the embedding cannot share its two weights
            self.head.linear.weight = self.backbone.transformer.wte.weight

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone.hidden(idx), targets)


def prepare(case: str, batch_size: int, **shape: int) -> Callable[[], None]:
    """Returns a function of one training step on a fixed batch. Its held() is the number of bytes
    of the weights and the optimizer's state, which live between steps.
    """
    torch.manual_seed(0)
    device = pick_device("auto")
    size = (2, batch_size, shape["block_size"])
    idx, targets = torch.randint(shape["vocab_size"], size, device=device)
    if case == "transformers":
        model = transformers_gpt2(**shape)
        loss_of = lambda: model(idx, labels=idx).loss  # noqa: E731  it shifts the labels itself
    elif case in USERS:
        model = PlainGPT(case, GPTConfig(**shape))
        loss_of = partial(model, idx, targets)
    else:
        head = HeadConfig(**OURS.get(case, {}), n_data=N_DATA)
        dropout = 0.1 if case == "dropout" else 0.0
        model = GPT(GPTConfig(**shape, head=head, dropout=dropout))
        loss_of = partial(measure.compiled(model), idx, targets)
    model.to(device)
    name = "muon" if case == "muon" else "adamw"
    optimizer = make_optimizer(model, 6e-4, (0.9, 0.95), 0.1, name)
    cast, _ = autocast(device, "float32" if case in USERS else "auto")

    def step():
        with cast:
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def held():
        tensors = list(model.parameters())
        for state in optimizer.state.values():
            tensors += state.values()
        return sum(tensor.nbytes for tensor in tensors)

    step.held = held
    return step


def transformers_gpt2(block_size: int, **shape: int) -> torch.nn.Module:
    """transformers' GPT-2 in training mode, without dropout and without an end-of-text token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_positions=block_size,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        **shape,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # the default, set to avoid a warning
    return model.train()


def main() -> None:
    args = measure.arguments(__doc__, SHAPE, SIZES, CASES)
    names = ["softmax", *(args.cases or CASES)]
    cases = {name: prepare(name, **args.shapes) for name in names}
    measure.compare("step", cases, args.rounds, args.shapes)


if __name__ == "__main__":
    main()
