"""How the benchmarks measure: the cases in turns in one process, medians and spread of several rounds, memory apart.

A ratio of two cases is the median over rounds of the ratio within a round, since a machine's speed drifts. Peak memory
is that of one call in a fresh process (what a process once had taints what it needs later). A case comes from its
module's prepare(case, **shapes), a function without arguments, so that another process can make it too.
"""

import argparse
import ctypes
import datetime
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from engine.distributed import keep_memory

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results.jsonl"  # or $BENCH_RESULTS


def in_turns(cases: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, list[float]]:
    """Seconds of each case in each round, after one round that does not count."""
    seconds = {name: [] for name in cases}
    for counts in [False] + [True] * rounds:
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            synchronize()
            if counts:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, baseline, strict=True))


def peak_memory(case: Callable[[], object]) -> int:
    """Bytes that one call needs beyond what is there before it; for a process that has done nothing else."""
    gc.collect()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
        return torch.cuda.max_memory_allocated() - before
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left free would hide what this one needs
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    case()
    return status("VmHWM") - before


def peak_of(module: str, case: str, allocator: str = "tuned", **shapes: int) -> int:
    """The warm_peak of a case in a fresh process."""
    code = f"print(measure.warm_peak({module!r}, {case!r}, {shapes!r}))"
    done = subprocess.run(_python(allocator, code), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} {case}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def warm_peak(module: str, case: str, shapes: Mapping[str, int]) -> int:
    """peak_memory of a case that has been called twice (that compiled it, loaded kernels, made the optimiser's state),
    and what it holds between two calls, if it has a function that says so."""
    prepared = importlib.import_module(module).prepare(case, **shapes)
    prepared()
    prepared()
    held = prepared.held() if hasattr(prepared, "held") else 0
    return held + peak_memory(prepared)


class Worker:
    """A case in a process of its own, for in_turns: it works while it is called, and waits otherwise."""

    def __init__(self, module: str, case: str, allocator: str, **shapes: int):
        code = f"measure.serve({module!r}, {case!r}, {shapes!r})"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(_python(allocator, code), cwd=ROOT, text=True, bufsize=1, **pipes)
        self.answer()

    def __call__(self) -> None:
        self.process.stdin.write("go\n")
        self.answer()

    def answer(self) -> None:
        if self.process.stdout.readline() != "done\n":
            raise RuntimeError(f"{' '.join(self.process.args)} ended early")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(module: str, case: str, shapes: Mapping[str, int]) -> None:
    """What a Worker does: one call for each line that comes in."""
    prepared = importlib.import_module(module).prepare(case, **shapes)
    print("done", flush=True)
    for _ in sys.stdin:
        prepared()
        synchronize()
        print("done", flush=True)


def _python(allocator: str, code: str) -> list[str]:
    code = f"from bench import measure; measure.use_allocator({allocator!r}); {code}"
    return [sys.executable, "-c", code]


def compiled(function: Callable) -> Callable:
    """torch.compile for a function that a process compiles for many models."""
    torch._dynamo.config.recompile_limit = 64  # by default a ninth version of one code is given up, for eager
    return torch.compile(function, dynamic=False)


def use_allocator(name: str) -> None:
    """tuned: as our training sets malloc; default: as the system has it. Before anything large is allocated."""
    if name == "tuned":
        keep_memory()


def table(
    title: str,
    seconds: Mapping[str, list[float]],
    baseline: str,
    memory: Mapping[str, int] | None = None,
    goals: Mapping[str, str] | None = None,
    n_tokens: int = 0,
) -> None:
    """Print of each case the median time, its ratio to the baseline (and the middle half of both), and its goal.

    n_tokens: of one call, for tokens per second."""
    print(f"\n{title}: ratios to {baseline}")
    width = max(map(len, seconds))
    for name, times in seconds.items():
        low, median, high = quartiles(times)
        ratios = [a / b for a, b in zip(times, seconds[baseline], strict=True)]
        line = f"  {name:<{width}}  {median * 1e3:8.1f} ms ({low * 1e3:.1f} - {high * 1e3:.1f})"
        line += "  x {1:.3f} ({0:.3f} - {2:.3f})".format(*quartiles(ratios))
        if n_tokens:
            line += f"  {n_tokens / median:7.0f} tokens/s"
        if memory:
            line += f"  peak {memory[name] / 2**20:6.0f} MiB  x {memory[name] / memory[baseline]:.3f}"
        if goals and name in goals:
            line += f"  goal {goals[name]}"
        print(line, flush=True)


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def record(bench: str, case: str, baseline: str, time_ratio: float, memory_ratio: float | None = None, **about) -> None:
    """Append a result to bench/results.jsonl, with the machine and the date."""
    line = {"bench": bench, "case": case, "baseline": baseline, "time_ratio": round(time_ratio, 4)}
    line |= {} if memory_ratio is None else {"memory_ratio": round(memory_ratio, 4)}
    line |= about | {"machine": machine(), "torch": torch.__version__, "date": datetime.date.today().isoformat()}
    with open(os.environ.get("BENCH_RESULTS") or RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")


def record_all(
    bench: str, seconds: Mapping[str, list[float]], baseline: str, memory: Mapping[str, int] | None, **about
) -> None:
    """A record for each case but the baseline, with its medians."""
    for case in [name for name in seconds if name != baseline]:
        median, time_ratio = round(statistics.median(seconds[case]), 5), ratio(seconds[case], seconds[baseline])
        if memory is None:
            record(bench, case, baseline, time_ratio, seconds=median, **about)
        else:
            peak = {"peak_mib": round(memory[case] / 2**20, 1)}
            record(bench, case, baseline, time_ratio, memory[case] / memory[baseline], seconds=median, **peak, **about)


def arguments(description: str, rounds: int, **defaults: str) -> argparse.Namespace:
    """The command line that the benchmarks share; defaults: further options, each a word."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="tiny shapes and two rounds: does it run?")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds of all cases in turns")
    parser.add_argument("--cases", default="", help="only these, separated by commas")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default)
    args = parser.parse_args()
    args.rounds = 2 if args.quick else args.rounds
    if args.quick:  # says nothing about speed
        os.environ.setdefault("BENCH_RESULTS", os.devnull)
    return args


def machine() -> str:
    """The GPU, or the CPU with its cores and units for matrices."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    units = next((unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in flags), "")
    return f"{os.cpu_count()} cores {platform.machine()} {units}".strip()


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
