"""Ending a body from another thread."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from congrad_ray.runtime.interrupts import StageStopped, Stop, stoppable


@pytest.mark.parametrize("inner", [True, False])
def test_either_of_two_bodies_is_stopped_where_the_signal_was_ignored(inner: bool) -> None:
    """As in a process that a shell started in the background: the lock's body around the watchdog's."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        began = time.monotonic()
        with pytest.raises(StageStopped, match="enough") as error, stoppable() as outside, stoppable() as inside:
            stop: Stop = inside if inner else outside
            threading.Timer(0.2, stop, ["enough"]).start()
            time.sleep(20)
        assert time.monotonic() - began < 10 and isinstance(error.value, ValueError)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_body_that_ends_by_itself_meanwhile_is_stopped_too() -> None:
    with pytest.raises(StageStopped, match="enough"), stoppable() as stop:
        try:
            stop("enough")
            time.sleep(1)
        except KeyboardInterrupt:
            pass
