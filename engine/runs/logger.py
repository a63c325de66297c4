"""Report a run: each record is a line on screen, a line of JSON and, if asked, goes to wandb."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch

from engine.base.distributed import Processes, peak_flops
from engine.base.errors import UserError
from engine.base.files import write_text

# a record's fields -> their names in wandb; all others begin with train/. val/ compares heads.
# objective/ does not: it is the loss that a head minimises, in its own unit
CHARTS = {
    "step": "step",
    "tokens": "tokens",
    "seconds": "seconds",
    "val_nll": "val/nll",
    "val_perplexity": "val/perplexity",
    "val_ece": "val/ece",
    "val_loss": "objective/val_loss",
    "loss": "objective/train_loss",
}


class Logger:
    """Writes records on the main process; on the others it only counts progress.seconds."""

    def __init__(
        self,
        out_dir: Path,
        processes: Processes,
        tokens_per_step: int,
        flops_per_token: float,
        progress,
        max_iters: int,
    ):
        self.is_main, self.device = processes.is_main, processes.device
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.peak_flops = peak_flops(processes.device) * processes.world_size
        self.progress, self.max_iters = progress, max_iters
        self.start_step, self.last_step = progress.step, progress.step
        self.last_seconds = progress.seconds
        self.start_time = self.clock = time.perf_counter()
        self.path, self.wandb = out_dir / "metrics.jsonl", None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time in this block does not count as training."""
        self._count_seconds()
        yield
        self.clock = time.perf_counter()

    def training(self, loss: float, lr: float, grad_norm: float) -> None:
        """Write a training record: the loss of the last step, the speed since the last record.

        The speed is of training only. The time left includes evaluations and checkpoints.
        """
        self._count_seconds()
        step, seconds = self.progress.step, self.progress.seconds
        n_tokens = (step - self.last_step) * self.tokens_per_step
        speed = n_tokens / (seconds - self.last_seconds)
        self.last_step, self.last_seconds = step, seconds
        seconds_per_step = (self.clock - self.start_time) / (step - self.start_step)
        left = timedelta(seconds=int((self.max_iters - step) * seconds_per_step))
        record = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": speed}
        line = f"loss {loss:.4f} | lr {lr:.2e} | grad norm {grad_norm:.2f} | {speed:,.0f} tokens/s"
        mfu = speed * self.flops_per_token / self.peak_flops
        if math.isfinite(mfu):
            record["mfu"] = mfu
            line += f" | mfu {mfu:.1%}"
        if self.device.type == "cuda":
            peak = record["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            line += f" | {peak:.2f} GB"
        if self.progress.skipped:
            record["skipped"] = self.progress.skipped
        self._write(record, f"{line} | {left} left")

    def skipped(self, loss: float, grad_norm: float) -> None:
        """Write a record of a step without an update."""
        record = {"skipped_loss": str(loss), "skipped_grad_norm": str(grad_norm)}  # JSON has no nan
        record["skipped"] = self.progress.skipped
        line = f"skipped: loss {loss}, grad norm {grad_norm} ({self.progress.skipped} so far)"
        self._write(record, line)

    def evaluation(self, scores: dict[str, float]) -> None:
        """Write an evaluation record; scores: val_..."""
        parts = []
        for name, value in scores.items():
            digits = ".5g" if "perplexity" in name else ".4f"
            parts.append(f"{name.removeprefix('val_')} {value:{digits}}")
        self._write(scores, "val " + " | ".join(parts))

    def say(self, text: str) -> None:
        """Print a line on the main process."""
        if self.is_main:
            try:
                print(text, flush=True)
            except BrokenPipeError:  # the reader of a pipe has ended; training continues
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def start_wandb(self, out_dir: Path, **options) -> None:
        """Open a wandb run; options: wandb.init's."""
        if self.is_main:
            with self._wandb_may_fail():
                import wandb

                run_id = self.progress.wandb_id or None  # a resumed run continues its charts
                self.wandb = wandb.init(**options, dir=out_dir, id=run_id, resume="allow")
                self.progress.wandb_id = self.wandb.id
                for group in ("train", "val", "objective"):
                    self.wandb.define_metric(f"{group}/*", step_metric="tokens")
        # waiting for an unreachable service takes a minute, which is not training
        self.start_time = self.clock = time.perf_counter()

    def close(self) -> None:
        if self.wandb is not None:
            with self._wandb_may_fail():
                self.wandb.finish()

    def _count_seconds(self):
        now = time.perf_counter()
        self.progress.seconds += now - self.clock
        self.clock = now

    def _write(self, values, line):
        if not self.is_main:
            return
        progress = self.progress
        record = {"step": progress.step, "tokens": progress.tokens, **values}
        record["seconds"] = progress.seconds
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.path} ({error.strerror}); free some space and resume the run"
            ) from None
        self.say(f"step {progress.step:>{len(str(self.max_iters))}}/{self.max_iters} | {line}")
        if self.wandb is not None:
            charts = {CHARTS.get(name, f"train/{name}"): value for name, value in record.items()}
            with self._wandb_may_fail():
                self.wandb.log(charts, step=progress.step)  # wandb passes over a step that it has

    @contextlib.contextmanager
    def _wandb_may_fail(self):
        """A failure of wandb prints one warning and does not stop training."""
        try:
            yield
        except Exception as error:
            self.wandb = None
            self.say(f"warning: training without wandb ({type(error).__name__}: {error})")


def read_records(path: Path) -> list[dict]:
    """The records of a metrics.jsonl. Ignores damaged lines, which a killed run may leave."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def forget_after(path: Path, step: int) -> None:
    """Drop the records that a resumed run writes again: later ones, and this step's evaluation."""
    kept = []
    for record in read_records(path):
        if record["step"] < step or (record["step"] == step and "val_nll" not in record):
            kept.append(json.dumps(record) + "\n")
    write_text(path, "".join(kept))
