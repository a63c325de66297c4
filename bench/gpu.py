"""GPT-2 124M on a GPU, in bf16: training steps, heads, decoding.

    python bench/gpu.py                          under 20 minutes on one CUDA GPU
    python bench/gpu.py --cases=steps,heads      some of its parts
    python bench/gpu.py --quick                  tiny shapes on any device: does it run?

Records have TFLOP/s and their share of the data sheet's if the FLOPs are known; a step of any head
counts those of the softmax model, so the share is MFU. Memory is what one call needs, gradients
included, and for a step also the weights and the optimizer's state.

The goals on an H100 or H200: a softmax step in 900 ms (583k tokens/s, MFU 0.50), smooth within
1.005 of it, sigmoid 1.00, the Bayesian ones 1.02; each head in 1 GB; at batch 1 4,000 tokens/s, and
32 draws within 1.15 of one.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from bench import heads, measure, step
from bench.generate import gpt, text_of
from engine.base.distributed import peak_flops, pick_device
from engine.base.errors import UserError, run_main
from engine.eval.generation import compile_step

N_MICRO = 16  # micro-batches in a step


def compare(
    bench: str,
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    n_tokens: int,
    flops: float,
    shapes: Mapping[str, int],
) -> None:
    """Time, memory and TFLOP/s of cases in this process; the first one is the baseline."""
    seconds = measure.in_turns(cases, rounds)
    memory = {name: measure.memory_of(case) for name, case in cases.items()}
    columns = {}
    for name, times in seconds.items():
        rate = flops / statistics.median(times)
        columns[name] = {"tflops": rate / 1e12, "of_peak": rate / peak_flops(pick_device("auto"))}
    baseline = next(iter(cases))
    measure.report(bench, seconds, baseline, memory, n_tokens, columns, shapes=shapes)


def steps(shape: dict[str, int], rounds: int) -> None:
    """A training step of each head: gradient accumulation, torch.compile, fused AdamW."""
    cases = {name: step.prepare(name, n_micro=N_MICRO, **shape) for name in heads.OURS}
    n_tokens = N_MICRO * shape["batch_size"] * shape["block_size"]
    flops = n_tokens * cases["softmax"].model.flops_per_token()
    compare("gpu_steps", cases, rounds, n_tokens, flops, shape | {"step_tokens": n_tokens})


def heads_alone(shape: dict[str, int], rounds: int) -> None:
    """The heads on the hidden states of one micro-batch, against a plain one under autocast."""
    n, C, V = shape["batch_size"] * shape["block_size"], shape["n_embd"], shape["vocab_size"]
    shapes = {"n_tokens": n, "n_embd": C, "vocab_size": V}
    cases = {name: heads.prepare(name, **shapes) for name in ("plain_bf16", *heads.BF16)}
    compare("gpu_heads", cases, rounds, n, 6 * n * C * V, shapes)


def decode(shape: dict[str, int], rounds: int) -> None:
    """Texts of the Bayesian head that averages draws per token, eager and as one compiled graph."""
    torch._dynamo.config.recompile_limit = 64  # one code for two models and their caches
    shape = {name: size for name, size in shape.items() if name != "batch_size"}
    eager, compiled = gpt("bayes", shape), gpt("bayes", shape)
    compile_step(compiled)
    n_new = shape["block_size"] // 4
    for batch in (1, 32):
        prompt = (batch, n_new // 16 or 1)
        idx = torch.randint(shape["vocab_size"], prompt, device=pick_device("auto"))
        options = {"idx": idx, "n_new": n_new, "dtype": "bfloat16"}
        cases = {f"draws: {n}": text_of(compiled, n_samples=n, **options) for n in (1, 8, 32)}
        cases["eager"] = text_of(eager, n_samples=1, **options)
        seconds = measure.in_turns(cases, rounds)
        shapes = shape | {"batch": batch, "n_new": n_new}
        measure.report("gpu_decode", seconds, "draws: 1", n_tokens=batch * n_new, shapes=shapes)


PARTS = {"steps": steps, "heads": heads_alone, "decode": decode}


def main() -> None:
    args = measure.arguments(__doc__, 5, PARTS, batch_size=32)
    if pick_device("auto").type != "cuda" and not args.quick:
        raise UserError("bench/gpu.py needs a CUDA GPU; --quick runs tiny shapes without one")
    shape = step.shapes_of("gpt2") | {"batch_size": args.batch_size}
    if args.quick:
        shape = step.shapes_of("quick")
    torch.backends.cuda.matmul.allow_tf32 = True  # as training has it
    names = args.cases or list(PARTS)
    if len(names) == 1 or args.quick:
        for name in names:
            PARTS[name](shape, args.rounds)
    else:  # a process for each part: one that fails does not end the others
        for name in names:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--cases={name}"])


if __name__ == "__main__":
    run_main(main)
