"""Ending a stage from a thread that watches it, in order: as Ctrl-C would, but with an error that says why."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Stop = Callable[[str], None]

_GRACE_SECONDS = 60.0


class StageStopped(ValueError):
    """A stage was ended from outside its own work; what it has written is kept, and the same command resumes."""


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Gives a function that other threads call to end the body, which then raises StageStopped with their text.

    The main thread is interrupted by a real SIGINT, since nothing else wakes it from a wait for Ray. A body that
    has not ended a minute later is waiting for something that does not come: the process then ends with exit code
    1, which a stage survives as it survives any kill. Outside the main thread nothing can be interrupted; the text
    is printed there.
    """
    reasons: list[str] = []
    ended = threading.Event()
    in_main = threading.current_thread() is threading.main_thread()

    def give_up(text: str) -> None:
        if not ended.wait(_GRACE_SECONDS):
            print(f"error: {text}\nThe process did not end by itself.", file=sys.stderr, flush=True)
            os._exit(1)

    def stop(text: str) -> None:
        if reasons or ended.is_set():
            return
        reasons.append(text)
        if not in_main:
            print(f"error, but this thread cannot be interrupted: {text}", file=sys.stderr, flush=True)
            return
        threading.Thread(target=give_up, args=(text,), daemon=True).start()
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)

    # Processes that a shell started in the background ignore the signal.
    ignored = in_main and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield stop
        if reasons and in_main:
            time.sleep(0.1)  # the signal is on its way: let it come here, not in what follows
    except BaseException as error:
        if reasons:
            raise StageStopped(reasons[0]) from error
        raise
    finally:
        ended.set()
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    if reasons:
        raise StageStopped(reasons[0])
