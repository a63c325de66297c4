"""Save a run's checkpoints in the background; load one into optimizer and loss scale."""

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from engine.base.errors import Interrupted, UserError
from engine.base.files import atomic_write
from engine.base.sharding import full_copy, load_optimizer
from engine.runs.checkpoint import check_crc, list_checkpoints, name_of


class Saver:
    """Writes one checkpoint at a time, reads it back, and keeps the newest two and the best.

    As a context it waits at the end for the last write. When the run is interrupted it saves first.
    """

    def __init__(self, processes, progress, model, optimizer, scaler, about: dict):
        """about: what a checkpoint says of its run besides the state and the progress."""
        self.processes, self.progress, self.about = processes, progress, about
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.out_dir = Path(about["config"]["out_dir"])
        self.saved_step = progress.step  # the last checkpoint that was written or resumed from
        self.thread, self.pending = ThreadPoolExecutor(1), Future()
        self.pending.set_result(None)

    def restore(self, state: dict) -> None:
        """Load the optimizer and the loss scale of a checkpoint, {} for none."""
        if state:
            load_optimizer(self.optimizer, state["optimizer"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])

    def save(self) -> None:
        """Copy the state and start to write it, unless this step is saved already."""
        step, previous = self.progress.step, self.saved_step
        if step == previous:
            return
        self.pending.result()  # wait for the write before this one; raises its error
        state = {
            # the parameters themselves, so that full_copy sees which are tied
            "model": self.model.state_dict(keep_vars=True),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        state = full_copy(state, keep=self.processes.is_main)
        if self.processes.is_main:
            state |= self.about | asdict(self.progress)
            kept = {name_of(n) for n in (step, previous, self.progress.best_step)}
            self.pending = self.thread.submit(self._write, state, kept)
        self.saved_step = step

    def stepped(self) -> None:
        """After each step: now there is something to save. Raises the error of a failed write."""
        self.processes.watch.catch_signals()
        if self.pending.done():
            self.pending.result()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, error, _) -> None:
        interrupted = isinstance(error, Interrupted)
        try:
            if interrupted:
                self.save()
            if interrupted or kind is None:
                self.pending.result()
                self.processes.wait_for_all()  # torchrun kills the others as soon as one exits
            if interrupted and self.processes.is_main:
                print(
                    f"interrupted at step {self.saved_step}, which is saved; "
                    "resume with --init_from=auto",
                    file=sys.stderr,
                )
        finally:
            self.thread.shutdown()

    def _write(self, state: dict, kept: set[str]) -> None:
        """Write a checkpoint, then delete all whose names are not in `kept`.

        The newest of the others by name may be damaged, if the run resumed from an earlier one.
        """
        path = self.out_dir / name_of(state["step"])
        try:
            atomic_write(path, lambda temporary: self._write_and_read_back(temporary, state))
            for old in list_checkpoints(self.out_dir):
                if old.name not in kept:
                    old.unlink()
        except (OSError, RuntimeError, ValueError) as error:  # a full disk: torch's RuntimeError
            reason = str(error).splitlines()[0][:150]
            raise UserError(
                f"cannot write {path} ({reason}); the earlier checkpoints are untouched: "
                "make room and resume with --init_from=resume"
            ) from None

    def _write_and_read_back(self, temporary: Path, state: dict) -> None:
        torch.save(state, str(temporary))  # given a path, torch writes without the GIL
        self.processes.watch.beat()  # a large file on a slow disk is no hang
        check_crc(temporary)
