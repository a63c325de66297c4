"""Faults on purpose: runs that are killed, told to end, or find their checkpoints damaged, and what
becomes of them.

    # make reliability, 20 minutes
    python -m tests.faults --kills=100 --corruptions=40 --signals=50 --preparations=50
    # what a checkpoint of 124M costs the loop
    python -m tests.faults --stalls=5
    # make soak: an hour and the undisturbed run
    python -m tests.faults --soak=3600

Each writes what it counted into training_logs/reliability.json. The tests run short forms of all.
"""

import contextlib
import datetime
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train
from engine.base.distributed import Processes
from engine.base.errors import UserError, run_main
from engine.base.optim import make_optimizer
from engine.base.options import load_config
from engine.runs import checkpoint
from engine.runs.banner import environment
from engine.runs.logger import read_records
from engine.runs.saver import Saver
from model import GPT, GPTConfig
from tests.helpers import ROOT, TINY, flags, same_weights, words, write_words

# a step takes some 10 ms, a third of a run is evaluation, a checkpoint is always being written
OPTIONS = TINY | {
    "gradient_accumulation_steps": 2,
    "batch_size": 4,
    "dropout": 0.1,
    "weights": "bayes",
}
OPTIONS |= {
    "max_iters": 400,
    "lr_decay_iters": 400,
    "eval_interval": 10,
    "eval_iters": 20,
    "save_interval": 1,
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SHARD = 20_000  # tokens of a file that preparations() writes
LAST_WORDS = 600.0  # seconds until a run that does not end counts as hung


@dataclass(frozen=True)
class FaultConfig:
    kills: int = 0  # kill -9 at so many random instants
    corruptions: int = 0  # damage the newest checkpoint so many times
    signals: int = 0  # SIGTERM or SIGINT at so many random instants
    preparations: int = 0  # kill -9 of a preparation of data at so many random instants
    stalls: int = 0  # save a 124M model so many times, and time it
    soak: int = 0  # seconds of kills and signals on two processes
    seed: int = 0  # of the instants


# children of a server that has imported torch once: they start at once
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "tests.helpers"])


class Forked:
    """train.py with these flags in a forked child; in its use like subprocess.Popen."""

    def __init__(self, argv: list[str], log: Path, main: Callable[[], None] = train.main):
        self.child = FORKS.Process(target=in_child, args=(argv, log, main), daemon=True)
        self.child.start()
        self.pid = self.child.pid

    def poll(self) -> int | None:
        return self.child.exitcode

    @property
    def returncode(self) -> int | None:
        return self.child.exitcode

    def wait(self, timeout: float) -> int:
        self.child.join(timeout)
        if self.child.exitcode is None:
            raise subprocess.TimeoutExpired("train.py", timeout)
        return self.child.exitcode

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)


def in_child(argv: list[str], log: Path, main: Callable[[], None]) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train.py", *argv]
    main()


