"""A whole training step: each head against our softmax, and against what users write.

    python bench/step.py                        4 layers of 256, V = 50304 (small)
    python bench/step.py --scale=char           6 layers of 384 on 65 characters; --scale=gpt2: 124M, one block of 1024;
                                                --scale=study: config/train_wikitext2_8k.py

Ours run as on a CPU with --compile: bf16 autocast, torch.compile, fused AdamW, the tuned allocator, in turns in this
process. What users write is eager fp32 with AdamW as it comes, each in a worker process under malloc's default, which
has its turn while ours waits; plain_tuned is the plain GPT here, under our setting.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from bench import measure
from bench.heads import OURS
from bench.plain import N_DATA, PlainGPT
from engine.base.distributed import autocast, pick_device
from engine.base.optim import adamw
from heads import HeadConfig
from model import GPT, GPTConfig

USERS = ("plain", "transformers", "torchbnn", "dense_bce", "torchbnn_dense_bce")
SMALL = {
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 256,
    "block_size": 256,
    "batch_size": 8,
    "vocab_size": 50304,
}
CHAR = {
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "block_size": 256,
    "batch_size": 12,
    "vocab_size": 65,
}
GPT2 = {
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "block_size": 1024,
    "batch_size": 1,
    "vocab_size": 50304,
}
STUDY = {
    "n_layer": 3,
    "n_head": 3,
    "n_embd": 192,
    "block_size": 256,
    "batch_size": 8,
    "vocab_size": 8192,
}
SCALES = {  # shapes and cases; those of 124M that fit into 24 GiB together
    "small": (SMALL, (*OURS, "plain_tuned", *USERS)),
    "char": (CHAR, (*OURS, "plain_tuned", "plain", "transformers")),
    "gpt2": (GPT2, ("softmax", "plain", "transformers")),
    "study": (STUDY, (*OURS, "dropout")),
}
QUICK = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 2,
    "vocab_size": 307,
}


class Step:
    """One step of training, of n_micro micro-batches: a batch that stays the same."""

    def __init__(
        self,
        model: torch.nn.Module,
        loss_of: Callable,
        optimizer: torch.optim.Optimizer,
        dtype: str,
        n_micro: int = 1,
    ):
        self.model, self.loss_of, self.optimizer, self.n_micro = model, loss_of, optimizer, n_micro
        self.cast, _ = autocast(pick_device("auto"), dtype)

    def __call__(self) -> None:
        for _ in range(self.n_micro):
            with self.cast:
                loss = self.loss_of()
            (loss / self.n_micro).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def held(self) -> int:
        """Bytes of the weights and the optimiser's state, which are there between two steps."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        tensors = [
            *self.model.parameters(),
            *(value for value in state if isinstance(value, torch.Tensor)),
        ]
        return sum(tensor.nbytes for tensor in tensors)


def prepare(case: str, batch_size: int, n_micro: int = 1, **shape: int) -> Step:
    torch.manual_seed(0)
    device = pick_device("auto")
    idx, targets = torch.randint(
        shape["vocab_size"], (2, batch_size, shape["block_size"]), device=device
    )
    if case in OURS or case == "dropout":
        head = HeadConfig(**OURS.get(case, {}), n_data=N_DATA)
        model = GPT(GPTConfig(**shape, head=head, dropout=0.1 if case == "dropout" else 0.0)).to(
            device
        )
        compiled, optimizer = measure.compiled(model), adamw(model, 6e-4, (0.9, 0.95), 0.1)
        return Step(model, lambda: compiled(idx, targets), optimizer, "bfloat16", n_micro)
    if case == "transformers":
        model = transformers_gpt2(**shape).to(device)
        loss_of = lambda: model(idx, labels=idx).loss  # noqa: E731  it shifts the labels itself
    else:
        model = PlainGPT(**shape, head=case.removesuffix("_tuned")).to(device)
        loss_of = lambda: model(idx, targets)  # noqa: E731
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    return Step(model, loss_of, optimizer, "float32", n_micro)


def transformers_gpt2(block_size: int, **shape: int) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    no_ids = {
        "bos_token_id": None,
        "eos_token_id": None,
    }  # its defaults lie beyond a small vocabulary
    model = GPT2LMHeadModel(GPT2Config(n_positions=block_size, **shape, **no_dropout, **no_ids))
    model.loss_type = "ForCausalLM"  # what it takes anyway, with a warning
    return model.train()


def main() -> None:
    args = measure.arguments(
        __doc__, rounds=7, cases=(*OURS, "dropout", "plain_tuned", *USERS), scale=tuple(SCALES)
    )
    measure.use_allocator("tuned")
    shapes, names = SCALES[args.scale]
    shapes = QUICK if args.quick else shapes
    allocators = {
        name: "default" if name in USERS else "tuned"
        for name in ("softmax", *(args.cases or names))
    }
    with contextlib.ExitStack() as stack:
        cases = {}
        for name, allocator in allocators.items():
            if name in USERS:
                cases[name] = stack.enter_context(
                    measure.worker("bench.step", name, allocator, **shapes)
                )
            else:
                cases[name] = prepare(name, **shapes)
        seconds = measure.in_turns(cases, args.rounds)
    del cases
    memory = {
        name: measure.peak_of("bench.step", name, allocator, **shapes)
        for name, allocator in allocators.items()
    }
    n_tokens = shapes["batch_size"] * shapes["block_size"]
    measure.report(
        "step", seconds, "softmax", memory, n_tokens, allocators=allocators, shapes=shapes
    )


if __name__ == "__main__":
    main()
