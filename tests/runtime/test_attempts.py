"""Rows that kill their workers: real processes that die, on a real Ray."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from congrad_ray.data.tables import FAILURE, FAILURE_FIELD
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.rundir.ids import Ids
from congrad_ray.runtime.attempts import Attempts, attempt, attempts, killed_worker
from congrad_ray.runtime.rows import outcome_of, read_missing_batches, write_rows

from .test_rows import SCHEMA, context_in


def test_a_row_is_tried_in_company_then_alone_then_never() -> None:
    known = Attempts()
    for _ in range(3):
        assert known.begin(["good", "bad"]) == ["together", "together"]
    assert known.begin(["good", "bad", "new"]) == ["alone", "alone", "together"]
    known.begin_alone("good")
    known.end(["good"])
    for _ in range(2):
        assert known.begin(["good", "bad"])[1] == "alone"
        known.end(["good"])
        known.begin_alone("bad")
    assert known.begin(["good", "bad", "new"]) == ["together", "never", "together"]


class Killed:
    """A worker that dies of some rows, and notes on the disk every row that it works on."""

    def __init__(self, actor: Any, poison: frozenset[str], notes: Path) -> None:
        self._actor, self._poison, self._notes = actor, poison, notes

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows: list[dict[str, Any]] = [{**row, FAILURE: None} for row in batch.to_pylist()]

        def work(places: list[int]) -> None:
            for place in places:
                (self._notes / f"{rows[place]['id']} {time.time_ns()}").touch()
                if rows[place]["id"] in self._poison:
                    os._exit(1)

        for place in attempt(self._actor, batch["id"].to_pylist(), work):
            rows[place][FAILURE] = killed_worker()
        return pa.Table.from_pylist(rows, schema=pa.schema([*SCHEMA, FAILURE_FIELD]))


@pytest.mark.timeout(600)
def test_rows_that_kill_their_workers_are_set_apart_and_no_other_is_lost(tmp_path: Path, shared_ray: None) -> None:
    from ray.data import ActorPoolStrategy

    context = context_in(tmp_path / "run", 0.2)
    source = RunDirectory.open(tmp_path / "run").stage("source", 0)
    rows = [{"id": f"{number:02}", "language": "en"} for number in range(40)]
    source.write_table("rows.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    poison = frozenset(["03", "17", "18"])
    notes = tmp_path / "notes"
    notes.mkdir()
    missing = read_missing_batches(source, context.output, "id", 8, 2**30)
    done = missing.dataset.map_batches(
        Killed,
        fn_constructor_args=(attempts(), poison, notes),
        batch_format="pyarrow",
        batch_size=None,
        compute=ActorPoolStrategy(size=2),
        num_cpus=1,
    )
    write_rows(done, context, SCHEMA, "id", missing.count)
    assert outcome_of(context.output, "id").counters["quarantined"] == {"killed_worker": 3}
    assert set(context.output.read_table(["id"])["id"].to_pylist()) == {row["id"] for row in rows} - poison
    set_apart = (context.output / "quarantine").read_table().to_pylist()
    assert {row["row_id"] for row in set_apart} == poison
    assert all("died 5 times, 2 of them at nothing but this row" in row["detail"] for row in set_apart)
    tries = Counter(path.name.split()[0] for path in notes.iterdir())
    assert tries["03"] == 5 and tries["39"] == 1


def test_another_ray_in_the_same_process_has_an_actor_of_its_own(shared_ray: None) -> None:
    import ray

    from heads import connect_shared  # not above: the workers of other tests import this file, without `heads`

    for another in (False, True):
        if another:
            ray.shutdown()
            connect_shared()
        assert ray.get(attempts().begin.remote(["row"])) == ["together"]
        assert ray.get(attempts().begin.remote(["row"])) == ["together"]
        assert ray.get_runtime_context().get_job_id() == "01000000"


def test_batches_do_not_depend_on_what_is_done(tmp_path: Path, shared_ray: None) -> None:
    import ray

    run = RunDirectory.open(tmp_path)
    source, output = run.stage("source", 0), run.stage("rows", 0)
    ids = [f"{number:04}" for number in range(2500)]  # several row groups
    for name, part in (("a", ids[:1500]), ("b", ids[1500:])):
        source.write_table(
            f"{name}.parquet", pa.table({"id": part, "language": ["en"] * len(part)}, schema=SCHEMA)
        )
    batches = [ids[start : min(start + 64, 1500)] for start in range(0, 1500, 64)]
    batches += [ids[start : start + 64] for start in range(1500, 2500, 64)]

    def found() -> list[list[str]]:
        missing = read_missing_batches(source, output, "id", 64, 2**30)
        blocks = [ray.get(ref)["id"].to_pylist() for ref in missing.dataset.to_arrow_refs()]
        assert missing.count <= sum(map(len, blocks))
        assert missing.ids == Ids.from_parts([ids]), "of all rows, whether they are done or not"
        assert missing.languages == ["en"]
        return sorted(block for block in blocks if block)

    assert found() == batches
    for batch in (batches[0], batches[23], batches[24], batches[30][:10]):
        output.write_table(f"{batch[0]}.parquet", pa.table({"id": batch, "language": ["en"] * len(batch)}))
    assert found() == [batch for number, batch in enumerate(batches) if number not in (0, 23, 24)]
    for batch in batches:
        output.write_table(f"{batch[0]}.parquet", pa.table({"id": batch, "language": ["en"] * len(batch)}))
    assert found() == []


def test_batches_of_long_rows_are_smaller(tmp_path: Path, shared_ray: None) -> None:
    run = RunDirectory.open(tmp_path)
    source, output = run.stage("source", 0), run.stage("rows", 0)
    for name, text in (("long", "x" * 1000), ("short", "x")):
        rows = pa.table(
            {"id": [f"{name}{number}" for number in range(40)], "text": [f"{text}{n}" for n in range(40)]}
        )
        source.write_table(f"{name}.parquet", rows)
    missing = read_missing_batches(source, output, "id", 64, 5000)
    blocks = missing.dataset.iter_batches(batch_format="pandas", batch_size=None)
    sizes = sorted(block["id"].count() for block in blocks)
    assert (
        missing.count == 80
        and missing.batches == len(sizes)
        and sizes[-1] == 40
        and 2 <= sizes[0] <= sizes[-2] <= 5
    )
