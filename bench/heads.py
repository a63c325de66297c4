"""The head alone, forward and backward, against the plain fp32 linear + cross-entropy, and against what users write.

    python bench/heads.py                          all cases under both allocators
    python bench/heads.py --allocator=default --cases=softmax,sigmoid --rounds=5

Ours are compiled unless a case ends in _eager; _bf16 is under autocast. The naive ones are as users write them, eager
and in fp32: a one-hot target for the sigmoids, torchbnn's layer with its KL for the Bayesian weights.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from bench import measure
from bench.plain import N_DATA, PlainHead
from engine.base.distributed import autocast, pick_device
from heads import Head, HeadConfig

OURS = {
    "softmax": {},
    "smooth": {"likelihood": "smooth"},
    "bayes": {"weights": "bayes"},
    "bayes_full_sample": {"weights": "bayes", "posterior": "full", "estimator": "sample"},
    "sigmoid": {"likelihood": "sigmoid"},
    "sigmoid_regularised": {"likelihood": "sigmoid", "sum_penalty": 1.0},
    "bayes_sigmoid": {"weights": "bayes", "likelihood": "sigmoid"},
}
NAIVE = ("plain_bf16", "dense_bce", "torchbnn", "torchbnn_dense_bce")
CASES = (
    "plain",
    *OURS,
    *(f"{name}_bf16" for name in OURS),
    "softmax_eager",
    "sigmoid_eager",
    *NAIVE,
)
SHAPES = {"n_tokens": 2048, "n_embd": 256, "vocab_size": 50304}
QUICK = {"n_tokens": 512, "n_embd": 8, "vocab_size": 5003}


def prepare(case: str, n_tokens: int, n_embd: int, vocab_size: int) -> Callable[[], None]:
    """One forward and backward pass; the gradients are dropped at its end."""
    torch.manual_seed(0)
    device = pick_device("auto")
    x = torch.randn(8, n_tokens // 8, n_embd, device=device, requires_grad=True)
    targets = torch.randint(vocab_size, (8, n_tokens // 8), device=device)
    name, how = split(case)
    if name in OURS:
        head = Head(HeadConfig(**OURS[name], n_data=N_DATA), vocab_size, n_embd).to(device)
        loss_of = head.loss
    else:
        loss_of = head = PlainHead(name, vocab_size, n_embd).to(device)
    if how == "compiled" or (how == "bf16" and name in OURS):
        loss_of = measure.compiled(loss_of)
    cast, _ = autocast(device, "bfloat16" if how == "bf16" else "float32")

    def step() -> None:
        with cast:
            loss = loss_of(x, targets)
        loss.backward()
        for tensor in (x, *head.parameters()):
            tensor.grad = None

    return step


def split(case: str) -> tuple[str, str]:
    """A case's name and how it runs: eager | compiled | bf16."""
    for how in ("eager", "compiled", "bf16"):
        if case.endswith(f"_{how}"):
            return case.removesuffix(f"_{how}"), how
    return case, "compiled" if case in OURS else "eager"


def main() -> None:
    args = measure.arguments(__doc__, cases=CASES, rounds=7, allocator="both")
    if args.allocator == "both":  # malloc is set once, before anything large is allocated
        for allocator in ("default", "tuned"):
            subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], f"--allocator={allocator}"], check=True
            )
        return
    measure.use_allocator(args.allocator)
    shapes = QUICK if args.quick else SHAPES
    cases = {
        name: prepare(name, **shapes) for name in dict.fromkeys(["plain", *(args.cases or CASES)])
    }
    seconds = measure.in_turns(cases, args.rounds)
    # under the tuned allocator a peak says what the process grew to, not what a call needs
    memory = None
    if args.allocator == "default":
        memory = {
            name: measure.peak_of("bench.heads", name, args.allocator, **shapes) for name in cases
        }
    measure.report(
        "heads",
        seconds,
        "plain",
        memory,
        allocators=dict.fromkeys(cases, args.allocator),
        shapes=shapes,
    )


if __name__ == "__main__":
    main()
