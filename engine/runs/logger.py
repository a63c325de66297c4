"""What a run reports: one line on screen and the same record as JSON, on a terminal a progress bar, wandb if asked."""

import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from engine.base.distributed import Processes, peak_flops
from engine.base.errors import UserError
from engine.base.files import atomic_write

# a record's fields as wandb groups them; all others are train/. val/ compares heads; what is under objective/ does not:
# it is what a head minimises, in a unit of its own
CHARTS = {name: name for name in ("step", "tokens", "seconds")}
CHARTS |= {name: name.replace("_", "/") for name in ("val_nll", "val_perplexity", "val_ece")}
CHARTS |= {"loss": "objective/train_loss", "val_loss": "objective/val_loss"}
# tqdm's own time left follows the newest records alone: it jumps at each evaluation and checkpoint
BAR = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Logger:
    """Writes records of the main process (on the others it only keeps time). It keeps progress.seconds, and reads how
    far the run is from progress.step and progress.tokens."""

    def __init__(
        self,
        out_dir: Path,
        processes: Processes,
        tokens_per_step: int,
        flops_per_token: float,
        progress,
        max_iters: int,
    ):
        self.is_main, self.tokens_per_step, self.max_iters = (
            processes.is_main,
            tokens_per_step,
            max_iters,
        )
        self.flops_per_token, self.peak_flops = (
            flops_per_token,
            peak_flops(processes.device) * processes.world_size,
        )
        self.progress, self.clock = progress, time.perf_counter()
        self.begun, self.first = self.clock, progress.step  # for the time left
        self.last_step, self.last_seconds = progress.step, progress.seconds
        self.wandb = None
        if self.is_main:
            self.path = out_dir / "metrics.jsonl"
            self.file = open(self.path, "a")  # noqa: SIM115  closed in close()
            show = sys.stderr.isatty()
            self.bar = tqdm(
                total=max_iters,
                initial=progress.step,
                disable=not show,
                dynamic_ncols=True,
                bar_format=BAR,
            )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training and must not count as its time."""
        self._tick()
        yield
        self.clock = time.perf_counter()

    def training(self, loss: float, lr: float, grad_norm: float) -> None:
        """A training record: loss is of the last step, speed of all since the record before. Speed is of training; the
        time left counts evaluations and checkpoints as often as there have been so far."""
        self._tick()
        step, total = self.progress.step, self.progress.seconds
        steps, seconds = step - self.last_step, total - self.last_seconds
        self.last_step, self.last_seconds = step, total
        speed = steps * self.tokens_per_step / seconds
        mfu = speed * self.flops_per_token / self.peak_flops
        left = (self.max_iters - step) * (self.clock - self.begun) / (step - self.first)
        if self.is_main:
            self.bar.set_postfix_str(f"{clock_time(left)} left", refresh=False)
        record = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": speed}
        record |= {"mfu": mfu} if math.isfinite(mfu) else {}
        record |= {"skipped": self.progress.skipped} if self.progress.skipped else {}
        line = (
            f"loss {loss:.4f} | lr {lr:.2e} | grad norm {grad_norm:.2f} | {speed:,.0f} tokens/s | "
        )
        self._write(
            record,
            line + (f"mfu {mfu:.1%} | " if "mfu" in record else "") + f"{clock_time(left)} left",
        )

    def skipped(self, loss: float, grad_norm: float) -> None:
        """Count a step that was left out, and write it down."""
        self.progress.skipped += 1
        values = {"skipped_loss": str(loss), "skipped_grad_norm": str(grad_norm)}  # JSON has no nan
        text = f"left out: loss {loss}, grad norm {grad_norm} ({self.progress.skipped} so far)"
        self._write(values | {"skipped": self.progress.skipped}, text)

    def evaluation(self, scores: dict[str, float]) -> None:
        """An evaluation record."""
        parts = [
            f"{name[4:]} {value:{'.5g' if 'perplexity' in name else '.4f'}}"
            for name, value in scores.items()
        ]
        self._write(scores, "val " + " | ".join(parts))  # each is named val_...

    def say(self, text: str) -> None:
        if self.is_main:
            try:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:  # whoever read along is gone; the records are in metrics.jsonl
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def start_wandb(self, out_dir: Path, **about) -> None:
        """Open a wandb run, with the code that out_dir holds; about: options of wandb.init. What goes wrong with wandb
        is said once and never stops training."""
        if not self.is_main:
            return
        try:
            import wandb

            mode = os.environ.get("WANDB_MODE") or ("online" if _has_key(wandb) else "offline")
            known = self.progress.wandb_id or None  # a resumed run goes on in the same charts
            self.wandb = wandb.init(**about, dir=out_dir, mode=mode, id=known, resume="allow")
            self.progress.wandb_id, self.next_step = self.wandb.id, self.wandb.starting_step
            for group in ("train", "val", "objective"):
                self.wandb.define_metric(f"{group}/*", step_metric="tokens")
            self.wandb.define_metric("val/nll", step_metric="tokens", summary="min")
            for path in sorted(out_dir.glob("code*.zip")):
                shutil.copy(path, self.wandb.dir)  # wandb.save would make a link, and warn of it
            for record in read_records(
                self.path
            ):  # of a resumed run: what wandb lacks, offline all
                self._chart(record)
        except (
            Exception
        ) as error:  # a third party's service: any failure of it must not cost a training run
            self.wandb = None
            self.say(
                f"warning: wandb does not start ({type(error).__name__}: {error}); going on without it"
            )
        # a service that does not answer takes a minute, which is no training
        self.begun = self.clock = time.perf_counter()

    def close(self) -> None:
        if self.is_main:
            self.bar.close()
            with contextlib.suppress(OSError):  # what did not fit has been said, see _write
                self.file.close()
            if self.wandb is not None:
                try:
                    self.wandb.finish()
                except Exception as error:  # see start_wandb
                    self.say(f"warning: wandb fails ({type(error).__name__}: {error})")

    def _tick(self) -> None:
        now = time.perf_counter()
        self.progress.seconds, self.clock = self.progress.seconds + now - self.clock, now

    def _write(self, values: dict, line: str) -> None:
        if not self.is_main:
            return
        record = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            **values,
            "seconds": self.progress.seconds,
        }
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self.path} ({error.strerror}); make room and resume the run"
            ) from None
        self.bar.update(record["step"] - self.bar.n)
        self.say(f"step {record['step']:>{len(str(self.max_iters))}}/{self.max_iters} | {line}")
        if self.wandb is not None:
            try:
                self._chart(record)
            except Exception as error:  # see start_wandb
                self.say(
                    f"warning: wandb fails ({type(error).__name__}: {error}); going on without it"
                )
                self.wandb = None

    def _chart(self, record: dict) -> None:
        """Send a record to wandb, whose steps cannot go back: those that a resumed run repeats are left as they are."""
        if record["step"] >= self.next_step:
            self.next_step = record["step"]
            charts = {CHARTS.get(name, f"train/{name}"): value for name, value in record.items()}
            self.wandb.log(charts, step=record["step"])


def _has_key(wandb) -> bool:
    """Whether wandb can log in, in the environment or in ~/.netrc; it asks nobody."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(wandb.login(prompt=False))
    except (
        AttributeError,
        TypeError,
    ):  # an older wandb, whose login would ask; newer ones warn of wandb.api
        return bool(getattr(getattr(wandb, "api", None), "api_key", None))
    except Exception:  # a key that wandb refuses is none
        return False


