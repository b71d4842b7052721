"""One run directory, one writer: a lock file that its holder renews, on local disks and object stores alike."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError
from congrad_ray.runtime.interrupts import Stop, stoppable
from congrad_ray.runtime.logs import inherited

logger = logging.getLogger(__name__)

LOCK = "_lock.json"
RENEWED_EVERY = 10.0  # seconds
# Clocks of machines differ, so a lock counts as abandoned when it has not changed for this many seconds.
ABANDONED_AFTER = 35.0
# pyarrow's object stores have no write that fails where the object exists: of two that write at once, the one
# whose lock is there after a while has it.
_SETTLED_AFTER = 2.0

_held: set[str] = set()


@dataclass(frozen=True)
class Holder:
    """Who writes to a run directory."""

    token: str
    host: str
    pid: int
    process_started: float  # seconds since the epoch, to distinguish a process from a later one with the same pid
    command: str
    since: str
    renewals: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} ({self.command})"


@contextmanager
def only_writer(run: RunDirectory) -> Iterator[None]:
    """Holds the lock of `run` while the body runs; the same process may enter it again inside.

    The lock of a process of this machine that is gone, and one that its holder on another machine does not renew,
    are taken over. Raises RunDirectoryError, naming the holder, where somebody else holds it, and StageStopped
    where it was lost on the way (its file deleted, or taken over while this machine slept).
    """
    if run.path in _held:
        yield
        return
    mine = _this_process()
    _acquire(run, mine)
    _held.add(run.path)
    released = threading.Event()
    try:
        with stoppable() as stop:
            thread = threading.Thread(target=inherited(_renew), args=(run, mine, released, stop), daemon=True)
            thread.start()
            try:
                yield
            finally:
                released.set()
                thread.join()
    finally:
        _held.discard(run.path)
        found = _holder(run)
        if found is not None and found.token == mine.token:
            run.filesystem.delete_file(f"{run.path}/{LOCK}")


def _acquire(run: RunDirectory, mine: Holder) -> None:
    if _create(run, mine):
        return
    other = _holder(run)
    if other is not None and not _is_gone(other):
        _wait_for_silence(run, other)
    if other is not None:
        logger.info(f"the lock of {other} is taken over: it ended without removing it")
    run.write_json(LOCK, asdict(mine))
    time.sleep(_SETTLED_AFTER)
    found = _holder(run)
    if found is None or found.token != mine.token:
        raise RunDirectoryError(_refusal(run, found))


def _create(run: RunDirectory, mine: Holder) -> bool:
    """Makes the lock file if there is none; False where there is one, or where that cannot be done in one step."""
    if not run.is_local:
        return False
    run.filesystem.create_dir(run.path, recursive=True)
    temporary = Path(run.path) / f"{LOCK}.{mine.token}"
    temporary.write_text(json.dumps(asdict(mine)))
    try:
        os.link(temporary, Path(run.path) / LOCK)
    except OSError:  # it exists, or the filesystem has no links
        return False
    finally:
        temporary.unlink()
    return True


def _wait_for_silence(run: RunDirectory, other: Holder) -> None:
    """Returns when `other` is seen not to renew its lock; raises RunDirectoryError as soon as it does."""
    if other.host == socket.gethostname():
        raise RunDirectoryError(_refusal(run, other))
    logger.info(f"{run.path} is locked by {other}: looking for {ABANDONED_AFTER:.0f} s whether it is alive")
    deadline = time.monotonic() + ABANDONED_AFTER
    while time.monotonic() < deadline:
        time.sleep(1.0)
        found = _holder(run)
        if found is None:
            return
        if found != other:
            raise RunDirectoryError(_refusal(run, found))


def _renew(run: RunDirectory, mine: Holder, released: threading.Event, stop: Stop) -> None:
    renewals = 0
    while not released.wait(RENEWED_EVERY):
        try:
            found = _holder(run)
            if found is None or found.token != mine.token:
                whose = f"taken over by {found}" if found else "deleted"
                stop(f"the lock {run.path}/{LOCK} was {whose}: this run no longer is the only writer, so it ends")
                return
            renewals += 1
            run.write_json(LOCK, asdict(replace(mine, renewals=renewals)))
        except OSError as error:
            logger.warning(f"the lock {run.path}/{LOCK} could not be renewed: {error}")


def _holder(run: RunDirectory) -> Holder | None:
    """Who holds the lock; None where there is none, or its file says nothing."""
    try:
        value = run.read_json(LOCK)
        return Holder(**value) if value is not None else None
    except (TypeError, FileNotFoundError):  # not a holder's fields; deleted between two looks
        return None


def _is_gone(holder: Holder) -> bool:
    """Whether the holder was a process of this machine and is no more."""
    if holder.host != socket.gethostname():
        return False
    try:
        process = psutil.Process(holder.pid)
        another = abs(process.create_time() - holder.process_started) > 1.0
        return another or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _refusal(run: RunDirectory, holder: Holder | None) -> str:
    return (
        f"{run.path} is being written by {holder or 'another process'}: wait for it, stop it, or use another "
        f"folder. If you are sure that it is dead, delete {run.path}/{LOCK}."
    )


def _this_process() -> Holder:
    process = psutil.Process()
    # The program and the verb only: arguments may hold keys, or a whole script.
    words = [Path(argument).name.split() for argument in process.cmdline()[:3]]
    command = " ".join(word[0] for word in words if word)
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return Holder(uuid.uuid4().hex, socket.gethostname(), os.getpid(), process.create_time(), command, since)
