"""Ending a body from another thread."""

from __future__ import annotations

import signal
import subprocess
import sys
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


def test_sigterm_is_an_interruption_though_ray_has_a_handler_of_its_own() -> None:
    """Ray's would end the process without a word of how to go on."""
    script = """
import os, signal, time
from congrad_ray.cli import main as cli
from congrad_ray.config.profile import Profile
from congrad_ray.runtime.session import connect

@cli.app.command()
def wait() -> None:
    connect(Profile(name="test"), 2)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

cli.main(["wait"])
"""
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 130, ended.stderr
    assert "interrupted" in ended.stderr and "Traceback" not in ended.stderr
