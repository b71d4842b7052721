"""Rows from one table to the next: what fails, what comes twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import validate
from congrad_ray.data.tables import FAILURE, FAILURE_FIELD, failure, quarantined
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError
from congrad_ray.rundir.ids import Ids
from congrad_ray.runtime.context import Context
from congrad_ray.runtime.requests import read_requests
from congrad_ray.runtime.rows import outcome_of, write_rows

SCHEMA = pa.schema([("id", pa.string()), ("language", pa.string())])


def context_in(folder: Path, failed_share: float) -> Context:
    values = {"name": "t", "prompts": {"languages": ["en"]}, "limits": {"failed_share": failed_share}}
    run = RunDirectory.open(folder)
    return Context(validate(Recipe, values, "t"), Profile(name="t"), run, 0, run.stage("rows", 0))


@pytest.mark.parametrize("failed_share", [0.5, 0.1])
def test_too_many_failed_rows_stop_a_stage_with_their_reasons(
    tmp_path: Path, failed_share: float, shared_ray: None
) -> None:
    import ray

    context = context_in(tmp_path, failed_share)
    rows = [
        {"id": str(n), "language": "en", FAILURE: failure("too_odd", f"{n} is odd") if n < 20 else None}
        for n in range(100)
    ]
    table = pa.Table.from_pylist(rows, schema=pa.schema([*SCHEMA, FAILURE_FIELD]))
    if failed_share == 0.5:
        write_rows(ray.data.from_arrow(table).repartition(10), context, SCHEMA, "id", 100)
        assert outcome_of(context.output, "id").rows == 80
        return
    with pytest.raises(RunDirectoryError) as error:
        write_rows(ray.data.from_arrow(table).repartition(10), context, SCHEMA, "id", 100)
    assert "limits.failed_share (0.1)" in str(error.value)
    assert re.search(r"too_odd: 20 rows, such as: \d+ is odd", str(error.value))


def test_rows_that_come_twice_are_kept_once_and_good_ones_leave_quarantine(tmp_path: Path) -> None:
    output = context_in(tmp_path, 1.0).output

    def part(*ids: str) -> pa.Table:
        return pa.table({"id": list(ids), "language": ["en"] * len(ids)}, schema=SCHEMA)

    for name, table in (("a", part("1", "2")), ("b", part("2", "3")), ("c", part("3"))):
        output.write_table(f"part-{name}.parquet", table)
    for name, ids in (("a", ["3", "4"]), ("b", ["4"])):
        output.write_quarantine([quarantined(i, "en", "odd", "is odd") for i in ids], f"part-{name}.parquet")
    outcome = outcome_of(output, "id")
    assert outcome.rows == 3 and outcome.counters["quarantined"] == {"odd": 1}
    assert sorted(output.read_table(["id"])["id"].to_pylist()) == ["1", "2", "3"]
    assert (output / "quarantine").read_table(["row_id"])["row_id"].to_pylist() == ["4"]


def test_requests_that_are_answered_are_not_made_again(tmp_path: Path, shared_ray: None) -> None:
    source = context_in(tmp_path, 1.0).output
    source.write_table("rows.parquet", pa.table({"id": ["1", "2"], "language": ["en"] * 2}, schema=SCHEMA))

    def twice(row: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"id": f"{row['id']}-{number}", "language": row["language"]} for number in range(2)]

    done = Ids.from_parts([["1-0", "1-1", "2-1", "another"]])
    assert read_requests(source, twice, SCHEMA, done).take_all() == [{"id": "2-0", "language": "en"}]


def test_a_stage_whose_rows_are_not_all_there_is_not_done(tmp_path: Path) -> None:
    output = context_in(tmp_path, 1.0).output
    output.write_table("part-a.parquet", pa.table({"id": ["1", "2"], "language": ["en"] * 2}, schema=SCHEMA))
    output.write_quarantine([quarantined("3", "en", "odd", "is odd")], "part-a.parquet")
    assert outcome_of(output, "id", expected=3).rows == 2
    with pytest.raises(RunDirectoryError, match=r"4 rows were asked for, but .* has 2 and 1 in quarantine"):
        outcome_of(output, "id", expected=4)