class Run:
    """train.py in a child, or in two under torchrun, which resumes what is in its folder."""

    def __init__(
        self,
        data: Path,
        out_dir: Path,
        processes: int = 1,
        log: Path | None = None,
        main: Callable[[], None] = train.main,
        restarts: int = 5,
        **options,
    ):
        options = OPTIONS | {"dataset": data, "out_dir": out_dir, "init_from": "auto"} | options
        self.log = log or out_dir.with_suffix(".log")
        self.at = self.log.stat().st_size if self.log.exists() else 0
        if processes == 1:
            self.process = Forked(flags(**options), self.log, main)
            return
        launch = [sys.executable, *TORCHRUN, f"--max-restarts={restarts}"]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [*launch, str(ROOT / "train.py"), *flags(**options)],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What this process has printed."""
        if not self.log.exists():
            return ""
        with open(self.log) as log:
            log.seek(self.at)
            return log.read()

    def wait_for(self, text: str) -> bool:
        """Until it has printed the text (a pattern), or has ended without."""
        end = time.monotonic() + LAST_WORDS
        while time.monotonic() < end:
            if re.search(text, self.output):
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.02)
        raise AssertionError(f"{LAST_WORDS} s without {text!r}:\n{self.output[-2000:]}")

    def workers(self) -> list[int]:
        """The processes that train, in the order of their ranks; itself where there is no
        torchrun.
        """
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[1]) == self.process.pid:
                    found.append(int(stat.parent.name))
        return sorted(found) or [self.process.pid]

    def kill(self) -> None:
        """kill -9 of all its processes."""
        for pid in {*self.workers(), self.process.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(LAST_WORDS)

    def ended(self) -> tuple[int, float]:
        """Exit code, and the seconds until it came."""
        started = time.monotonic()
        try:
            return self.process.wait(LAST_WORDS), time.monotonic() - started
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"it did not end in {LAST_WORDS} s:\n{self.output[-2000:]}"
            ) from None


def steps_saved(out_dir: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in out_dir.glob("ckpt_*.pt"))


def begins_at(started: Run) -> int:
    """The step that a run goes on from; 0 where it begins."""
    assert started.wait_for("parameters"), started.output
    found = re.search(r"resuming at step (\d+)", started.output)
    return int(found.group(1)) if found else 0


def finished(data: Path, out_dir: Path, reference, processes: int = 1) -> bool:
    """Let a run go on to its end: whether it has the weights of the undisturbed one, and left no
    rubbish.
    """
    code, _ = Run(data, out_dir, processes, save_interval=50).ended()
    return (
        code == 0
        and same_weights(checkpoint.load_model(out_dir), reference)
        and not list(out_dir.glob("*.tmp"))
    )


def undisturbed(data: Path, folder: Path, processes: int = 1, **options):
    """The model of a run that nothing happens to."""
    code, _ = Run(
        data, folder, processes, save_interval=1000, eval_interval=1000, **options
    ).ended()
    assert code == 0, (folder.with_suffix(".log")).read_text()[-2000:]
    return checkpoint.load_model(folder)


def kills(n: int, data: Path, folder: Path, rng: random.Random) -> dict:
    """kill -9 at random instants of a run that saves at each step: how often the next start resumes
    from the newest checkpoint that was whole, and whether the runs end as undisturbed ones.
    """
    reference, out_dir = undisturbed(data, folder / "reference"), folder / "killed_0"
    resumed, ended, same = 0, 0, 0
    started = Run(data, out_dir)
    for i in range(n):
        if rng.random() < 0.9 and started.wait_for("step +[0-9]+/"):  # the others while it starts
            time.sleep(rng.uniform(0, 1.5))
        else:
            time.sleep(rng.uniform(0, 2.5))
        if started.process.poll() is not None:
            assert started.process.returncode == 0, started.output
            ended += 1
            same += same_weights(checkpoint.load_model(out_dir), reference)
            out_dir = folder / f"killed_{i}"
            started = Run(data, out_dir)
            started.wait_for("step +[0-9]+/")
        started.kill()
        newest = max(steps_saved(out_dir), default=0)
        started = Run(data, out_dir)
        resumed += begins_at(started) == newest
    started.ended()
    same += same_weights(checkpoint.load_model(out_dir), reference)
    return {
        "kills": n,
        "resumed": resumed,
        "runs_finished": ended + 1,
        "with_the_undisturbed_weights": same,
    }


def corruptions(n: int, data: Path, folder: Path, rng: random.Random) -> dict:
    """Cut the newest checkpoint short, or flip one bit of it: how often the one before is used,
    with a warning, and the damaged one refused by name. A bit between the parts of the file may
    change nothing that is read.
    """
    Run(data, folder / "run", max_iters=20, save_interval=10).ended()
    before, newest = (folder / "run" / checkpoint.name_of(step) for step in (10, 20))
    good, passed_over, refused, harmless = newest.read_bytes(), 0, 0, 0
    whole = checkpoint.load_model(newest)
    for i in range(n):
        at = rng.randrange(len(good))
        flipped = good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :]
        newest.write_bytes(good[:at] if i % 2 else flipped)
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            state = checkpoint.read_newest(newest.parent)
        if not printed.getvalue() and same_weights(checkpoint.load_model(newest), whole):
            harmless += 1
            continue
        named = printed.getvalue().startswith(f"warning: {newest} is not a good checkpoint")
        passed_over += named and state["step"] == int(before.stem[5:])
        try:
            checkpoint.read(newest)
        except UserError:
            refused += 1
    newest.write_bytes(good[:at])
    code, _ = Run(data, folder / "run", max_iters=30, lr_decay_iters=400).ended()
    undamaged = undisturbed(data, folder / "reference", max_iters=30)
    return {
        "corruptions": n,
        "harmless": harmless,
        "passed_over": passed_over,
        "refused_by_name": refused,
        "same_end": code == 0 and same_weights(checkpoint.load_model(folder / "run"), undamaged),
    }


def signals(n: int, data: Path, folder: Path, rng: random.Random) -> dict:
    """SIGTERM or SIGINT at random instants, to one process, to torchrun, or to one of its two
    processes: how often the checkpoint is of the last step, and how long the end takes.
    """
    ok, times, same = 0, [], []
    references = {
        k: undisturbed(data, folder / f"reference_{k}", k) for k in {1, 2 if n > 1 else 1}
    }
    for i in range(n):
        processes = 1 + i % 2
        out_dir = folder / f"signalled_{processes}"
        if steps_saved(out_dir)[-1:] == [OPTIONS["max_iters"]]:
            same.append(same_weights(checkpoint.load_model(out_dir), references[processes]))
            shutil.rmtree(out_dir)
        started = Run(data, out_dir, processes, save_interval=1000)
        assert started.wait_for("step +[0-9]+/"), started.output
        time.sleep(rng.uniform(0, 2.0))
        signum = rng.choice((signal.SIGTERM, signal.SIGINT))
        to_worker = processes > 1 and rng.random() < 0.5
        with contextlib.suppress(ProcessLookupError):  # it may have come to its end
            os.kill(rng.choice(started.workers()) if to_worker else started.process.pid, signum)
        code, seconds = started.ended() if not to_worker else (0, 0.0)
        if to_worker:  # torchrun starts both again, which go on
            assert started.wait_for("interrupted at step|step 400/400 . val"), started.output
            started.process.send_signal(signal.SIGTERM)
            code, seconds = started.ended()
        steps = [
            record["step"] for record in read_records(out_dir / "metrics.jsonl") if "loss" in record
        ]
        last, newest = max(steps, default=0), max(steps_saved(out_dir), default=0)
        good = last - newest in (0, 1) or newest > last
        ok += good and (code != 0 or newest == OPTIONS["max_iters"])
        times.append(seconds)
        if not good:
            print(
                f"signal {i}: {processes=} {signum=} {to_worker=} {code=} {last=} {newest=}\n"
                f"{started.output[-1500:]}"
            )
    for processes, reference in references.items():
        out_dir = folder / f"signalled_{processes}"
        if out_dir.exists():
            same.append(finished(data, out_dir, reference, processes))
    return {
        "signals": n,
        "checkpoint_at_most_one_step_old": ok,
        "seconds_to_end": {
            "median": round(sorted(times)[n // 2], 2),
            "longest": round(max(times), 2),
        },
        "runs_finished": len(same),
        "with_the_undisturbed_weights": sum(same),
    }


def documents(n: int = 400) -> list[str]:
    """Texts of very different lengths, some longer than a file of SHARD tokens."""
    lengths = np.random.default_rng(0).lognormal(4, 1.5, n) + 1
    return [f"{i}: " + words(int(length), seed=i) for i, length in enumerate(lengths)]


def preparing(source: Path, folder: Path, **options) -> list[str]:
    """The command that prepares a text of documents() with two threads."""
    options = {"source": source, "folder": folder, "shard_tokens": SHARD} | options
    options |= {"num_proc": 2, "tokenizer": "byte"}
    return [
        sys.executable,
        str(ROOT / "data" / "text" / "prepare.py"),
        "--separator=\\n\\n",
        *flags(**options),
    ]


def token_files(folder: Path) -> dict[str, str]:
    """Every token file and its hash."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.bin"))
    }


