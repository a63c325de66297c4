"""Send runs signals at random instants (kill -9, SIGTERM, SIGINT), and count how they recover.

    # make reliability, 15 minutes
    python -m tests.faults --one_process=150
    # make soak, an hour and the undisturbed run
    python -m tests.faults --two_processes=500

A campaign writes its counts into training_logs/reliability.json. The tests run short ones.
"""

import contextlib
import datetime
import hashlib
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train
from engine.base.errors import run_main
from engine.base.files import read_json, write_json
from engine.base.options import load_config
from engine.runs import checkpoint
from engine.runs.banner import environment
from engine.runs.logger import read_records
from model import GPT
from tests.helpers import ROOT, TINY, flags, same_weights, words, write_words

# a step takes some 10 ms, a third of a run is evaluation, a checkpoint is always being written
OPTIONS = TINY | {
    "gradient_accumulation_steps": 2,
    "batch_size": 4,
    "dropout": 0.1,
    "weights": "bayes",
    "max_iters": 200,
    "lr_decay_iters": 200,
    "eval_interval": 10,
    "eval_iters": 20,
    "save_interval": 1,
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
STEP = "step +[0-9]+/"
SHARD = 20_000  # tokens of a file that tests of data preparation write
MAX_SECONDS = 600.0  # a run that takes longer to end counts as hung


@dataclass(frozen=True)
class FaultConfig:
    one_process: int = 0  # signals to a run on one process
    two_processes: int = 0  # signals to a run on two processes under torchrun
    seed: int = 0  # of the signals and their instants


# a server that has imported torch: its children start at once
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "tests.helpers"])


class Forked:
    """train.py with these flags in a forked child, with the methods of subprocess.Popen."""

    def __init__(self, argv: list[str], log: Path, main: Callable[[], None] = train.main):
        self.child = FORKS.Process(target=in_child, args=(argv, log, main), daemon=True)
        self.child.start()
        self.pid = self.child.pid

    def poll(self) -> int | None:
        return self.child.exitcode

    def wait(self, timeout: float) -> int:
        self.child.join(timeout)
        if self.child.exitcode is None:
            raise subprocess.TimeoutExpired("train.py", timeout)
        return self.child.exitcode


def in_child(argv: list[str], log: Path, main: Callable[[], None]) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train.py", *argv]
    main()