def clock_time(seconds: float) -> str:
    """h:mm:ss"""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


PACKAGES = ("numpy", "tokenizers", "tiktoken")


def environment() -> dict[str, str]:
    """What a number depends on beside the options: code ("-dirty": with changes that are not committed), versions,
    machine."""
    here, git, commit = (
        Path(__file__),
        {"capture_output": True, "text": True, "cwd": Path(__file__).parent},
        "",
    )
    with contextlib.suppress(OSError):  # no git on this machine
        # an unpacked copy may lie in a repository of something else, which does not know this file
        if subprocess.run(["git", "ls-files", "--error-unmatch", here.name], **git).returncode == 0:
            commit = subprocess.run(
                ["git", "describe", "--always", "--dirty"], **git
            ).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "commit": commit or "unknown",
        "torch": torch.__version__,
        **versions,
        **({"cuda": torch.version.cuda} if torch.version.cuda else {}),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
        "gpu": gpu,
    }


def read_records(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a line that a killed run left unfinished, or a damaged one, is passed over."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(record := json.loads(line), dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def forget_after(path: Path, step: int) -> None:
    """Drop the records that a resumed run will write again: later ones, and the evaluation of this very step."""
    kept = [
        r
        for r in read_records(path)
        if r["step"] < step or (r["step"] == step and "val_nll" not in r)
    ]
    atomic_write(
        path,
        lambda temporary: temporary.write_text(
            "".join(json.dumps(record) + "\n" for record in kept)
        ),
    )
