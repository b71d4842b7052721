"""The pairs themselves, for the page's table: all where they fit, else a sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from congrad_ray.config.names import JUDGED
from congrad_ray.rundir.directory import Folder
from congrad_ray.stages.report.selection import FATES, Scored
from congrad_ray.stages.select.keep import TOKENS

BUDGET = 360 * 1024
"""Bytes of JSON that the pairs of a page take at most."""
LONGEST_TEXT = 1200
"""Characters of a text, after which it is cut."""
COLUMNS = (
    "language",
    "fate",
    "score",
    "worst",
    "margin",
    "chosen_tokens",
    "rejected_tokens",
    "prompt",
    "chosen",
    "rejected",
)
_CANDIDATES = 4000


@dataclass(frozen=True)
class PairTable:
    """Rows of COLUMNS, and of how many pairs they are. A pair's `fate` is a number of FATES; None is not known."""

    rows: list[list[Any]]
    total: int

    @property
    def sampled(self) -> bool:
        return len(self.rows) < self.total


def pair_table(scored: Scored, pairs: Folder, budget: int = BUDGET) -> PairTable | None:
    """The pairs with their texts in at most `budget` bytes of JSON; None where their texts are not there.

    Of too many pairs the table has of every language as many kept as dropped ones, drawn by their ids, which are
    hashes; and always the highest and the lowest score of each.
    """
    if not pairs.files(".parquet"):
        return None
    order = _drawn(scored)
    texts = _texts(pairs, scored.table["pair_id"].take(pa.array(order[:_CANDIDATES])).combine_chunks())
    rows: list[list[Any]] = []
    size = 2
    for number, values in zip(order.tolist(), _values(scored, order[:_CANDIDATES]), strict=False):
        text = texts.get(scored.table["pair_id"][number].as_py())
        if text is None:
            continue
        row = [*values, *text]
        size += len(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")) + 1
        if size > budget:
            break
        rows.append(row)
    return PairTable(rows, len(scored.table))


def _drawn(scored: Scored) -> np.ndarray[Any, np.dtype[np.int64]]:
    """All rows, first the extremes of every language and fate, then round by round one of each; ids decide."""
    score, fate, languages = scored.score, scored.kept, scored.languages
    places = np.empty(len(score), dtype=np.float64)
    for language in np.unique(languages):
        for kept in (True, False):
            members = np.flatnonzero((languages == language) & (fate == kept))
            places[members] = np.arange(len(members))  # the table is sorted by id
            if len(members):
                places[members[[score[members].argmax(), score[members].argmin()]]] = -1
    return np.lexsort((np.arange(len(score)), places)).astype(np.int64)


def _values(scored: Scored, order: np.ndarray[Any, np.dtype[np.int64]]) -> list[list[Any]]:
    def rounded(name: str, digits: int) -> list[float | None]:
        if not scored.has(name):
            return [None] * len(order)
        return [_number(value, digits) for value in scored.column(name)[order].tolist()]

    languages, fates = (
        scored.languages[order].tolist(),
        [FATES.index(name) for name in scored.fate[order].tolist()],
    )
    scores = [_number(value, 4) for value in scored.score[order].tolist()]
    margin: list[float | None] = [None] * len(order)
    if scored.has(*JUDGED):
        difference = scored.column(JUDGED[0]) - scored.column(JUDGED[1])
        margin = [_number(value, 3) for value in difference[order].tolist()]
    tokens = [rounded(name, 0) for name in TOKENS[1:]]
    columns: Sequence[Sequence[Any]] = (languages, fates, scores, rounded("worst_cosine", 3), margin, *tokens)
    return [list(row) for row in zip(*columns, strict=True)]


def _number(value: float, digits: int) -> float | None:
    if not np.isfinite(value):
        return None
    return round(value, digits) if digits else int(value)


def _texts(pairs: Folder, wanted: pa.Array) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    columns = ["pair_id", "prompt", "chosen", "rejected"]
    for path in pairs.files(".parquet"):
        condition = pc.field("pair_id").isin(wanted)
        table = pq.read_table(path, columns=columns, filesystem=pairs.filesystem, filters=condition)
        for row in table.to_pylist():
            found[row["pair_id"]] = [_text(row[name]) for name in columns[1:]]
    return found


def _text(messages: list[dict[str, str]]) -> str:
    text = "\n".join(message["content"] for message in messages)
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
