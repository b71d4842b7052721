"""What workers have to say to the person at the screen: Ray shows none of their output there."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from congrad_ray.runtime.driver_actors import driver_actor
from congrad_ray.runtime.logs import inherited

logger = logging.getLogger(__name__)

_LOOK_EVERY = 2.0
_TELL_EVERY = 1.0


class Notices:
    """Lines of text, each once, and rows computed, by stage; an actor of the driver."""

    def __init__(self) -> None:
        self._lines: dict[str, dict[tuple[int, str], bool]] = {}  # stage -> (level, line) -> has been read
        self._rows: dict[str, int] = {}

    def say(self, stage: str, line: str, level: int = logging.INFO) -> None:
        self._lines.setdefault(stage, {}).setdefault((level, line), False)

    def add(self, stage: str, rows: int) -> None:
        self._rows[stage] = self._rows.get(stage, 0) + rows

    def news(self, stage: str) -> tuple[list[tuple[int, str]], int]:
        """What was not read yet of a stage, as (level, line), and the rows computed for it so far."""
        lines = self._lines.get(stage, {})
        new = [line for line, read in lines.items() if not read]
        lines.update(dict.fromkeys(new, True))
        return new, self._rows.get(stage, 0)


@dataclass
class Notify:
    """A worker's way to the screen: call it with a line. A stage's lines appear once, whoever says them.

    Nothing waits for the driver, and a driver that is gone costs a worker nothing. Without an actor lines are
    logged here, for work that is done without Ray.
    """

    actor: Any = None
    stage: str = ""
    _rows: int = field(default=0, repr=False)
    _last: float = field(default=0.0, repr=False)

    def __call__(self, line: str, level: int = logging.INFO) -> None:
        if self.actor is None:
            logger.log(level, line)
        else:
            self.actor.say.remote(self.stage, line, level)

    def computed(self, rows: int, last: bool = False) -> None:
        """Rows that are computed and not yet written; sent at most every second, and with the `last`."""
        self._rows += rows
        now = time.monotonic()
        if self.actor is not None and self._rows and (last or now - self._last >= _TELL_EVERY):
            self.actor.add.remote(self.stage, self._rows)
            self._rows, self._last = 0, now

    def forward_warnings(self) -> None:
        """From now on, warnings that this process logs go to the screen as well."""
        if self.actor is None:  # they are logged here already
            return
        package = logging.getLogger("congrad_ray")
        others = [known for known in package.handlers if not isinstance(known, _Forward)]
        package.handlers = [*others, _Forward(self)]


class _Forward(logging.Handler):
    def __init__(self, notify: Notify) -> None:
        super().__init__(logging.WARNING)
        self._notify = notify

    def emit(self, record: logging.LogRecord) -> None:
        self._notify(record.getMessage(), record.levelno)


def notify_of(stage: str) -> Notify:
    """For the workers of a stage of the connected Ray's driver."""
    return Notify(driver_actor(Notices), stage)


@contextmanager
def looking(look: Callable[[], None], every_seconds: float) -> Iterator[None]:
    """Calls `look` from a thread while the body runs, and once more at its end."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every_seconds):
            look()

    thread = threading.Thread(target=inherited(watch), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()


@contextmanager
def heard(notify: Notify, computed: Callable[[int], None] = lambda rows: None) -> Iterator[None]:
    """While the body runs, what workers say is logged; `computed` gets the rows computed since its start."""
    import ray

    get: Any = ray.get  # whose annotations miss a single reference with a timeout
    before: int | None = None
    seen = 0

    def look() -> None:
        nonlocal before, seen
        try:
            lines, rows = get(notify.actor.news.remote(notify.stage), timeout=10)
        except Exception:  # a Ray that does not answer is the watchdog's matter
            return
        for level, line in lines:
            logger.log(level, line)
        if before is None:
            before = seen = rows
        if rows > seen:
            seen = rows
            computed(rows - before)

    look()
    with looking(look, _LOOK_EVERY):
        yield
