"""Requests of groups of rows that lie in several parts."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from congrad_ray.data.tables import row_id
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.rundir.ids import Ids, keys_of
from congrad_ray.runtime import requests
from congrad_ray.runtime.requests import read_grouped_requests

SCHEMA = pa.schema([pa.field("id", pa.string()), pa.field("members", pa.list_(pa.string()))])


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("here", [True, False], ids=["in this process", "by a shuffle"])
def test_groups_are_whole_wherever_their_rows_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    monkeypatch.setattr(requests, "_ROWS_HERE", 100 if here else 0)
    monkeypatch.setattr(requests, "_ROWS_TOGETHER", 10)
    folder = RunDirectory.open(tmp_path / "run").stage("responses", 0)
    rows = [{"group": f"g{number % 7}", "row": f"r{number:02}"} for number in range(40)]
    for part in range(4):
        folder.write_table(f"part-{part}.parquet", pa.Table.from_pylist(rows[part::4]))

    def expand(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
        assert len({row["group"] for row in group}) == 1
        return [{"id": row_id(group[0]["group"]), "members": sorted(row["row"] for row in group)}]

    done = Ids.from_keys([keys_of(pa.chunked_array([[row_id("g3")]]))])
    found = read_grouped_requests(folder, "group", expand, SCHEMA, done).take_all()
    assert {row["id"]: list(row["members"]) for row in found} == {
        row_id(f"g{group}"): [f"r{number:02}" for number in range(group, 40, 7)]
        for group in range(7)
        if group != 3
    }
