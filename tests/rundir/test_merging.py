"""Small parts merged into large ones, cut off anywhere."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from congrad_ray.data.tables import row_id
from congrad_ray.rundir import merging
from congrad_ray.rundir.directory import Folder, RunDirectory, StageFolder
from congrad_ray.rundir.merging import merge, planned_merges
from congrad_ray.runtime.rows import outcome_of

PARTS = 90


@pytest.fixture
def parts(tmp_path: Path) -> StageFolder:
    """Parts of 1 to 30 rows, named as those of a run."""
    folder = RunDirectory.open(tmp_path / "run").stage("sketches", 0)
    chance = random.Random(0)
    for part in range(PARTS):
        ids = [row_id(part, number) for number in range(chance.randint(1, 30))]
        rows = {"pair_id": ids, "sketch": pa.array([i.encode() for i in ids], pa.binary(32))}
        folder.write_table(f"part-{row_id(*ids)}.parquet", pa.table(rows))
    return folder


@pytest.fixture(params=[100, 10**6])
def rows_per_part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(merging, "_ROWS_PER_PART", request.param)
    return int(request.param)


def merge_all(folder: Folder) -> None:
    for what in planned_merges(folder):
        merge(folder, what)


def content(folder: Folder) -> dict[str, bytes]:
    return {Path(path).name: Path(path).read_bytes() for path in folder.files(recursive=True)}


def test_merged_parts_have_the_rows_in_the_order_of_the_parts(parts: StageFolder, rows_per_part: int) -> None:
    before = parts.read_table()
    merge_all(parts)
    assert parts.read_table().equals(before)
    merged = [pq.ParquetFile(path) for path in parts.files()]
    assert len(merged) == -(-len(before) // rows_per_part)
    assert all(file.num_row_groups <= 2 for file in merged), "small row groups are put together"
    assert planned_merges(parts) == []


def test_row_groups_are_bounded(parts: StageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_BYTES_PER_GROUP", 64 * 300)  # of 64 and a few bytes each
    before = parts.read_table()
    merge_all(parts)
    [path] = parts.files()
    groups = [
        pq.read_metadata(path).row_group(group).num_rows for group in range(pq.read_metadata(path).num_row_groups)
    ]
    assert max(groups) < 300 + 30 and len(groups) > len(before) / 330
    assert parts.read_table().equals(before)


def test_few_or_large_parts_and_other_files_stay(parts: StageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.write_table("pairs.parquet", parts.read_table())
    parts.write_bytes("summary.json", b"{}")
    (parts / "quarantine").write_table("part-0.parquet", pa.table({"row_id": ["x"]}))
    with monkeypatch.context() as patched:
        patched.setattr(merging, "_FEW_PARTS", PARTS)
        assert planned_merges(parts) == []
    with monkeypatch.context() as patched:
        patched.setattr(merging, "_LARGE_PART", 100)
        assert planned_merges(parts) == []
    merge_all(parts)
    assert content(parts).keys() == {
        "merged-00000-of-00001.parquet",
        "pairs.parquet",
        "summary.json",
        "part-0.parquet",
    }
    assert planned_merges(parts / "nothing") == []


@pytest.mark.parametrize("seed", range(8))
def test_a_merge_that_is_cut_off_ends_as_one_that_is_not(
    parts: StageFolder, rows_per_part: int, tmp_path: Path, seed: int
) -> None:
    """Killed in any of the groups, which are merged at the same time, before or while sources are deleted."""
    whole = Path(f"{parts.path}-undisturbed")
    shutil.copytree(parts.path, whole)
    undisturbed = RunDirectory.open(tmp_path / "run").stage("sketches-undisturbed", 0)
    merge_all(undisturbed)
    rows, before = parts.read_table(), content(parts)
    chance = random.Random(seed)
    for what in planned_merges(parts):
        how = chance.choice(["done", "not begun", "deleting"])
        if how != "not begun":
            merge(parts, what)
        if how == "deleting":
            for name in chance.sample(what.sources, chance.randint(1, len(what.sources))):
                parts.write_bytes(name, before[name])
    outcome = outcome_of(parts, "pair_id")
    merge_all(parts)
    assert outcome.rows == len(rows)
    assert content(parts) == content(undisturbed)


def test_rows_that_are_done_again_after_damage_go_where_they_were(
    parts: StageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_ROWS_PER_PART", 100)
    before = content(parts)
    merges = planned_merges(parts)
    for what in merges:
        merge(parts, what)
    merged = content(parts)
    parts.filesystem.delete_file(f"{parts.path}/{merges[2].target}")
    for name in merges[2].sources:  # they are made again, with the same names
        parts.write_bytes(name, before[name])
    merge_all(parts)
    assert content(parts) == merged
    # A row that comes later, out of quarantine, is added to the part of its group.
    ids = [row_id("late")]
    rows = {"pair_id": ids, "sketch": pa.array([i.encode() for i in ids], pa.binary(32))}
    parts.write_table(f"part-{row_id(*ids)}.parquet", pa.table(rows))
    merge_all(parts)
    assert content(parts).keys() == merged.keys() and ids[0] in parts.read_table()["pair_id"].to_pylist()
