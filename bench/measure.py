"""Measure cases in turns: medians and spreads over rounds.

A machine's speed drifts, so the ratio of two cases is the median over rounds of their ratio within
a round. A case is a function without arguments.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from engine.base.distributed import keep_memory
from engine.base.files import read_json

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
    """Bytes of the tensors that one call allocates at its peak, without those from before it."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        case()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = read_json(Path(file.name))["traceEvents"]
    sizes = [event["args"] for event in events if event["name"] == "[memory]"]
    return max(size["Total Allocated"] for size in sizes)


def compare(
    bench: str, cases: Mapping[str, Callable[[], object]], rounds: int, shapes: Mapping[str, int]
) -> None:
    """Print the median time of each case, and its ratios to the first case with the middle half.

    Appends a record for each other case to the results."""
    torch.backends.cuda.matmul.allow_tf32 = True  # as in training
    keep_memory()
    seconds = in_turns(cases, rounds)
    memory = {}
    for name, case in cases.items():
        memory[name] = peak_memory(case)
        if hasattr(case, "held"):  # what it keeps between calls
            memory[name] += case.held()
    baseline = next(iter(cases))
    print(f"\n{bench}: ratios to {baseline}; {shapes}")
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[baseline], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
        median = statistics.median(times)
        memory_ratio = memory[name] / max(1, memory[baseline])
        peak_mib = memory[name] / 2**20
        print(
            f"  {name:<21} {median * 1e3:9.3f} ms  x {ratio:.3f} ({low:.3f} - {high:.3f})"
            f"  {peak_mib:8.1f} MiB  x {memory_ratio:.3f}",
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
            "memory_ratio": round(memory_ratio, 4),
            "peak_mib": round(peak_mib, 1),
            "shapes": shapes,
            "machine": machine(),
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
        }
        with open(os.environ.get("BENCH_RESULTS", RESULTS), "a") as file:
            file.write(json.dumps(record) + "\n")


def compiled(function: Callable) -> Callable:
    """torch.compile for a function that one process compiles for many models."""
    torch._dynamo.config.recompile_limit = 64  # beyond the limit (default 8) it would run eagerly
    return torch.compile(function, dynamic=False)


def arguments(
    description: str,
    shape: Sequence[str],
    sizes: Mapping[str, Sequence[int]],
    cases: Sequence[str] = (),
) -> argparse.Namespace:
    """Parse the command line.

    shape: the names of the sizes at each scale; `shapes` has those of --scale by name. cases: the
    names for --cases.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all cases in turns")
    parser.add_argument("--cases", nargs="+", choices=cases, metavar="CASE", default=[])
    scales = sorted(sizes.keys() - {"quick"})
    parser.add_argument("--scale", choices=scales, default="small")
    args = parser.parse_args()
    args.rounds = max(2, args.rounds)
    if args.quick:
        args.rounds = 2
        args.scale = "quick"
        os.environ.setdefault("BENCH_RESULTS", os.devnull)  # its speed means nothing
    args.shapes = dict(zip(shape, sizes[args.scale], strict=True))
    return args


def machine() -> str:
    """The name of the GPU, or the number of CPU cores and the best matrix unit."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in flags]
    return " ".join([f"{os.cpu_count()} cores {platform.machine()}", *units[:1]])
