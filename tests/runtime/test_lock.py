"""One run directory, one writer."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError
from congrad_ray.runtime import lock
from congrad_ray.runtime.interrupts import StageStopped
from congrad_ray.runtime.lock import LOCK, Holder, only_writer

HOLD = """
import sys, time
from congrad_ray.runtime.lock import only_writer
from congrad_ray.rundir.directory import RunDirectory
with only_writer(RunDirectory.open(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
ELSEWHERE = Holder("token", "another-host", 1, 0.0, "congrad run", "long ago")


def test_a_second_process_is_refused_and_told_by_whom_and_a_dead_one_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory.open(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with (
            pytest.raises(RunDirectoryError, match=f"process {other.pid} on .*use another folder"),
            only_writer(run),
        ):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with only_writer(run):
        assert run.exists(LOCK)
    lines = caplog.messages
    assert len(lines) == 1 and "taken over" in lines[0] and str(other.pid) in lines[0]
    assert not run.exists(LOCK)


def test_the_same_process_may_enter_again_and_an_error_releases(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    with pytest.raises(KeyError), only_writer(run):
        with only_writer(run):
            pass
        assert run.exists(LOCK)
        raise KeyError
    assert not run.exists(LOCK)


def test_a_run_whose_lock_is_deleted_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEWED_EVERY", 0.1)
    run = RunDirectory.open(tmp_path)
    with pytest.raises(StageStopped, match="was deleted: this run no longer"), only_writer(run):
        time.sleep(0.5)  # renewed some times
        (tmp_path / LOCK).unlink()
        time.sleep(20)


def test_a_holder_on_another_machine_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "ABANDONED_AFTER", 2.5)
    run = RunDirectory.open(tmp_path)
    run.write_json(LOCK, asdict(ELSEWHERE))
    renewal = threading.Timer(0.5, lambda: run.write_json(LOCK, asdict(replace(ELSEWHERE, renewals=1))))
    renewal.start()
    with pytest.raises(RunDirectoryError, match="process 1 on another-host since long ago"), only_writer(run):
        pass
    renewal.join()
    with only_writer(run):  # nobody renews it now
        pass
    assert "taken over" in caplog.messages[-1]


def test_a_lock_that_says_nothing_is_replaced(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("{}")
    with only_writer(RunDirectory.open(tmp_path)):
        pass


def test_no_arguments_are_reported(tmp_path: Path) -> None:
    with only_writer(RunDirectory.open(tmp_path)):
        command = RunDirectory.open(tmp_path).read_json(LOCK)["command"]
    assert "/" not in command and len(command.split()) <= 3
