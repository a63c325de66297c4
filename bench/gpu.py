"""Does it run on a GPU, and how fast: one command of eight minutes that downloads nothing.

    python bench/gpu.py --out=FOLDER                       results in FOLDER/results.json
    python bench/gpu.py --out=FOLDER --only heads speed    these parts alone
    python bench/gpu.py --quick                            tiny shapes, also on a CPU

The first four parts are the checks of tests/cuda_checks.py; torchrun starts `processes` as one
process, so that it trains with DDP and fully_shard. `speed` runs train.py with GPT-2 124M. A part
has its own process and time limit. The results are written after each part, and include what a
stopped part had found.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch

from bench.heads import OURS
from engine.base.files import read_json_lines, write_json
from engine.runs.banner import environment
from tests import cuda_checks

SECONDS = {"heads": 120, "train": 90, "resume": 60, "processes": 60, "speed": 300}
SECONDS_OF_ALL = 480


def cases(part: str, work: Path, quick: bool) -> Iterator[tuple[str, Callable[[], dict]]]:
    """The names of a part's cases and their functions."""
    if part != "speed":
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # to compare with a CPU
        device = "cuda" if torch.cuda.is_available() else "cpu"
        yield from cuda_checks.cases(part, device, work, quick)
        return
    data = cuda_checks.write_ids(work / "data", 50257)
    for name in ("softmax",) if quick else ("softmax", "sigmoid", "bayes"):
        for vocab_size in (50304, 50257):
            case = f"{name} {vocab_size}"
            options = OURS[name] | {"vocab_size": vocab_size, "dataset": data}
            yield case, partial(speed, work / case, quick, options)


def speed(out_dir: Path, quick: bool, options: dict) -> dict:
    """Medians of train.py's records: tokens per second, MFU, peak memory."""
    config = "config/debug.py" if quick else "config/train_gpt2_fineweb_edu.py"
    options = {"max_iters": 10, "eval_iters": 2, "log_interval": 1, "out_dir": out_dir} | options
    flags = [f"--{name}={value}" for name, value in options.items()]
    subprocess.run([sys.executable, "train.py", config, *flags], cwd=ROOT, check=True)
    records = read_json_lines(out_dir / "metrics.jsonl")
    shutil.rmtree(out_dir)  # its checkpoints
    steps = [record for record in records if "loss" in record][3:]
    keys = steps[0].keys() & {"loss", "tokens_per_second", "mfu", "memory_gb"}
    return {key: statistics.median(record[key] for record in steps) for key in keys}


def run_part(part: str, work: Path, quick: bool) -> None:
    """Append the result of each case to <work>/results.jsonl."""
    for name, case in cases(part, work, quick):
        torch._dynamo.reset()
        started = time.perf_counter()
        try:
            found = {"ok": True} | case()
        except Exception:  # the other cases still run
            found = {"ok": False, "error": traceback.format_exc()[-3000:]}
        found["seconds"] = round(time.perf_counter() - started, 1)
        with open(work / "results.jsonl", "a") as file:
            file.write(json.dumps({"case": name} | found) + "\n")


def start_part(part: str, quick: bool, seconds: float) -> dict:
    """Run a part in its own process, which ends when the time is over (exit code 124)."""
    command = ["timeout", "--kill-after=10", f"{seconds:.0f}", sys.executable]
    if part == "processes":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    with tempfile.TemporaryDirectory() as work:
        command += [__file__, f"--part={part}", f"--out={work}"]
        if quick:
            command.append("--quick")
        log = Path(work, "log")
        with open(log, "w") as file:  # a pipe would wait for processes that outlive the part
            done = subprocess.run(command, stdout=file, stderr=file)
        cases = read_json_lines(Path(work, "results.jsonl"))
        output = log.read_text(errors="replace")[-3000:]
    return {"exit_code": done.returncode, "cases": cases, "output": output}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=SECONDS, default=SECONDS, help="run these")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    parser.add_argument("--part", choices=SECONDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run_part(args.part, args.out, args.quick)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + SECONDS_OF_ALL
    results = {"environment": environment()}
    for part in args.only:
        seconds = max(1.0, min(SECONDS[part], end - time.monotonic()))
        if args.quick:  # on a CPU, which may be busy
            seconds = 600.0
        results[part] = start_part(part, args.quick, seconds)
        print(part, json.dumps(results[part]["cases"], indent=1), flush=True)
        write_json(args.out / "results.json", results)


if __name__ == "__main__":
    main()
