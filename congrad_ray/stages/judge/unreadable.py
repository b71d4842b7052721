"""What could not be read of a judge: counts by language and reason, examples, and when it is too much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from congrad_ray.config.printable import printable
from congrad_ray.data.tables import FAILURE, FAILURE_FIELD, table_of

Row = dict[str, Any]

# A language's share is an estimate from this many judgements on.
_ENOUGH = 20
_EXAMPLES = 3
_LONGEST = 160


class Tally:
    """Judgements by language: how many there are to be, were made, and could not be read."""

    def __init__(self, expected: Mapping[str, int]) -> None:
        self._expected = expected
        self._made: Counter[str] = Counter()
        self._unreadable: Counter[str] = Counter()

    def add(self, language: str, made: int, unreadable: int) -> None:
        """Counts judgements of a language, `unreadable` of them without a result."""
        self._made[language] += made
        self._unreadable[language] += unreadable

    def share(self) -> float:
        """The unreadable share of all judgements, as far as it is known by now.

        A table may come language by language. So a language's share counts for all its judgements once there are
        enough of them, and one of which little has come counts as readable.
        """
        sure = 0.0
        for language, expected in self._expected.items():
            made = self._made[language]
            estimate = expected / made if made >= min(_ENOUGH, expected) > 0 else 1.0
            sure += self._unreadable[language] * estimate
        return sure / max(1, sum(self._expected.values()))


def keep_failed(batch: pa.Table, schema: pa.Schema) -> pa.Table:
    """A batch of `complete` in which a judgement that could not be made is one that cannot be read.

    Its reason and detail go to the columns `unreadable` and `output`; the row stays, out of quarantine.
    """
    rows = batch.to_pylist()
    for row in rows:
        if failed := row[FAILURE]:
            row.update({"unreadable": failed["reason"], "output": failed["detail"], FAILURE: None})
    return table_of(rows, pa.schema([*schema, FAILURE_FIELD]))


def counts_by_language(rows: pa.Table) -> dict[str, dict[str, Any]]:
    """Of a table with `language` and `unreadable`: asked, readable, and the others by reason. They add up."""
    groups = rows.group_by(["language", "unreadable"]).aggregate([([], "count_all")]).to_pylist()
    found: dict[str, dict[str, Any]] = {}
    for group in sorted(groups, key=lambda group: (group["language"], group["unreadable"] or "")):
        of_language = found.setdefault(group["language"], {"asked": 0, "readable": 0, "unreadable": {}})
        of_language["asked"] += group["count_all"]
        if group["unreadable"] is None:
            of_language["readable"] += group["count_all"]
        else:
            of_language["unreadable"][group["unreadable"]] = group["count_all"]
    return found


def by_reason(counts: Mapping[str, int]) -> str:
    """{"truncated": 2, "no_score": 1} -> '3: truncated 2, no_score 1'; '0' where there is none."""
    if not counts:
        return "0"
    listed = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    return f"{sum(counts.values())}: {listed}"


def explain(what: str, rows: Iterable[Row], ways_out: Mapping[str, str]) -> str:
    """What could not be read, by reason, with examples of what the judge wrote and the setting that helps.

    `rows` have `unreadable` and `output`. `ways_out`: by reason.
    """
    asked = 0
    outputs: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for row in rows:
        asked += 1
        if reason := row["unreadable"]:
            counts[reason] += 1
            examples = outputs.setdefault(reason, [])
            if len(examples) < _EXAMPLES and (text := _end_of(row["output"])) not in examples:
                examples.append(text)
    lines = [f"{sum(counts.values())} of {asked} {what} cannot be read:"]
    for reason, count in counts.most_common():
        lines += [f"  {reason}: {count}, such as:", *(f"    {text}" for text in outputs[reason])]
        if way_out := ways_out.get(reason):
            lines.append(f"    -> {way_out}")
    return "\n".join(lines)


def _end_of(output: str | None) -> str:
    """The last of what a judge wrote, on one line, in quotes: there its result should be."""
    text = printable(" / ".join((output or "").split("\n")))
    return repr(text if len(text) <= _LONGEST else f"... {text[-_LONGEST:]}")
