"""Which prompts of a source are drawn, from one look at each row: only the drawn ones are held."""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from congrad_ray.data.tables import prompt_id, row_id
from congrad_ray.rundir.ids import count_distinct

Row = dict[str, Any]


@dataclass
class Candidates:
    """The first `room` of the prompts that were offered, in the order of a draw by `seed`.

    That order is one of hashes of the ids, so it does not depend on the order of the rows, and an equal prompt,
    which has an equal id, takes no place of its own.
    """

    room: int
    seed: int
    _last_first: list[int] = field(default_factory=list)
    _rows: dict[int, bytes] = field(default_factory=dict)

    def offer(self, row: Row) -> None:
        """Holds the row where it is among the first; of equal ones the first that was offered."""
        key = int(row_id("draw", self.seed, row["prompt_id"]), 16)
        if key in self._rows or not self.room:
            return
        if len(self._rows) == self.room:
            if key > -self._last_first[0]:
                return
            del self._rows[-heapq.heappushpop(self._last_first, -key)]
        else:
            heapq.heappush(self._last_first, -key)
        self._rows[key] = json.dumps(row).encode()  # a quarter of what the same dictionary takes

    def in_order(self) -> list[int]:
        """The keys of the rows that are held, in the order of the draw."""
        return sorted(self._rows)

    def row(self, key: int) -> Row:
        found: Row = json.loads(self._rows[key])
        return found


@dataclass
class Collected:
    """What was found in a source, looked at row by row: `read` = usable + in other languages + bad."""

    room: dict[str, int]
    """Prompts to hold by language; a language that is not here is not asked for."""
    seed: int
    read: int = 0
    bad: int = 0
    others: Counter[str] = field(default_factory=Counter)
    """Rows by the language that nobody asked for."""
    written: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """What the source calls its languages, by their tags."""
    candidates: dict[str, Candidates] = field(default_factory=dict)
    _ids: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.candidates = {language: Candidates(room, self.seed) for language, room in self.room.items()}

    def add(self, language: str, messages: list[dict[str, str]], task: str | None = None) -> None:
        """A usable row in a language that is asked for."""
        identifier = prompt_id(language, messages)
        self._ids += bytes.fromhex(identifier)
        self.candidates[language].offer(
            {"prompt_id": identifier, "language": language, "prompt": messages, "task": task}
        )

    def counts(self, drawn: int) -> dict[str, int]:
        """What became of the rows when `drawn` of them were. Raises RuntimeError where one is not counted."""
        ids = np.frombuffer(self._ids, dtype="S16")
        usable, distinct = len(ids), count_distinct(ids)
        if usable + self.others.total() + self.bad != self.read or drawn > distinct:
            raise RuntimeError(
                f"of {self.read} rows {usable} are usable ({distinct} different ones, {drawn} drawn), "
                f"{self.others.total()} in other languages and {self.bad} bad: report this as a bug"
            )
        return {
            "rows_read": self.read,
            "drawn": drawn,
            "not_drawn": distinct - drawn,
            "duplicates": usable - distinct,
            "other_languages": self.others.total(),
            "bad": self.bad,
        }
