"""How the benchmarks measure: the cases in turns in one process, medians and spread of several rounds, memory apart.

A ratio of two cases is the median over rounds of the ratio within a round, since a machine's speed drifts. Peak memory
is that of one call in a fresh process (what a process once had taints what it needs later).
"""

import datetime
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from engine.distributed import keep_memory

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results.jsonl"


def in_turns(cases: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, list[float]]:
    """Seconds of each case in each round, after one round that does not count."""
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


def ratio(seconds: list[float], baseline: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, baseline, strict=True))


def peak_memory(case: Callable[[], object]) -> int:
    """Bytes that one call needs beyond what is there before it; for a process that has done nothing else."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
        return torch.cuda.max_memory_allocated() - before
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    case()
    return _status("VmHWM") - before


def peak_of(module: str, case: str, allocator: str = "tuned", **shapes: int) -> int:
    """peak_memory of <module>.prepare(case, **shapes) in a fresh process; the first call there, which may compile, is
    the one before."""
    code = (
        f"from bench.measure import use_allocator, warm_peak; use_allocator({allocator!r}); "
        f"print(warm_peak({module!r}, {case!r}, {shapes!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} {case}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def warm_peak(module: str, case: str, shapes: Mapping[str, int]) -> int:
    """peak_memory of a case whose compilation a smaller call has paid for."""
    return peak_memory(importlib.import_module(module).prepare(case, **shapes))


def use_allocator(name: str) -> None:
    """tuned: as our training sets malloc; default: as the system has it. Before anything large is allocated."""
    if name == "tuned":
        keep_memory()


def table(title: str, seconds: Mapping[str, list[float]], baseline: str, memory: Mapping[str, int] | None = None):
    """Print median, spread (of the middle half) and ratio to the baseline of each case."""
    print(f"\n{title}")
    width = max(map(len, seconds))
    for name, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4)
        line = f"  {name:<{width}}  {median * 1e3:9.1f} ms ({low * 1e3:.1f} - {high * 1e3:.1f})"
        line += f"  x {ratio(times, seconds[baseline]):.3f}"
        if memory:
            line += f"  peak {memory[name] / 2**20:8.0f} MiB  x {memory[name] / memory[baseline]:.3f}"
        print(line, flush=True)


def record(bench: str, case: str, baseline: str, time_ratio: float, memory_ratio: float | None = None, **about) -> None:
    """Append a result to bench/results.jsonl, with the machine and the date."""
    line = {"bench": bench, "case": case, "baseline": baseline, "time_ratio": round(time_ratio, 4)}
    line |= {} if memory_ratio is None else {"memory_ratio": round(memory_ratio, 4)}
    line |= about | {"machine": machine(), "torch": torch.__version__, "date": datetime.date.today().isoformat()}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")


def machine() -> str:
    """The GPU, or the CPU with its cores and units for matrices."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    units = next((unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in flags), "")
    return f"{os.cpu_count()} cores {platform.machine()} {units}".strip()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
