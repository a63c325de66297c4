"""End a training loop cleanly after a signal, and with a traceback when it hangs."""

import contextlib
import faulthandler
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
# a scheduler and torchrun may both pass on a signal: within this time it counts once
ECHO_SECONDS = 1.0


@dataclass
class Watch:
    """hang_timeout: seconds without beat(), from the first finished step on, after which the
    process prints the stacks of its threads and exits; 0: never. torch.compile may take longer
    before.
    """

    is_main: bool = True
    hang_timeout: float = 0.0
    signum: int = 0  # the signal that asked the loop to save and end; 0: none
    received_at: float = 0.0  # when that came
    armed_at: float = math.inf  # when the hang timer was restarted; inf: before the first step

    def beat(self) -> None:
        """Restart the hang timer. It needs no GIL: it fires even if the main thread is in C++."""
        now = time.monotonic()
        if self.hang_timeout and now > self.armed_at + 1.0:  # restarting costs 50 microseconds
            self.armed_at = now
            faulthandler.dump_traceback_later(self.hang_timeout, exit=True, file=sys.__stderr__)

    def stepped(self) -> None:
        """Make signals set signum, and start the hang timer. Call it after a step: before, there
        is nothing to save."""
        if self.armed_at == math.inf:
            self.armed_at = 0.0
        for signum in SIGNALS:
            is_ignored = signal.getsignal(signum) == signal.SIG_IGN
            # background jobs of a script start with SIGINT ignored; other signals may be ignored
            # on purpose, as nohup does with SIGHUP
            if signum == signal.SIGINT or not is_ignored:
                signal.signal(signum, self._handle)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around the loop: at its end, restore the signal handlers and stop the hang timer."""
        self.signum = 0
        handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self.armed_at = math.inf
            for signum, handler in handlers.items():
                if signal.getsignal(signum) == self._handle:
                    signal.signal(signum, handler)

    def _handle(self, signum, _):
        name = signal.Signals(signum).name
        if not self.signum:
            self.signum, self.received_at = signum, time.monotonic()
            if self.is_main:
                _print(f"{name}: saving a checkpoint; a second signal exits at once")
        elif time.monotonic() > self.received_at + ECHO_SECONDS:
            _print(f"{name} again: exiting at once; the last checkpoint is unchanged")
            os._exit(128 + signum)


def _print(message):
    # not print(): the handler may interrupt a print() of the main thread, which holds a lock
    os.write(2, f"{message}\n".encode())
