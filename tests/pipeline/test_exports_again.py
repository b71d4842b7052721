"""Real pairs, written for every trainer and read again, are the same pairs: the same selection comes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from congrad_ray.config.names import ExportFormat
from congrad_ray.config.recipe import Source
from congrad_ray.data.exports.card import ExportFacts
from congrad_ray.data.exports.write import ExportedRow, Rows, write_export
from congrad_ray.data.preferences import Columns, preference_of
from congrad_ray.pipeline.preferences import Reading, read_preferences

FACTS = ExportFacts("model", ["rows"], "all", "pcgrad", {"en": (1, 1)}, 2048, "test")
OF_CHATS = {"llama-factory": {"prompt": "conversations", "system": "system"}, "axolotl": {"prompt": "messages"}}
OWN = ("parquet", "jsonl", "dataset")


@dataclass(frozen=True)
class Read:
    """The table of pairs of a source."""

    table: pa.Table

    @property
    def ids(self) -> list[str]:
        found: list[str] = self.table["pair_id"].to_pylist()
        return found


def read(path: Path, folder: Path, **how: Any) -> Read:
    folder.mkdir()
    found = read_preferences(Reading([Source(name=str(path))], **how), folder, 0.0)
    assert found.rows == found.pairs
    return Read(pq.read_table(folder / "pairs.parquet"))


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("name", ["preferences.jsonl", "tata.jsonl"])
def test_real_pairs_come_back_from_every_export(shared_data: Path, tmp_path: Path, name: str, chat: bool) -> None:
    pairs = read(shared_data / name, tmp_path / "read", chat=chat)

    def rows() -> Iterator[ExportedRow]:
        return (ExportedRow(preference_of(row), 0.5, True) for row in pairs.table.to_pylist())

    scores = {"congrad_score": pa.array([0.5] * len(pairs.ids))}
    source = Source(name=str(shared_data / name))
    given = Rows(rows, [source], pairs.table["row"].to_numpy(), scores)
    for to in get_args(ExportFormat):
        written = write_export(given, to, tmp_path / to, FACTS)
        columns = Columns.of(OF_CHATS.get(to, {}) if chat else {})
        again = read(tmp_path / to, tmp_path / f"again-{to}", columns=columns, chat=chat and to in OWN)
        left_out = written.not_written.total()
        assert left_out == (2 if (to, name, chat) == ("axolotl", "preferences.jsonl", True) else 0)
        assert again.ids == pairs.ids if not left_out else set(again.ids) < set(pairs.ids)
        assert len(again.ids) + left_out == len(pairs.ids)
