"""Save a run's checkpoints in the background, and restore the optimizer and the loss scale."""

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from engine.base.errors import Interrupted, UserError
from engine.base.files import atomic_write
from engine.base.options import flatten
from engine.base.sharding import full_copy, load_optimizer
from engine.runs.checkpoint import check_crc, list_checkpoints, name_of


class Saver:
    """Writes one checkpoint at a time, reads it back, and keeps the newest two and the best.

    As a context manager it waits for the last write. If the run is interrupted, it saves first.
    """

    def __init__(self, config, data, processes, progress, model, optimizer, scaler):
        """data: the token file of each split."""
        self.processes, self.progress = processes, progress
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.out_dir = Path(config.out_dir)
        self.about = {
            "config": flatten(config),
            "model_config": flatten(config.model),
            "data": {split: file.fingerprint for split, file in data.items()},
        }
        # the last checkpoint that was written or resumed from; max_iters = 0 saves what it started
        self.saved_step = progress.step if config.max_iters else -1
        self.thread, self.pending = ThreadPoolExecutor(1), Future()
        self.pending.set_result(None)

    def restore(self, state: dict) -> None:
        """Load the optimizer and the loss scale from a checkpoint ({}: there is none), and empty
        it: it takes 16 bytes per parameter.
        """
        if state:
            load_optimizer(self.optimizer, state["optimizer"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        state.clear()

    def save(self) -> None:
        """Copy the state and start writing it, unless this step is already saved."""
        step, previous = self.progress.step, self.saved_step
        if step == previous:
            return
        self.pending.result()  # wait for the previous write; raises its error
        state = {
            # the parameters themselves: full_copy must see which are tied
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
        """Call after each step, when there is something to save. Raises a failed write's error."""
        self.processes.watch.stepped()
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
                    f"interrupted; saved step {self.saved_step}; resume with --init_from=auto",
                    file=sys.stderr,
                )
        finally:
            self.thread.shutdown()

    def _write(self, state, kept):
        """Write a checkpoint, then delete all whose names are not in `kept`.

        `kept` has the checkpoint that the run resumed from: a newer one may be damaged.
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
                f"cannot write {path} ({reason}); earlier checkpoints are unchanged: "
                "free some space and resume with --init_from=resume"
            ) from None

    def _write_and_read_back(self, temporary, state):
        torch.save(state, str(temporary))  # given a path, torch writes without the GIL
        self.processes.watch.beat()  # writing a large file to a slow disk is not a hang
        check_crc(temporary)
