"""How much memory steps of training really take, for tests/test_budget.py, in a process that does nothing else:

python -m tests.budget_worker '{"n_layer": 4, ...}'         prints the estimate's parts and the measured peak, JSON
"""

import ctypes
import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench.measure import status
from bench.step import Step
from engine.base.distributed import keep_memory
from engine.base.optim import adamw
from engine.base.options import build, flatten
from engine.runs import budget
from model import GPT, GPTConfig


def step_of(batch_size: int, dtype: str, n_micro: int, **options) -> Step:
    model = GPT(build(GPTConfig, flatten(GPTConfig()) | {"n_data": 10**6} | options))
    idx, targets = torch.randint(options["vocab_size"], (2, batch_size, options["block_size"]))
    return Step(
        model, lambda: model(idx, targets), adamw(model, 6e-4, (0.9, 0.95), 0.1), dtype, n_micro
    )


def measured(options: dict) -> int:
    """Bytes that three steps take above what is there before the model is."""
    step_of(
        **options | {"n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 32, "vocab_size": 99}
    )()  # the libraries
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    step = step_of(**options)
    for _ in range(3):
        step()
    found = budget.memory(
        step.model, options["batch_size"], options["n_micro"], options["dtype"], saving=False
    )
    print(json.dumps(asdict(found) | {"total": found.total, "measured": status("VmHWM") - before}))


if __name__ == "__main__":
    keep_memory()
    measured({"batch_size": 8, "dtype": "bfloat16", "n_micro": 1} | json.loads(sys.argv[1]))