def journals(folder: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):  # it ends just now
        return [path.read_text() for path in folder.glob(".preparing-*/journal.json")]
    return []


def preparations(n: int, data: Path, folder: Path, rng: random.Random) -> dict:
    """kill -9 at random instants of a preparation: how often what the journal names stays untouched
    by the next start, and whether the token files are in the end those of an undisturbed one.
    """
    source, out, pipe = folder / "tales.txt", folder / "killed", subprocess.PIPE
    source.write_text("\n\n".join([*documents() * 30, words(100_000)]))
    subprocess.run(preparing(source, folder / "calm", shard_tokens=100_000), check=True)
    killed, behind_a_file, untouched, ended, same, whole = 0, 0, 0, 0, 0, {}
    while killed < n or not ended:
        process = subprocess.Popen(
            preparing(source, out, shard_tokens=100_000), stdout=pipe, stderr=pipe, text=True
        )
        if rng.random() < 0.8:  # the others while it starts
            before = journals(out)
            while process.poll() is None and before == journals(out):
                time.sleep(0.01)
        try:
            _, said = process.communicate(timeout=rng.uniform(0, 1.0))
            assert process.returncode == 0, said
            ended += 1
            same += token_files(out) == token_files(folder / "calm") and not list(out.glob(".*"))
            shutil.rmtree(out)
            whole = {}
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
            earlier, whole = whole, {}
            for journal in journals(out):
                splits = json.loads(journal).get("splits", {})
                shards = [shard for split in splits.values() for shard in split["shards"]]
                paths = [
                    path for shard in shards for path in out.glob(f".preparing-*/{shard['file']}")
                ]
                whole = {path: path.stat().st_mtime_ns for path in paths}
            if earlier:
                behind_a_file += 1
                found = journals(out)
                all_done = not found or "meta" in json.loads(found[0])
                untouched += bool(all_done or earlier.items() <= whole.items())
    found = {
        "kills": killed,
        "behind_a_whole_file": behind_a_file,
        "which_stayed_untouched": untouched,
    }
    return found | {"preparations_finished": ended, "with_the_undisturbed_files": same}


