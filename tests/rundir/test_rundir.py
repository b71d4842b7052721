"""The run directory: done, going on, refused, redone; damaged files; what a URI may be."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from congrad_ray.data.tables import prompt_id, row_id, table_of
from congrad_ray.rundir.directory import (
    FILES,
    MANIFEST,
    STARTED,
    RunDirectory,
    RunDirectoryError,
    StageFolder,
    fingerprint,
)
from congrad_ray.rundir.ids import Ids
from congrad_ray.stages.select.schema import SCORES

ROWS = [
    {
        "pair_id": f"p{i}",
        "language": "en",
        **{name: 0.1 * i for name in ("score", "cosine", "dot", "worst_cosine", "own_cosine")},
        "kept": i > 1,
    }
    for i in range(4)
]


@pytest.fixture(params=["path", "uri"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(tmp_path / "run" if request.param == "path" else f"file://{tmp_path}/run")


def test_a_stage_goes_from_new_to_begun_to_done(run: RunDirectory) -> None:
    stage = run.stage("selection", 0)
    assert stage.begin("f1", redo=False, what="select") == "new"
    assert stage.begin("f1", redo=False, what="select") == "continue"
    stage.write_table("part-0.parquet", table_of(ROWS, SCORES))
    assert stage.rows_so_far() == 4 and stage.ids("pair_id") == Ids.from_parts([["p0", "p1", "p2", "p3"]])
    stage.commit("select", 0, "f1", {"keep": 0.5}, {}, 4, 1.0, {"kept": 2})
    assert stage.begin("f1", redo=False, what="select") == "done"
    manifest = stage.manifest()
    assert manifest is not None and manifest.rows == 4 and manifest.versions["ray"]


@pytest.mark.parametrize("finished", [True, False])
def test_another_fingerprint_is_refused_or_redone(run: RunDirectory, finished: bool) -> None:
    stage = run.stage("selection", 0)
    stage.begin("f1", redo=False, what="select")
    stage.write_table("part-0.parquet", table_of(ROWS, SCORES))
    if finished:
        stage.commit("select", 0, "f1", None, {}, 4, 1.0, {})
    with pytest.raises(RunDirectoryError, match=r"f1, now f2.*--redo"):
        stage.begin("f2", redo=False, what="select")
    assert stage.rows_so_far() == 4
    assert stage.begin("f2", redo=True, what="select") == "new"
    assert stage.rows_so_far() == 0


def test_a_damaged_part_is_dropped_and_its_rows_come_again(run: RunDirectory) -> None:
    stage = run.stage("selection", 0)
    stage.write_table("part-0.parquet", table_of(ROWS[:2], SCORES))
    stage.write_table("part-1.parquet", table_of(ROWS[2:], SCORES))
    whole = Path(f"{stage.path}/part-1.parquet").read_bytes()
    Path(f"{stage.path}/part-1.parquet").write_bytes(whole[: len(whole) // 2])
    assert stage.rows_so_far() == 2
    assert stage.ids("pair_id") == Ids.from_parts([["p0", "p1"]])
    assert [Path(p).name for p in stage.files(".parquet")] == ["part-0.parquet"]


def test_a_damaged_manifest_means_not_done(run: RunDirectory) -> None:
    stage = run.stage("selection", 0)
    stage.begin("f1", redo=False, what="select")
    stage.write_bytes(MANIFEST, b'{"stage": "sel')
    assert stage.manifest() is None
    assert stage.begin("f1", redo=False, what="select") == "continue"


def test_rows_in_quarantine_count_as_done(run: RunDirectory) -> None:
    stage = run.stage("selection", 0)
    stage.write_quarantine(
        [
            {"row_id": "p9", "language": None, "reason": "too_long", "detail": "x"},
            {"row_id": "p8", "language": "en", "reason": "too_long", "detail": ""},
        ]
    )
    assert stage.ids("pair_id") == Ids.from_parts([["p8", "p9"]])
    assert stage.quarantine_counts() == {"too_long": 2}


def test_a_file_or_an_unknown_scheme_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirectoryError, match="is a file"):
        RunDirectory.open(tmp_path / "file")
    with pytest.raises(RunDirectoryError, match="nosuch"):
        RunDirectory.open("nosuch://bucket/run")


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory.open(tmp_path / "run")
    run.write_bytes("a", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("congrad_ray.rundir.directory.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.write_bytes("a", b"new")
    assert run.read_bytes("a") == b"old"
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["a"]


def test_fingerprints_depend_on_stage_settings_and_inputs() -> None:
    base = fingerprint("select", {"keep": 0.5}, {"pairs": "a"})
    assert base == fingerprint("select", {"keep": 0.5}, {"pairs": "a"})
    assert base not in {
        fingerprint("select", {"keep": 0.4}, {"pairs": "a"}),
        fingerprint("select", {"keep": 0.5}, {"pairs": "b"}),
        fingerprint("sketch", {"keep": 0.5}, {"pairs": "a"}),
    }


def test_ids_keep_parts_apart_and_are_stable() -> None:
    assert row_id("a", "bc") != row_id("ab", "c")
    message = [{"role": "user", "content": "Hi"}]
    assert prompt_id("en", message) != prompt_id("de", message)
    # Stored runs are joined by these ids: they may never change.
    assert prompt_id("en", message) == "bc48788dd8f309f93e82f87349c88fa1"


def test_a_row_without_a_column_or_of_another_type_is_reported() -> None:
    with pytest.raises(ValueError, match="column 'kept' is missing"):
        table_of([{key: value for key, value in ROWS[0].items() if key != "kept"}], SCORES)
    with pytest.raises(ValueError, match="column 'cosine' should be double"):
        table_of([{**ROWS[0], "cosine": "high"}], SCORES)
    assert table_of([], SCORES).schema == SCORES


def test_damaged_files_of_a_finished_stage_are_deleted_and_it_goes_on(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run.stage("pairs", 0)
    assert folder.begin("one", False, "pair") == "new"
    for number in range(3):
        folder.write_table(f"part-{number}.parquet", table_of(ROWS[number : number + 1], SCORES))
    folder.commit("pair", 0, "one", None, {}, 3, 0.0, {})
    assert folder.begin("one", False, "pair") == "done"
    folder.write_bytes("part-1.parquet", folder.read_bytes("part-1.parquet")[:-7])
    folder.filesystem.delete_file(f"{folder.path}/part-2.parquet")
    assert folder.begin("one", False, "pair") == "continue"
    assert caplog.messages == [
        "2 files are missing or damaged (part-1.parquet, part-2.parquet): what was in them is done again"
    ]
    assert folder.ids("pair_id") == Ids.from_parts([["p0"]])
    assert folder.begin("one", False, "pair") == "continue"


def test_a_flipped_bit_is_reported_and_not_read(run: RunDirectory) -> None:
    folder = run.stage("pairs", 0)
    numbers = np.random.default_rng(0).random(10_000)
    folder.write_table("part.parquet", pa.table({"number": numbers}))
    data = bytearray(folder.read_bytes("part.parquet"))
    data[len(data) // 2] ^= 1
    folder.write_bytes("part.parquet", bytes(data))
    with pytest.raises(RunDirectoryError, match=r"part\.parquet cannot be read.*run the stage that made it again"):
        folder.read_table()


def test_files_of_unknown_settings_are_refused(run: RunDirectory) -> None:
    folder = run.stage("pairs", 0)
    folder.write_table("part.parquet", table_of(ROWS, SCORES))
    with pytest.raises(RunDirectoryError, match=r"neither _manifest\.json nor _started\.json"):
        folder.begin("one", False, "pair")
    assert folder.begin("one", True, "pair") == "new"
    assert not folder.files(".parquet")


def committed(run: RunDirectory, parts: int) -> StageFolder:
    folder = run.stage("pairs", 0)
    folder.begin("one", False, "pair")
    for number in range(parts):
        (folder / "deep").write_table(f"part-{number}.parquet", table_of(ROWS[:1], SCORES))
    folder.commit("pair", 0, "one", None, {}, parts, 0.0, {})
    return folder


def test_a_manifest_does_not_grow_with_the_files_that_it_is_of(run: RunDirectory) -> None:
    manifests = []
    for parts in (1, 100):
        folder = committed(run, parts)
        assert [len(folder.committed_files() or {}), folder.begin("one", False, "pair")] == [parts, "done"]
        manifests.append(folder.read_bytes(MANIFEST))
        folder.delete()
    assert abs(len(manifests[1]) - len(manifests[0])) < 20


@pytest.mark.parametrize("how", ["gone", "cut", "of another commit"])
def test_a_stage_whose_list_of_files_is_damaged_goes_on(run: RunDirectory, how: str) -> None:
    folder = committed(run, 2)
    files = folder.read_bytes(FILES)
    folder.filesystem.delete_file(f"{folder.path}/{FILES}")
    if how == "cut":
        folder.write_bytes(FILES, files[:-20])
    if how == "of another commit":
        folder.delete()
        committed(run, 1)
        folder.write_bytes(FILES, files)
    assert folder.begin("one", False, "pair") == "continue"
    assert len((folder / "deep").files(".parquet")) > 0 and folder.manifest() is None
    folder.commit("pair", 0, "one", None, {}, 2, 0.0, {})
    assert folder.begin("one", False, "pair") == "done"


def test_a_kill_between_the_list_of_files_and_the_manifest_leaves_a_stage_that_goes_on(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: StageFolder, name: str, value: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(StageFolder, "write_json", killed)
        run.stage("pairs", 0).commit("pair", 0, "one", None, {}, 0, 0.0, {})
    folder = run.stage("pairs", 0)
    assert folder.exists(FILES) and folder.manifest() is None
    folder.write_json(STARTED, {"fingerprint": "one"})
    assert folder.begin("one", False, "pair") == "continue"
    assert committed(run, 1).begin("one", False, "pair") == "done"


def test_files_that_an_older_manifest_lists_are_still_checked(run: RunDirectory) -> None:
    folder = committed(run, 2)
    manifest = folder.read_json(MANIFEST)
    del manifest["stored"]
    folder.write_json(MANIFEST, {**manifest, "files": folder.committed_files()})
    folder.filesystem.delete_file(f"{folder.path}/{FILES}")
    assert folder.begin("one", False, "pair") == "done"
    found = folder.manifest()
    assert found is not None and (found.stored.files, found.stored.parts) == (2, 2)
    folder.filesystem.delete_file(f"{folder.path}/deep/part-1.parquet")
    assert folder.begin("one", False, "pair") == "continue"
