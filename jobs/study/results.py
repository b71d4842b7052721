"""The file that keeps every result of a study: one JSON object a line, each about what its key says."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

Row = Mapping[str, Any]
Keys = Mapping[str, Mapping[str, Any]]
"""Of each kind of row: the fields that say what a row is about, and their types, as isinstance takes them."""


class ResultsError(ValueError):
    """A line of a results file is not a result; the text names the file and the line."""


class Results:
    """The results file: what it holds, and one more line whenever something is known."""

    def __init__(self, path: Path, keys: Keys) -> None:
        self._path, self._keys = path, keys
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            cut_torn_line(path)  # left by a kill; the next row would be glued to it
        self.rows = read_results(path, keys) if path.exists() else []
        self._known = {result_key(row, keys) for row in self.rows}

    def has(self, row: Row) -> bool:
        """Whether there is a result with the key of `row`."""
        return result_key(row, self._keys) in self._known

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row, unless there is one with its key."""
        key = result_key(row, self._keys)
        if key in self._known:
            return
        self._known.add(key)
        self.rows.append(row)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_results(path: str | Path, keys: Keys) -> list[dict[str, Any]]:
    """The rows of a results file (one JSON object per line), the last of each key.

    A last line without an end that cannot be read is what a killed run leaves, and is left out. Raises
    ResultsError for any other line that is not a result, OSError where the file cannot be read.
    """
    lines = Path(path).read_bytes().split(b"\n")
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_not_json)
        except ValueError as error:
            if number == len(lines):
                break
            raise ResultsError(f"{path}, line {number}: not JSON: {error}") from error
        found[_checked_key(row, keys, f"{path}, line {number}")] = row
    return list(found.values())


def result_key(row: Row, keys: Keys) -> tuple[Any, ...]:
    """What a result is about: of two rows with the same key the later one counts."""
    return row["kind"], *(row[name] for name in keys[row["kind"]])


def cut_torn_line(path: str | Path) -> bool:
    """Cuts off what a killed run left after the last whole line; whether there was anything.

    To be done before more rows are appended: behind half a line they would be lost with it.
    """
    content = Path(path).read_bytes()
    rest = len(content) - (content.rfind(b"\n") + 1)
    if rest:
        os.truncate(path, len(content) - rest)
    return rest > 0


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number; undefined values are null")


def _checked_key(row: Any, keys: Keys, where: str) -> tuple[Any, ...]:
    """The `result_key` of something read from a file. Raises ResultsError where it is no result."""
    if not isinstance(row, dict):
        raise ResultsError(f"{where}: should be an object, found {type(row).__name__}")
    kind = row.get("kind")
    if not isinstance(kind, str) or kind not in keys:
        raise ResultsError(f"{where}: kind should be one of {', '.join(keys)}, found {kind!r}")
    for name, types in keys[kind].items():
        if name not in row:
            raise ResultsError(f"{where}: a row of kind {kind} needs {name}")
        if not isinstance(row[name], types) or isinstance(row[name], bool):
            raise ResultsError(f"{where}: {name} is {row[name]!r}")
    return result_key(row, keys)