def stalls(
    n: int, data: Path, folder: Path, rng: random.Random, shape: GPTConfig | None = None
) -> dict:
    """Seconds that saving a 124M model and its optimiser keeps the loop, seconds until it is on the
    disk, and how much longer matrix products take meanwhile.
    """
    model = GPT(shape or GPTConfig(vocab_size=50257))
    optimizer = make_optimizer(model, 1e-3, (0.9, 0.95), 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    progress, about = train.Progress(), {"config": {"out_dir": str(folder)}}
    scaler, one = torch.amp.GradScaler("cpu", enabled=False), Processes(torch.device("cpu"))
    a, held, written, slower = torch.randn(2000, 2000), [], [], []

    def steps_per_second(until) -> float:
        steps, started = 0, time.perf_counter()
        while not until(time.perf_counter() - started):
            torch.mm(a, a)
            steps += 1
        return steps / (time.perf_counter() - started)

    with Saver(one, progress, model, optimizer, scaler, about) as saver:
        for _ in range(n):
            progress.step += 1
            started = time.perf_counter()
            saver.save()
            held.append(time.perf_counter() - started)
            busy = steps_per_second(lambda _: saver.pending.done())
            written.append(time.perf_counter() - started)
            slower.append(steps_per_second(lambda seconds: seconds > 5) / busy)
    size = (folder / checkpoint.name_of(n)).stat().st_size
    median = {
        name: round(sorted(v)[n // 2], 3)
        for name, v in (("held", held), ("until_written", written))
    }
    return {
        "saves": n,
        "bytes": size,
        "median_seconds": median,
        "steps_slower_meanwhile": round(sorted(slower)[n // 2], 2),
    }


def soak(seconds: int, data: Path, folder: Path, rng: random.Random, apart: int = 2000) -> dict:
    """Two processes under torchrun for so long, with kills and signals to one or all; beside them
    two that nothing happens to, whose weights are kept every `apart` steps to compare with.
    """
    events = {"kill one": 0, "kill all": 0, "SIGTERM": 0, "SIGINT": 0}
    end, out_dir, options = (
        time.monotonic() + seconds,
        folder / "soak",
        {"max_iters": 10**6, "save_interval": 5},
    )
    calm = {"max_iters": 10**6, "save_interval": apart, "eval_interval": 10**6}
    kept, reference = folder / "kept", Run(data, folder / "reference", 2, **calm)
    for pid in (reference.process.pid, *reference.workers()):
        os.setpriority(os.PRIO_PROCESS, pid, 10)  # what it starts inherits that
    kept.mkdir()
    enough = threading.Event()
    keeper = threading.Thread(
        target=keep_all, args=(folder / "reference", kept, enough), daemon=True
    )
    keeper.start()
    started = Run(data, out_dir, 2, **options)
    while time.monotonic() < end:
        if not started.wait_for("step +[0-9]+/"):  # more restarts than torchrun was told to make
            started = Run(data, out_dir, 2, **options)
            continue
        time.sleep(rng.uniform(0, 4))
        event = rng.choice(list(events))
        events[event] += 1
        if event == "kill one":
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(started.workers()), signal.SIGKILL)
            started.at = started.log.stat().st_size  # what torchrun starts anew speaks from here on
            continue
        if event == "kill all":
            started.kill()
        else:
            started.process.send_signal(getattr(signal, event))
            started.ended()
        started = Run(data, out_dir, 2, **options)
    started.process.send_signal(signal.SIGTERM)
    started.ended()
    steps = -(-max(steps_saved(out_dir)) // apart) * apart
    code, _ = Run(
        data, out_dir, 2, **options | {"max_iters": steps, "save_interval": apart}
    ).ended()
    while not (kept / checkpoint.name_of(steps)).exists() and reference.process.poll() is None:
        time.sleep(0.2)
    enough.set()
    reference.kill()
    same = code == 0 and same_weights(
        *(checkpoint.load_model(f / checkpoint.name_of(steps)) for f in (out_dir, kept))
    )
    return {
        "seconds": seconds,
        "events": events,
        "steps": steps,
        "same_weights_as_undisturbed": same,
    }


def keep_all(folder: Path, kept: Path, enough: threading.Event) -> None:
    """Copy each checkpoint that appears in the folder, before the run lets go of it."""
    while not enough.wait(0.2):
        for path in folder.glob("ckpt_*.pt"):
            if not (kept / path.name).exists():
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(path, kept / "copy")
                    (kept / "copy").rename(kept / path.name)


def main() -> None:
    config, _ = load_config(FaultConfig, sys.argv[1:])
    path = ROOT / "training_logs" / "reliability.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for campaign in (kills, corruptions, signals, preparations, stalls, soak):
        if n := getattr(config, campaign.__name__):
            with tempfile.TemporaryDirectory() as folder:
                data, started = write_words(Path(folder) / "words"), time.time()
                counted = campaign(n, data, Path(folder), random.Random(config.seed))
            counted |= {
                "minutes": round((time.time() - started) / 60, 1),
                "date": str(datetime.date.today()),
            }
            found[campaign.__name__] = counted | {
                name: environment()[name] for name in ("commit", "torch", "cores")
            }
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(campaign.__name__, json.dumps(counted))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_main(main)
