"""What of a run survives: copies of its state, written while it goes on."""

import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from engine.base.errors import Interrupted, UserError
from engine.base.files import atomic_write, flush, sha256_of
from engine.base.sharding import is_sharded, load_optimizer, whole, whole_model
from engine.runs.checkpoint import all_in, check_zip, name_of, read_sums, write_sums

KEEP = 2  # newest checkpoints kept beside the best one


class Saver:
    """Writes a run's checkpoints in the background, one at a time, and lets the old ones go.

    Only what this run has written and read back, or was loaded from, counts among the KEEP; all others go once there
    are as many: a damaged file does not take a good one's place. As a context it ends with all on the disk, and when
    the run is interrupted it saves first.
    """

    def __init__(self, processes, progress, model, optimizer, scaler, about: dict):
        self.processes, self.progress, self.about = processes, progress, about
        self.out_dir = Path(about["config"]["out_dir"])
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.sharded = is_sharded(model)  # now: behind a forward pass they may lie there whole
        self.saved, self.good = progress.step, [name_of(progress.step)] if progress.step else []
        self.thread, self.pending = ThreadPoolExecutor(1), Future()
        self.pending.set_result(None)

    def restore(self, state: dict) -> None:
        """Load optimiser and loss scale of a checkpoint, if there is one; the model has its weights already."""
        self.processes.check_same(self.progress.step, "the step to go on from")
        try:
            if state:
                load_optimizer(self.optimizer, state["optimizer"])
            if state.get("scaler") and self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"the checkpoint in {self.out_dir} has no optimiser of this model: {error}"
            ) from None

    def save(self) -> None:
        """Take a copy of all and start to write it; nothing to do where this step is saved already."""
        if self.progress.step == self.saved:
            return
        self.pending.result()  # the write before has to be done, and raises here what went wrong
        if self.processes.is_main or self.sharded:
            parts = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            keep = self.processes.is_main
            state = {"model": whole_model(self.model, keep)} | whole(parts, keep)
        if self.processes.is_main:
            self.pending = self.thread.submit(
                self._write, state | self.about | asdict(self.progress)
            )
        self.saved = self.progress.step

    def stepped(self) -> None:
        """A step is done: there is something to save, and a write that failed is said now."""
        self.processes.watch.catch_signals()
        if self.pending.done():
            self.pending.result()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, error, _) -> None:
        interrupted = isinstance(error, Interrupted)
        try:
            if interrupted and not self.about["config"]["eval_only"]:
                self.save()
            if interrupted or kind is None:
                self.pending.result()
                self.processes.wait_for_all()  # torchrun ends all as soon as one is gone
            if interrupted and self.processes.is_main:
                saved = (
                    f"{self.out_dir / name_of(self.saved)} holds it; "
                    if self.saved
                    else "nothing to save; "
                )
                print(
                    f"interrupted at step {self.saved}: {saved}go on with --init_from=auto",
                    file=sys.stderr,
                )
        finally:
            self.thread.shutdown()

    def _write(self, state: dict) -> None:
        path = self.out_dir / name_of(state["step"])
        try:
            atomic_write(
                path, lambda temporary: self._write_and_read_back(temporary, path.name, state)
            )
            self.good = [name for name in self.good if name != path.name] + [path.name]
            if len(self.good) >= KEEP:
                kept = {*self.good[-KEEP:], name_of(state["best_step"])}
                for old in all_in(self.out_dir):
                    if old.name not in kept:
                        old.unlink()
            sums = read_sums(self.out_dir)
            write_sums(
                self.out_dir,
                {name: sums[name][:1] for name in sums if (self.out_dir / name).exists()},
            )
        except (
            OSError,
            RuntimeError,
            ValueError,
        ) as error:  # torch's zip writer turns a full disk into a RuntimeError
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:150]
            raise UserError(
                f"cannot write {path} ({reason}; {shutil.disk_usage(self.out_dir).free >> 20:,} MiB free); the earlier "
                "checkpoints are untouched: make room and go on with --init_from=resume"
            ) from None

    def _write_and_read_back(self, temporary: Path, name: str, state: dict) -> None:
        beat = self.processes.watch.beat  # who waits for a large file on a slow disk does not hang
        torch.save(state, str(temporary))  # from a path torch writes without the GIL
        beat()
        flush(temporary)
        beat()
        sha256 = sha256_of(temporary, from_disk=True)
        beat()
        check_zip(temporary)
        beat()
        sums = read_sums(
            self.out_dir
        )  # a file of this name that is there keeps its line until it is replaced
        write_sums(self.out_dir, sums | {name: [sha256, *sums.get(name, [])]})
