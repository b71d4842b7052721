"""How far a stage is: rows done, rate and time left, for the person at the screen."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from congrad_ray.config.printable import BAR

logger = logging.getLogger(__name__)

_WINDOW = 300.0  # seconds, of the rate
# This many rows have to come before the time left is shown: the first say little about it.
_FEW, _KNOWN_SHARE = 4, 0.02


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
    """Logs rows done, rate and time left at most every few seconds; between them, what moves a progress bar.

    The rate is that of the last minutes, and begins with the first sign of work: what it took to start engines and
    load models says nothing about the time left. Rows that are computed and not yet written count too; of many at
    once none may be written yet.
    """

    def __init__(self, total: int, every_seconds: float = 10.0) -> None:
        self._total, self._every = total, every_seconds
        self._written = self.failed = self._tokens = self._computed = 0
        self._samples: deque[tuple[float, int]] = deque()  # (time, rows done) of the last minutes
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
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] > _WINDOW:
            self._samples.popleft()
        ends = finished >= self._total
        if self._ended:
            return
        self._ended = ends
        spoken = ends or now - self._last >= self._every
        if spoken:
            self._last = now
        level = logging.INFO if spoken else BAR
        if logger.isEnabledFor(level):
            logger.log(level, self._text(done, finished), extra={"bar": (done, self._total)})

    def _text(self, done: int, finished: int) -> str:
        """Rows, and once enough of them came for it, the rate and the time left."""
        (start, before), (now, _) = self._samples[0], self._samples[-1]
        came, seconds = done - before, now - start
        rate = came / seconds if seconds > 1.0 else 0.0
        text = f"{done:,}/{self._total:,} rows"
        text += f", {self.failed:,} failed" if self.failed else ""
        if rate:
            text += f", {rate:.2g} rows/s" if rate < 10 else f", {rate:,.0f} rows/s"
            # Of rows that are only computed the tokens are not known: they are taken for as long as the others.
            text += f", {rate * self._tokens / finished:,.0f} tokens/s" if self._tokens else ""
            # The first rows come while other engines still start, and kernels are compiled for them.
            known = came >= max(_FEW, _KNOWN_SHARE * self._total)
            text += f", {duration((self._total - done) / rate)} left" if done < self._total and known else ""
        return text
