"""Measure cases in turns: medians and spreads over rounds.

A machine's speed drifts, so the ratio of two cases is the median over rounds of their ratio within
a round. Cases whose memory counts have a process each, because what a process did before changes
what it needs later. A case is a function without arguments; prepare(case, **shapes) of its module
makes it in its process.
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
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from engine.base.distributed import keep_memory

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results.jsonl"  # or $BENCH_RESULTS


def in_turns(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
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


def peak_memory(case: Callable[[], object]) -> int:
    """Bytes that one call needs beyond what was there before it."""
    gc.collect()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
        return torch.cuda.max_memory_allocated() - before
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # freed memory would hide what this call needs
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    case()
    return status("VmHWM") - before


def memory_of(case: Callable[[], object]) -> int:
    """The peak memory of a call, and what the case holds between two calls."""
    held = case.held() if hasattr(case, "held") else 0
    return held + peak_memory(case)


def status(name: str) -> int:
    """A number of bytes in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def compare(
    bench: str,
    allocators: Mapping[str, str],
    baseline: str,
    rounds: int,
    shapes: Mapping[str, int],
    n_tokens: int = 0,
) -> None:
    """Report time and peak memory of cases of a module in bench/, each in a process of its own.

    allocators: case -> its malloc setting. One process works while all others wait.
    """
    spawn = multiprocessing.get_context("spawn")
    processes = {}
    for name, allocator in allocators.items():
        setup = (f"bench.{bench}", name, allocator, shapes)
        processes[name] = ProcessPoolExecutor(1, spawn, _prepare, setup)
    cases = {name: partial(_run, process, _call) for name, process in processes.items()}
    seconds = in_turns(cases, rounds)
    memory = {name: _run(process, _memory) for name, process in processes.items()}
    for process in processes.values():
        process.shutdown()
    columns = {name: {"allocator": allocator} for name, allocator in allocators.items()}
    report(bench, seconds, baseline, memory, n_tokens, columns, shapes=shapes)


def _run(process: ProcessPoolExecutor, function: Callable) -> object:
    return process.submit(function).result()


def _prepare(module: str, name: str, allocator: str, shapes: Mapping[str, int]) -> None:
    global case
    if allocator == "tuned":
        keep_memory()
    case = importlib.import_module(module).prepare(name, **shapes)


def _call() -> None:
    case()
    synchronize()


def _memory() -> int:
    return memory_of(case)


def compiled(function: Callable) -> Callable:
    """torch.compile for a function that a process compiles for many models."""
    torch._dynamo.config.recompile_limit = 64  # beyond the limit, 8 by default, it runs eager
    return torch.compile(function, dynamic=False)


def report(
    bench: str,
    seconds: Mapping[str, list[float]],
    baseline: str,
    memory: Mapping[str, int] | None = None,
    n_tokens: int = 0,
    columns: Mapping[str, dict] | None = None,
    **about,
) -> None:
    """Print each case's median time and its ratio to the baseline with its middle half, and append
    a record of each case but the baseline to the results.

    memory: bytes; n_tokens: of one call; columns: more fields of a case's record; about: more
    fields of all records."""
    print(f"\n{bench}: ratios to {baseline}; {about}")
    width = max(map(len, seconds))
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[baseline], strict=True)]
        median = statistics.median(times)
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        more = dict((columns or {}).get(name, {}))
        if memory:
            more["memory_ratio"] = round(memory[name] / memory[baseline], 4)
            more["peak_mib"] = round(memory[name] / 2**20, 1)
        line = f"  {name:<{width}}  {median * 1e3:9.3f} ms  x {ratio:.3f} ({low:.3f} - {high:.3f})"
        if n_tokens:
            line += f"  {n_tokens / median:,.0f} tokens/s"
        print(line, *(f" {key} {value}" for key, value in more.items()), flush=True)
        if name != baseline:
            record = {"bench": bench, "case": name, "baseline": baseline}
            record |= {"time_ratio": round(ratio, 4), "seconds": round(median, 7)}
            record |= more | about | {"machine": machine(), "torch": torch.__version__}
            record["date"] = datetime.date.today().isoformat()
            with open(os.environ.get("BENCH_RESULTS") or RESULTS, "a") as file:
                file.write(json.dumps(record) + "\n")


def arguments(
    description: str, rounds: int, cases: Collection[str] = (), **defaults
) -> argparse.Namespace:
    """The command line. cases: the names that --cases takes; defaults: further options, each with
    its default or a tuple of its choices."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds of all cases in turns")
    parser.add_argument("--cases", type=lambda names: names.split(","), default=[])
    for name, default in defaults.items():
        choices = default if isinstance(default, tuple) else None
        default = choices[0] if choices else default
        parser.add_argument(f"--{name}", type=type(default), default=default, choices=choices)
    args = parser.parse_args()
    if unknown := set(args.cases) - set(cases):
        parser.error(f"--cases: {', '.join(unknown)} is not one of {', '.join(cases)}")
    args.rounds = 2 if args.quick else max(2, args.rounds)
    if args.quick:  # says nothing about speed
        os.environ.setdefault("BENCH_RESULTS", os.devnull)
    return args


def machine() -> str:
    """The GPU, or the CPU with its number of cores and best matrix unit."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in flags]
    return " ".join([f"{os.cpu_count()} cores {platform.machine()}", *units[:1]])