class Run:
    """train.py in a child, or in two under torchrun; resumes the run in its folder."""

    def __init__(
        self,
        data: Path,
        out_dir: Path,
        processes: int = 1,
        log: Path | None = None,
        main: Callable[[], None] = train.main,
        **options,
    ):
        options = OPTIONS | {"dataset": data, "out_dir": out_dir, "init_from": "auto"} | options
        self.log = log or out_dir.with_suffix(".log")
        self.at = self.log.stat().st_size if self.log.exists() else 0
        if processes == 1:
            self.process = Forked(flags(**options), self.log, main)
            return
        command = [sys.executable, *TORCHRUN, "--max-restarts=5", str(ROOT / "train.py")]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                command + flags(**options),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What this run has printed."""
        if not self.log.exists():
            return ""
        with open(self.log) as log:
            log.seek(self.at)
            return log.read()

    def wait_for(self, text: str) -> bool:
        """Wait until the output matches the pattern; False if the run ends before."""
        end = time.monotonic() + MAX_SECONDS
        while time.monotonic() < end:
            if re.search(text, self.output):
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.02)
        raise AssertionError(f"{MAX_SECONDS} s without {text!r}:\n{self.output[-2000:]}")

    def workers(self) -> list[int]:
        """The process ids of torchrun's workers by rank; without torchrun, the run's own."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[1]) == self.process.pid:
                    found.append(int(stat.parent.name))
        return sorted(found) or [self.process.pid]

    def send(self, signum: int, *pids: int) -> None:
        """Send a signal to the run, or to these of its processes."""
        for pid in pids or [self.process.pid]:
            with contextlib.suppress(ProcessLookupError):  # it may have ended
                os.kill(pid, signum)

    def kill(self) -> None:
        """kill -9 of all its processes."""
        self.send(signal.SIGKILL, *self.workers(), self.process.pid)
        self.process.wait(MAX_SECONDS)

    def end(self) -> int:
        """Wait until the run ends; returns its exit code."""
        try:
            return self.process.wait(MAX_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the run hangs:\n{self.output[-2000:]}") from None


def steps_saved(out_dir: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in out_dir.glob("ckpt_*.pt"))


def first_step(started: Run) -> int:
    """The step that a run resumes at, 0 for a new run."""
    assert started.wait_for("parameters"), started.output
    found = re.search(r"resuming at step (\d+)", started.output)
    return int(found.group(1)) if found else 0


def undisturbed(data: Path, out_dir: Path, processes: int = 1, **options) -> GPT:
    """The model of a run without faults, which is trained unless its folder is there."""
    if not out_dir.exists():
        options = {"save_interval": 1000, "eval_interval": 1000} | options
        started = Run(data, out_dir, processes, **options)
        assert started.end() == 0, started.output[-2000:]
    return checkpoint.load_model(out_dir)


def campaign(n: int, data: Path, folder: Path, rng: random.Random, processes: int = 1) -> dict:
    """Send n signals at random instants to a run, which each time is started again.

    Counts how often it resumes from its newest checkpoint, and how often SIGTERM or SIGINT leave a
    checkpoint of the last step. Then compares with an undisturbed run of as many steps.
    """
    out_dir = folder / f"disturbed_{processes}"
    events = {"SIGKILL": 0, "SIGTERM": 0, "SIGINT": 0}
    if processes > 1:
        events["SIGKILL to one"] = 0
    resumed, saved_last, longest = 0, 0, 0.0
    started = Run(data, out_dir, processes, max_iters=10**6)
    for _ in range(n):
        # one in ten gets its signal while it starts
        if rng.random() < 0.9:
            started.wait_for(STEP)
        time.sleep(rng.uniform(0, 1.5))
        event = rng.choice(list(events))
        events[event] += 1
        time_sent = time.monotonic()
        if event == "SIGKILL to one":  # torchrun restarts both
            started.send(signal.SIGKILL, rng.choice(started.workers()))
            started.at = started.log.stat().st_size
        elif event == "SIGKILL":
            started.kill()
        else:
            has_steps = bool(re.search(STEP, started.output))
            started.send(getattr(signal, event))
            started.end()
            longest = max(longest, time.monotonic() - time_sent)
            records = read_records(out_dir / "metrics.jsonl")
            last = max((record["step"] for record in records if "loss" in record), default=0)
            newest = max(steps_saved(out_dir), default=0)
            # a process may end between a step and its record
            saved_last += newest in (last, last + 1) or not has_steps
        newest = max(steps_saved(out_dir), default=0)
        if event != "SIGKILL to one":
            save_interval = rng.choice((1, 1000))
            started = Run(data, out_dir, processes, max_iters=10**6, save_interval=save_interval)
        resumed += first_step(started) >= newest
    started.wait_for(STEP)
    started.send(signal.SIGTERM)
    started.end()
    steps = steps_saved(out_dir)[-1]
    reference = undisturbed(data, folder / f"calm_{processes}", processes, max_iters=steps)
    return {
        "events": events,
        "resumed_from_the_newest_checkpoint": resumed,
        "saved_the_last_step": saved_last,
        "longest_seconds_to_end": round(longest, 2),
        "steps": steps,
        "same_weights_as_undisturbed": same_weights(checkpoint.load_model(out_dir), reference),
    }


def documents(n: int = 400) -> list[str]:
    """Texts of very different lengths, some longer than a file of SHARD tokens."""
    lengths = np.random.default_rng(0).lognormal(4, 1.5, n) + 1
    return [f"{i}: " + words(int(length), seed=i) for i, length in enumerate(lengths)]


def token_files(folder: Path) -> dict[str, str]:
    """Every token file and its hash."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.bin"))
    }


def main() -> None:
    config, _ = load_config(FaultConfig, sys.argv[1:])
    path = ROOT / "training_logs" / "reliability.json"
    for name, n in vars(config).items():
        if name != "seed" and n:
            with tempfile.TemporaryDirectory() as folder:
                data = write_words(Path(folder) / "words")
                processes = 2 if name == "two_processes" else 1
                counts = campaign(n, data, Path(folder), random.Random(config.seed), processes)
            counts["date"] = str(datetime.date.today())
            counts |= environment()
            write_json(path, read_json(path) | {name: counts})
            print(name, counts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_main(main)
