"""Signals and silence: a thread that sees them while the main thread is deep in a step.

SIGTERM and SIGINT ask the loop to save and end; it looks when its state is whole (Watch.signum). A second signal ends
at once, and so does the first before a step is done: there is nothing to save then. A loop that gives no sign of
life for `timeout` seconds (a dead peer, a stuck disk) has the stacks of all its threads printed and ends.
"""

import contextlib
import faulthandler
import os
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
]
# seconds in which one signal may arrive twice: from a scheduler, and from torchrun that was told as
# well
ECHO = 1.0
# seconds from the stacks to the end, which ends the peers too: they have stacks to show as well
LAST_WORDS = 5.0


class Watch:
    """signum: the signal that asks the loop to end, 0 while there is none. beat() is the loop's sign of life."""

    def __init__(self, rank: int = 0, timeout: float = 0.0):
        self.rank, self.timeout, self.signum, self.since, self.last_beat = (
            rank,
            timeout,
            0,
            0.0,
            0.0,
        )
        self.worth_saving = False  # a step is done that no checkpoint has

    def beat(self) -> None:
        self.last_beat = time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around the loop. Outside the main thread Python has no signals, and nothing is watched."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        self.signum, self.last_beat, self.worth_saving = 0, 0.0, False
        # the interpreter writes each signal's number into the pipe even while the main thread is in C++
        fd_before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        # a script's background jobs start with SIGINT ignored, and are meant all the same; nohup means what it says
        wanted = [
            s
            for s in SIGNALS
            if s != getattr(signal, "SIGHUP", 0) or signal.getsignal(s) != signal.SIG_IGN
        ]
        before = {signum: signal.signal(signum, self._in_main_thread) for signum in wanted}
        thread = threading.Thread(target=self._look, args=(ear,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(fd_before)
            for signum, handler in before.items():
                signal.signal(signum, handler)
            os.close(mouth)
            thread.join()
            os.close(ear)

    def _in_main_thread(self, signum: int, _) -> None:
        if (
            signum == signal.SIGINT and not self.worth_saving
        ):  # in a notebook the process has to live on
            raise KeyboardInterrupt

    def _look(self, ear: int) -> None:
        looked = time.monotonic()
        while True:
            if select.select([ear], [], [], 1.0)[0]:
                signals = os.read(ear, 64)
                if not signals:
                    return
                for signum in signals:
                    if signum in SIGNALS:
                        self._hear(signum)
            paused, looked = time.monotonic() - looked - 1.0, time.monotonic()
            if paused > 1.0:  # the whole process was stopped, the loop with it
                self.last_beat += paused
            silence = looked - self.last_beat
            if self.last_beat and 0 < self.timeout < silence:
                self._give_up(silence)

    def _hear(self, signum: int) -> None:
        now, name = time.monotonic(), signal.Signals(signum).name
        if not self.worth_saving:
            if signum != signal.SIGINT or self.signum:
                self._end(
                    128 + signum, f"{name} before the first step is done: there is nothing to save"
                )
            self.signum, self.since = signum, now
        elif not self.signum:
            self.signum, self.since = signum, now
            if self.rank == 0:
                print(
                    f"{name}: saving a checkpoint; a second signal ends at once",
                    file=sys.stderr,
                    flush=True,
                )
        elif now - self.since > ECHO:
            self._end(
                128 + signum, f"{name} again: ended at once, the last checkpoint is untouched"
            )

    def _give_up(self, silence: float) -> None:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            stacks = "".join(f"[rank {self.rank}] {line}" for line in file)
        what = f"no sign of life for {silence:.0f} s (hang_timeout = {self.timeout:g}): a peer or a disk is stuck"
        print(
            f"[rank {self.rank}] {what}; the stacks of this process:\n{stacks}",
            file=sys.stderr,
            flush=True,
        )
        beat = self.last_beat
        time.sleep(LAST_WORDS)
        if self.last_beat == beat:
            os._exit(1)

    def _end(self, code: int, message: str) -> None:
        print(message, file=sys.stderr, flush=True)
        os._exit(code)
