"""Measure cases in turns: medians and spreads over rounds.

A machine's speed drifts, so the ratio of two cases is the median over rounds of their ratio within
a round. On a CPU each case whose memory is measured has its own process, because earlier work of a
process changes how much memory it needs later. A case is a function without arguments, made by
prepare(case, **shapes) of its module.
"""

import argparse
import ctypes
import datetime
import gc
import importlib
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results.jsonl"  # or $BENCH_RESULTS


def in_turns(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case in each round, after one round that is not counted."""
    seconds = {name: [] for name in cases}
    for counts in [False] + [True] * rounds:
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if counts:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def peak_memory(case: Callable[[], object]) -> int:
    """Bytes that one call allocates at its peak, beyond those allocated before it."""
    gc.collect()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
        return torch.cuda.max_memory_allocated() - before
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # freed memory would hide allocations of this call
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    case()
    return status("VmHWM") - before


def memory_of(case: Callable[[], object]) -> int:
    """The peak memory of a call plus the memory that the case holds between calls."""
    if hasattr(case, "memory"):
        return case.memory()
    held = case.held() if hasattr(case, "held") else 0
    return held + peak_memory(case)


def status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def compare(
    bench: str,
    names: Iterable[str],
    baseline: str,
    rounds: int,
    shapes: Mapping[str, int],
) -> None:
    """Report time and peak memory of the baseline and of these cases of bench/<bench>.py."""
    make = prepared if torch.cuda.is_available() else InProcess
    cases = {name: make(bench, name, shapes) for name in (baseline, *names)}
    seconds = in_turns(cases, rounds)
    memory = {name: memory_of(case) for name, case in cases.items()}
    columns = {}
    for name, n_bytes in memory.items():
        columns[name] = {
            "memory_ratio": round(n_bytes / memory[baseline], 4),
            "peak_mib": round(n_bytes / 2**20, 1),
        }
    report(bench, seconds, baseline, shapes, columns)


def prepared(bench: str, name: str, shapes: Mapping[str, int]) -> Callable:
    torch.backends.cuda.matmul.allow_tf32 = True  # as in training
    return importlib.import_module(f"bench.{bench}").prepare(name, **shapes)


class InProcess:
    """A prepared case in its own process."""

    def __init__(self, *setup):
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, spawn, _prepare, setup)

    def __call__(self) -> None:
        self.pool.submit(_call).result()

    def memory(self) -> int:
        return self.pool.submit(_memory).result()


def _prepare(*setup):
    global case
    case = prepared(*setup)


def _call():
    case()


def _memory():
    return memory_of(case)


def compiled(function: Callable) -> Callable:
    """torch.compile for a function that one process compiles for many models."""
    torch._dynamo.config.recompile_limit = 64  # beyond the limit (default 8) it would run eagerly
    return torch.compile(function, dynamic=False)


def report(
    bench: str,
    seconds: Mapping[str, list[float]],
    baseline: str,
    shapes: Mapping[str, int],
    columns: Mapping[str, dict],
) -> None:
    """Print the median time of each case, and its ratio to the baseline with the middle half.

    Appends a record for each case except the baseline to the results. columns: case -> more fields.
    """
    print(f"\n{bench}: ratios to {baseline}; {shapes}")
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[baseline], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        median = statistics.median(times)
        more = columns.get(name, {})
        print(
            f"  {name:<21} {median * 1e3:9.3f} ms  x {ratio:.3f} ({low:.3f} - {high:.3f})",
            *(f" {key} {value}" for key, value in more.items()),
            flush=True,
        )
        if name == baseline:
            continue
        record = {
            "bench": bench,
            "case": name,
            "baseline": baseline,
            "time_ratio": round(ratio, 4),
            "seconds": round(median, 7),
            **more,
            "shapes": shapes,
            "machine": machine(),
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
        }
        with open(os.environ.get("BENCH_RESULTS", RESULTS), "a") as file:
            file.write(json.dumps(record) + "\n")


def arguments(description: str, cases: Iterable[str] = (), **options) -> argparse.Namespace:
    """Parse the command line.

    cases: the names that --cases takes; options: the choices of further options, default first.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all cases in turns")
    parser.add_argument("--cases", nargs="+", choices=cases, metavar="CASE", default=[])
    for name, choices in options.items():
        parser.add_argument(f"--{name}", choices=choices, default=choices[0])
    args = parser.parse_args()
    args.rounds = max(2, args.rounds)
    if args.quick:
        args.rounds = 2
        args.scale = "quick"
        os.environ.setdefault("BENCH_RESULTS", os.devnull)  # its speed means nothing
    return args


def machine() -> str:
    """The name of the GPU, or the number of CPU cores and the best matrix unit."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in flags]
    return " ".join([f"{os.cpu_count()} cores {platform.machine()}", *units[:1]])
