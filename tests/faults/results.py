"""The evidence of a fault run: one JSON line for every kill, exit, comparison and measurement, as it happens."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Results:
    """Appends to the file; what an earlier start of the same fault run wrote is there from the beginning."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._records: list[Record] = []
        if path.exists():
            self._records = [json.loads(line) for line in path.read_text().splitlines()]

    def add(self, event: str, **values: Any) -> None:
        record = {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **values}
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._records.append(record)

    def of(self, event: str, **values: Any) -> list[Record]:
        """The records of one kind in which these values are these."""
        return [
            record
            for record in self._records
            if record["event"] == event and all(record.get(name) == value for name, value in values.items())
        ]
