"""The flag that a signal sets, and the hang timer. tests/test_faults.py sends signals to real
runs.
"""

import faulthandler
import os
import signal

import pytest
import torch

from engine.base.distributed import Processes
from engine.base.errors import Interrupted
from engine.base.signals import Watch


def test_a_signal_after_the_first_step_interrupts_at_the_next_heartbeat(capfd):
    watch, before = Watch(), signal.getsignal(signal.SIGTERM)
    processes = Processes(torch.device("cpu"), watch=watch)
    with watch.watching():
        assert signal.getsignal(signal.SIGTERM) == before  # there is nothing to save yet
        watch.stepped()
        processes.heartbeat()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun passes on the same signal
        with pytest.raises(Interrupted) as interrupted:
            processes.heartbeat()
    assert interrupted.value.signum == signal.SIGTERM
    assert capfd.readouterr().err.count("SIGTERM") == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_hang_timer_starts_after_a_step_and_ends_with_the_loop(monkeypatch):
    armed, cancelled = [], []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda t, **_: armed.append(t))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: cancelled.append(1))
    watch = Watch(hang_timeout=600.0)
    for _ in range(2):
        with watch.watching():
            n = len(armed)
            watch.beat()  # torch.compile works until the end of the first step
            assert len(armed) == n
            watch.stepped()
            watch.beat()
            watch.beat()  # restarted at most once a second
    assert armed == [600.0, 600.0] and cancelled == [1, 1]
