"""How far a stage is: rows done, rate and time left, for the person at the screen."""

from __future__ import annotations

import logging
import threading
import time

logger = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """`58 s`, `12 min`, `1 h 12 min`, `3 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"


class Progress:
    """Prints rows done, rate and time left at most every few seconds.

    The clock starts with the first sign of work: what it took to start engines and load models tells nothing of
    the time left. Rows that are computed and not yet written count too; of many at once none may be written yet.
    """

    def __init__(self, total: int, every_seconds: float = 10.0) -> None:
        self._total, self._every = total, every_seconds
        self._written = self.failed = self._tokens = self._computed = 0
        self._start: float | None = None
        self._at_start = 0
        self._ended = False
        self._last = time.monotonic()
        self._lock = threading.Lock()

    @property
    def left(self) -> int:
        """Rows that are still to be done."""
        return max(0, self._total - self._written - self.failed)

    def add(self, written: int, failed: int = 0, tokens: int = 0) -> None:
        """So many more rows are written, or in quarantine."""
        with self._lock:
            self._written += written
            self.failed += failed
            self._tokens += tokens
            self._tell()

    def computed(self, rows: int) -> None:
        """So many rows in all have been computed, some of which may be written by now."""
        with self._lock:
            self._computed = rows
            self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        finished = self._written + self.failed
        done = min(self._total, max(finished, self._computed))
        if self._start is None:
            self._start, self._at_start = now, done
        ends = finished >= self._total
        if self._ended or (now - self._last < self._every and not ends):
            return
        self._last, self._ended = now, ends
        seconds = now - self._start
        rate = (done - self._at_start) / seconds if seconds > 1.0 else 0.0
        text = f"{done}/{self._total} rows"
        text += f", {self.failed} failed" if self.failed else ""
        if rate:
            text += f", {rate:.2g} rows/s" if rate < 10 else f", {rate:.0f} rows/s"
            # Of rows that are only computed the tokens are not known: they are taken for as long as the others.
            text += f", {rate * self._tokens / finished:.0f} tokens/s" if self._tokens else ""
            text += f", {duration((self._total - done) / rate)} left" if done < self._total else ""
        logger.info(text)
