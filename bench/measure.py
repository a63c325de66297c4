"""How the benchmarks measure: the cases in turns in one process, medians and spread of several rounds, memory apart.

A ratio of two cases is the median over rounds of the ratio within a round, since a machine's speed drifts. Peak memory
is that of one call in a fresh process (what a process once had taints what it needs later). A case comes from its
module's prepare(case, **shapes), a function without arguments, so that another process can make it too.
"""

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib
import json
import multiprocessing.pool
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch

from engine.base.distributed import keep_memory, peak_flops, pick_device

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


def peak_memory(case: Callable[[], object]) -> int:
    """Bytes that one call needs beyond what is there before it; for a process that has done nothing else."""
    gc.collect()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
        return torch.cuda.max_memory_allocated() - before
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what earlier calls left free would hide what this one needs
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    case()
    return status("VmHWM") - before


def fresh_process(allocator: str) -> multiprocessing.pool.Pool:
    """A pool of one new process, which sets its malloc before anything large is allocated."""
    return multiprocessing.get_context("spawn").Pool(1, use_allocator, (allocator,))


def peak_of(module: str, case: str, allocator: str = "tuned", **shapes: int) -> int:
    """The warm_peak of a case in a fresh process."""
    with fresh_process(allocator) as process:
        return process.apply(warm_peak, (module, case, shapes))


def warm_peak(module: str, case: str, shapes: Mapping[str, int]) -> int:
    """peak_memory of a case that has been called twice (that compiled it, loaded kernels, made the optimiser's state),
    and what it holds between two calls, if it has a function that says so."""
    prepared = importlib.import_module(module).prepare(case, **shapes)
    prepared()
    prepared()
    held = prepared.held() if hasattr(prepared, "held") else 0
    return held + peak_memory(prepared)


@contextlib.contextmanager
def worker(module: str, case: str, allocator: str, **shapes: int) -> Iterator[Callable[[], None]]:
    """A case in a process of its own, for in_turns: it works while it is called, and waits otherwise."""
    with fresh_process(allocator) as process:
        process.apply(_keep, (module, case, shapes))
        yield lambda: process.apply(_call_kept)


def _keep(module: str, case: str, shapes: Mapping[str, int]) -> None:
    global kept
    kept = importlib.import_module(module).prepare(case, **shapes)


def _call_kept() -> None:
    kept()
    synchronize()


def compiled(function: Callable) -> Callable:
    """torch.compile for a function that a process compiles for many models."""
    # by default a ninth version of one code is given up, for eager
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False)


def use_allocator(name: str) -> None:
    """tuned: as our training sets malloc; default: as the system has it. Before anything large is allocated."""
    if name == "tuned":
        keep_memory()


def report(
    bench: str,
    seconds: Mapping[str, list[float]],
    baseline: str,
    memory: Mapping[str, int] | None = None,
    n_tokens: int = 0,
    flops: Mapping[str, float] | None = None,
    allocators: Mapping[str, str] | None = None,
    **about,
) -> None:
    """Print and record each case: its median time, and its ratio to the baseline, with the middle half of both.

    memory: bytes; n_tokens: of one call; flops: of one call: ratios are then of times per FLOP, and the baseline has a
    record too; about: what else the records have."""
    print(f"\n{bench}: ratios to {baseline}; {about}")
    peak = peak_flops(pick_device("auto"))
    for name, times in seconds.items():
        per_flop = flops[baseline] / flops[name] if flops else 1
        ratios = [per_flop * a / b for a, b in zip(times, seconds[baseline], strict=True)]
        (low, median, high), (least, ratio, most) = quartiles(times), quartiles(ratios)
        found = {"time_ratio": round(ratio, 4), "seconds": round(median, 7)}
        line = f"  {name:<{max(map(len, seconds))}}  {median * 1e3:9.3f} ms ({low * 1e3:.3f} - {high * 1e3:.3f})"
        line += f"  x {ratio:.3f} ({least:.3f} - {most:.3f})"
        line += f"  {n_tokens / median:,.0f} tokens/s" if n_tokens else ""
        if memory:
            found["memory_ratio"] = round(memory[name] / memory[baseline], 4)
            found["peak_mib"] = round(memory[name] / 2**20, 1)
            line += "  peak {peak_mib:.0f} MiB  x {memory_ratio:.3f}".format(**found)
        if flops:
            rates = {"tflops": flops[name] / median / 1e12, "of_peak": flops[name] / median / peak}
            found |= {
                rate: round(value, 4) for rate, value in rates.items() if value == value
            }  # nan: unknown device
            line += "  {tflops:.4g} TFLOP/s, {of_peak:.3f} of the data sheet's".format(**rates)
        if allocators:
            found["allocator"] = allocators[name]
            line += f"  malloc: {allocators[name]}"
        print(line, flush=True)
        if name != baseline or flops:
            _record({"bench": bench, "case": name, "baseline": baseline} | found | about)


def _record(found: dict) -> None:
    """Append to bench/results.jsonl, with the machine and the date."""
    found |= {
        "machine": machine(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    with open(os.environ.get("BENCH_RESULTS") or RESULTS, "a") as file:
        file.write(json.dumps(found) + "\n")


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def arguments(
    description: str,
    rounds: int,
    cases: Collection[str] = (),
    **defaults: str | int | tuple[str, ...],
) -> argparse.Namespace:
    """The command line that the benchmarks share; cases: those there are; defaults: further options, words, numbers, or
    the words to choose from, the usual one first."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes and two rounds: does it run?"
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds of all cases in turns")
    parser.add_argument(
        "--cases", type=lambda words: words.split(","), help="only these, separated by commas"
    )
    for name, default in defaults.items():
        one_of = (
            {"choices": default, "default": default[0]}
            if isinstance(default, tuple)
            else {"default": default}
        )
        parser.add_argument(f"--{name}", type=type(one_of["default"]), **one_of)
    args = parser.parse_args()
    if cases and (unknown := [case for case in args.cases or () if case not in cases]):
        parser.error(f"--cases: {', '.join(unknown)} is not one of {', '.join(cases)}")
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
    units = next(
        (unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in flags), ""
    )
    return f"{os.cpu_count()} cores {platform.machine()} {units}".strip()


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
