"""The head alone, forward and backward, against the plain fp32 linear + cross-entropy.

    python bench/heads.py                            all cases
    python bench/heads.py --scale=gpu                32 blocks of 1024 of GPT-2 124M
    python bench/heads.py --cases softmax sigmoid --rounds=5

Our heads are compiled; those that end in _bf16 run under autocast. The others are what users write,
eager and in fp32: a one-hot target for sigmoids, torchbnn's layer and KL for Bayesian weights. All
have the malloc setting of training.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn as nn
from torch.nn import functional as F

from bench import measure
from engine.base.distributed import autocast, pick_device
from heads import Head, HeadConfig

N_DATA = 1_000_000  # tokens of a training set, the N of KL / N
OURS = {
    "softmax": {},
    "smooth": {"likelihood": "smooth"},
    "bayes": {"weights": "bayes"},
    "sigmoid": {"likelihood": "sigmoid"},
    "bayes_sigmoid": {"weights": "bayes", "likelihood": "sigmoid"},
}
CASES = ["plain", "plain_bf16", "dense_bce", "torchbnn"]
CASES += [*OURS, *(f"{name}_bf16" for name in OURS)]
SHAPE = ("n_tokens", "n_embd", "vocab_size")
SIZES = {
    "small": (2048, 256, 50304),
    "gpu": (32768, 768, 50304),
    "quick": (512, 8, 5003),
}


def prepare(case: str, n_tokens: int, n_embd: int, vocab_size: int) -> Callable[[], None]:
    """Returns a function of one forward and backward pass, which frees the gradients."""
    torch.manual_seed(0)
    device = pick_device("auto")
    x = torch.randn(8, n_tokens // 8, n_embd, device=device, requires_grad=True)
    targets = torch.randint(vocab_size, (8, n_tokens // 8), device=device)
    name = case.removesuffix("_bf16")
    if name in OURS:
        config = HeadConfig(**OURS[name], n_data=N_DATA)
        head = Head(config, vocab_size, n_embd).to(device)
        loss_of = measure.compiled(head.loss)
    else:
        loss_of = head = PlainHead(name, vocab_size, n_embd).to(device)
    dtype = "bfloat16" if case.endswith("_bf16") else "float32"
    cast, _ = autocast(device, dtype)

    def step():
        with cast:
            loss = loss_of(x, targets)
        loss.backward()
        for tensor in (x, *head.parameters()):
            tensor.grad = None

    return step


class PlainHead(nn.Module):
    """A head as users write it.

    kind: plain (cross-entropy), dense_bce (a one-hot target), or torchbnn (its layer and KL).
    """

    def __init__(self, kind: str, vocab_size: int, n_embd: int):
        super().__init__()
        self.divergence = None
        if kind == "torchbnn":
            import torchbnn

            self.linear = torchbnn.BayesLinear(0, 0.1, n_embd, vocab_size, bias=False)
            self.divergence = torchbnn.BKLLoss(reduction="sum")
        else:
            self.linear = nn.Linear(n_embd, vocab_size, bias=False)
        self.nll = dense_bce if kind == "dense_bce" else F.cross_entropy

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = self.nll(self.linear(x).flatten(0, 1), targets.flatten())
        if self.divergence is not None:
            loss = loss + self.divergence(self.linear).squeeze() / N_DATA
        return loss


def dense_bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy with a one-hot target (N, V), summed over V."""
    one_hot = torch.zeros_like(logits).scatter_(1, targets.unsqueeze(1), 1.0)
    return F.binary_cross_entropy_with_logits(logits, one_hot, reduction="sum") / len(targets)


def main() -> None:
    args = measure.arguments(__doc__, SHAPE, SIZES, CASES)
    names = ["plain", *(args.cases or CASES)]
    cases = {name: prepare(name, **args.shapes) for name in names}
    measure.compare("heads", cases, args.rounds, args.shapes)


if __name__ == "__main__":
    main()
