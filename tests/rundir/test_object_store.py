"""A run directory on an S3 server gives what it gives on a local path."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from congrad_ray.cli.main import app
from congrad_ray.config.recipe import Sketch, load_recipe
from congrad_ray.data.tables import response_id, table_of
from congrad_ray.deploy.doctor import examine
from congrad_ray.modeling.source import policy
from congrad_ray.rundir.directory import MANIFEST, STARTED, Folder, RunDirectory, RunDirectoryError, StageFolder
from congrad_ray.rundir.ids import Ids
from congrad_ray.stages.generate.schema import RESPONSES
from congrad_ray.stages.judge.schema import JUDGEMENTS
from congrad_ray.stages.select.schema import SCORES
from congrad_ray.stages.sketch.schema import sketch_bytes, sketch_numbers, sketches_schema

WIDTH = 64
KEY, SECRET = "AKEYOFTHETESTS", "a-secret-nobody-may-see"
ROWS = [
    {
        "pair_id": f"p{i}",
        "language": "en",
        **{name: 0.1 * i for name in ("score", "cosine", "dot", "worst_cosine", "own_cosine")},
        "kept": i > 1,
    }
    for i in range(4)
]


@pytest.fixture
def stage(store_uri: str) -> StageFolder:
    return RunDirectory.open(store_uri).stage("selection", 0)


def bucket_of(uri: str) -> str:
    return uri.removeprefix("s3://").split("/")[0]


def test_what_is_written_is_there_and_what_is_missing_is_missing(stage: StageFolder) -> None:
    assert not stage.exists() and not stage.exists("a.json")
    assert stage.files() == stage.files(".parquet", recursive=True) == []
    assert stage.read_json("a.json") is None and stage.manifest() is None
    assert (stage.rows_so_far(), len(stage.ids("pair_id")), stage.quarantine_counts()) == (0, 0, {})
    stage.delete()
    stage.write_json("a.json", {"ü": [1, None]})
    (stage / "deep" / "er").write_bytes("b.bin", b"")
    assert stage.exists() and stage.exists("deep")
    assert stage.read_json("a.json") == {"ü": [1, None]}
    assert stage.files() == [f"{stage.path}/a.json"]
    assert stage.files(recursive=True) == [f"{stage.path}/a.json", f"{stage.path}/deep/er/b.bin"]
    (stage / "deep").delete()
    assert not stage.exists("deep") and stage.exists("a.json")
    stage.delete()
    assert not stage.exists()
    with pytest.raises(RunDirectoryError, match="no Parquet file"):
        stage.read_table()


def test_a_stage_goes_from_new_to_begun_to_done_and_is_redone(stage: StageFolder) -> None:
    assert [stage.begin("f1", redo=False, what="select") for _ in range(2)] == ["new", "continue"]
    stage.write_table("part-0.parquet", table_of(ROWS[:3], SCORES))
    stage.write_quarantine([{"row_id": "p9", "language": None, "reason": "too_long", "detail": "x"}])
    assert stage.rows_so_far() == 3 and stage.ids("pair_id") == Ids.from_parts([["p0", "p1", "p2", "p9"]])
    assert stage.quarantine_counts() == {"too_long": 1}
    stage.commit("select", 0, "f1", {"keep": 0.5}, {}, 3, 1.0, {"kept": 2})
    assert stage.begin("f1", redo=False, what="select") == "done"
    with pytest.raises(RunDirectoryError, match=r"f1, now f2.*--redo"):
        stage.begin("f2", redo=False, what="select")
    assert stage.begin("f2", redo=True, what="select") == "new"
    assert stage.files(recursive=True) == [f"{stage.path}/{STARTED}"]


def test_a_redo_cut_short_while_it_deletes_leaves_no_part_to_the_other_settings(
    stage: StageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.begin("f1", redo=False, what="select")
    for number in range(4):
        stage.write_table(f"part-{number}.parquet", table_of(ROWS[number : number + 1], SCORES))
    stage.commit("select", 0, "f1", None, {}, 4, 1.0, {})

    def killed(deletes: Any, *arguments: Any) -> None:
        """In the middle of deleting in the order of the keys, as stores do: _manifest, _started, part-0, ..."""
        for path in stage.files()[:3] if isinstance(deletes, Folder) else arguments[1][:2]:
            stage.filesystem.delete_file(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "delete", killed)
        patched.setattr("concurrent.futures.ThreadPoolExecutor.map", killed)
        with pytest.raises(KeyboardInterrupt):
            stage.begin("f2", redo=True, what="select")
    assert stage.rows_so_far() > 0
    with pytest.raises(RunDirectoryError, match=r"other settings.*f1, now f2"):
        stage.begin("f2", redo=False, what="select")
    assert stage.begin("f1", redo=False, what="select") == "continue"
    assert stage.begin("f2", redo=True, what="select") == "new"
    assert len(stage.ids("pair_id")) == 0


def test_a_damaged_part_is_dropped_and_its_rows_come_again(stage: StageFolder) -> None:
    for number in range(4):
        stage.write_table(f"part-{number}.parquet", table_of(ROWS[number : number + 1], SCORES))
    whole = stage.read_bytes("part-1.parquet")
    stage.write_bytes("part-1.parquet", whole[: len(whole) // 2])
    stage.write_bytes("part-2.parquet", b"")
    stage.write_bytes("part-3.parquet", whole[:-12] + b"\xff" * 4 + whole[-8:])
    assert stage.rows_so_far() == 1
    assert stage.ids("pair_id") == Ids.from_parts([["p0"]])
    assert stage.files(".parquet") == [f"{stage.path}/part-0.parquet"]


def test_a_damaged_manifest_means_not_done(stage: StageFolder) -> None:
    stage.begin("f1", redo=False, what="select")
    stage.write_bytes(MANIFEST, b'{"stage": "sel')
    assert stage.begin("f1", redo=False, what="select") == "continue"


def test_a_store_that_does_not_answer_costs_no_part(stage: StageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read at the moment is not what is damaged."""
    stage.write_table("part-0.parquet", table_of(ROWS, SCORES))

    read_metadata = pq.read_metadata

    def too_busy(where: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(where, pa.BufferReader):
            return read_metadata(where, *arguments, **options)
        raise OSError("AWS Error SLOW_DOWN during GetObject operation")

    monkeypatch.setattr("congrad_ray.rundir.directory.pq.read_metadata", too_busy)
    assert stage.ids("pair_id") == Ids.from_parts([["p0", "p1", "p2", "p3"]])
    assert len(stage.parts()) == 1
    monkeypatch.setattr("congrad_ray.rundir.directory.pq.ParquetFile", too_busy)
    with pytest.raises(RunDirectoryError, match="SLOW_DOWN"):
        stage.ids("pair_id")
    assert stage.files(".parquet")


def test_a_write_that_is_interrupted_leaves_nothing(stage: StageFolder) -> None:
    with pytest.raises(KeyboardInterrupt), stage.output_stream("part-0.parquet") as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert stage.files() == []


def test_a_policy_on_a_store_is_fetched_once_and_again_when_it_was_trained_again(
    tmp_path: Path, store_uri: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONGRAD_RAY_CACHE", str(tmp_path))
    run, loaded = RunDirectory.open(store_uri), load_recipe(recipe)
    folder = run.stage("policy", 0)

    def train(weights: bytes, finished_at: str) -> Path:
        monkeypatch.setattr("congrad_ray.rundir.directory.time.strftime", lambda *arguments: finished_at)
        folder.write_bytes("config.json", b"{}")
        folder.write_bytes("model.safetensors", weights)
        folder.commit("train", 0, "f1", None, {}, 1, 0.0, {})
        return Path(policy(loaded, run, 1).local_path())

    first = train(b"old", "2026-01-01T00:00:00Z")
    assert (first / "model.safetensors").read_bytes() == b"old"
    shutil.rmtree(first)
    unfinished = first.with_suffix(".partial")  # as a killed fetch leaves it
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"ol")
    assert (Path(policy(loaded, run, 1).local_path()) / "model.safetensors").read_bytes() == b"old"
    (first / "here").touch()
    assert (Path(policy(loaded, run, 1).local_path()) / "here").exists()
    second = train(b"new", "2026-01-01T00:00:01Z")
    assert (second / "model.safetensors").read_bytes() == b"new"


WRITE_MUCH = """
import sys
from congrad_ray.modeling.source import policy
from congrad_ray.config.recipe import Sketch, load_recipe
from congrad_ray.rundir.directory import RunDirectory
RunDirectory.open(sys.argv[1]).stage("selection", 0).write_bytes("part-0.parquet", bytes(200 * 2**20))
"""


def test_a_writer_killed_in_the_middle_of_an_upload_leaves_nothing(
    stage: StageFolder, store_uri: str, s3_server: str
) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITE_MUCH, store_uri])
    try:
        address = f"{s3_server}/{bucket_of(store_uri)}?uploads"
        while b"<UploadId>" not in (found := urllib.request.urlopen(address, timeout=10).read()):
            assert writer.poll() is None, "the upload ended before it was seen"
            time.sleep(0.01)
        assert b"part-0.parquet" in found
    finally:
        writer.kill()
        writer.wait()
    time.sleep(0.5)
    assert not stage.exists("part-0.parquet") and stage.files() == []
    stage.write_table("part-0.parquet", table_of(ROWS, SCORES))
    assert stage.rows_so_far() == 4


LANGUAGES = ("de", "en")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file with prompts of its own, one of them unusable; no stage of the tests loads its model."""
    folder = tmp_path_factory.mktemp("recipe")
    rows = [{"prompt": f"{tag} {n}", "language": tag} for n in range(14) for tag in LANGUAGES]
    lines = [json.dumps(row) for row in [*rows, {"prompt": " ", "language": "en"}]]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(lines))
    values = {
        "name": "store",
        "model": {"name": "none", "max_length": 64},
        "prompts": {
            **{split: {"name": str(prompts)} for split in ("train", "evaluation")},
            "languages": list(LANGUAGES),
            "train_per_language": 12,
            "evaluation_per_language": 2,
        },
        "generate": {"max_tokens": 16},
        "judge": {"max_tokens": 16},
        "evaluate": {"max_tokens": 16},
        "pair": {"language_check": False},
        "sketch": {"width": WIDTH, "dtype": "float32"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def perform(verb: str, recipe: Path, run: str | Path) -> None:
    app([verb, str(recipe), "--run", str(run)], standalone_mode=False)


def answer(run: RunDirectory) -> None:
    """The stages generate and judge: the longer of two responses is the better one."""
    prompts = [row for row in run.stage("prompts", None).read_table().to_pylist() if row["split"] == "train"]
    responses, judgements = [], []
    for prompt in prompts:
        for sample in range(2):
            shared = {
                **{name: prompt[name] for name in ("prompt_id", "language", "prompt")},
                "response_id": response_id(prompt["prompt_id"], 0, sample),
            }
            text = "word" * (sample + 1)
            responses.append(
                {**shared, "sample": sample, "seed": 0, "response": text, "truncated": False}
                | {"prompt_tokens": 3, "response_tokens": 1}
            )
            judgements.append({**shared, "score": sample * 2.0, "readable": 1, "asked": 1, "outputs": ["x"]})
    for folder, rows, schema in (("responses", responses, RESPONSES), ("judgements", judgements, JUDGEMENTS)):
        stage = run.stage(folder, 0)
        names = schema.names
        stage.begin(folder, redo=False, what=folder)
        stage.write_table("part.parquet", table_of([{n: row[n] for n in names} for row in rows], schema))
        stage.commit(folder, 0, folder, None, {}, len(rows), 0.0, {})


def sketch(run: RunDirectory) -> None:
    """The stage sketch: two parts of sketches that are drawn, with a shift by language."""
    draw = np.random.default_rng(1)
    shift = {language: draw.normal(size=WIDTH) for language in LANGUAGES}
    rows = []
    for pair in sorted(run.stage("pairs", 0).read_table().to_pylist(), key=lambda row: row["pair_id"]):
        numbers = (draw.normal(size=WIDTH) + shift[pair["language"]]).astype(np.float32)
        ones = ("sketch_scale", "norm", "coefficient", "chosen_logps", "rejected_logps")
        counts = ("prompt_tokens", "chosen_tokens", "rejected_tokens", "positions", "attention_padding")
        rows.append(
            {
                **{name: pair[name] for name in ("pair_id", "language")},
                "sketch": sketch_bytes(numbers[None])[0],
                **dict.fromkeys(ones, 1.0),
                **dict.fromkeys(counts, 3),
                **dict.fromkeys(("audit_exact", "audit_sketched")),
            }
        )
    stage = run.stage("sketches", 0)
    stage.begin("sketches", redo=False, what="sketch")
    for name, part in (("a.parquet", rows[:10]), ("b.parquet", rows[10:])):
        stage.write_table(name, table_of(part, sketches_schema(WIDTH, "float32")))
    stage.commit("sketch", 0, "sketches", None, {}, len(rows), 0.0, {})


def perform_all(recipe: Path, place: str | Path) -> RunDirectory:
    run = RunDirectory.open(place)
    perform("prompts", recipe, place)
    answer(run)
    perform("pair", recipe, place)
    sketch(run)
    perform("select", recipe, place)
    perform("report", recipe, place)
    return run


def everything_in(run: RunDirectory) -> dict[str, Any]:
    """What is in the files, by their path in the run: tables as rows, manifests, all else as bytes."""
    found: dict[str, Any] = {}
    for path in run.files(recursive=True):
        name = path.removeprefix(f"{run.path}/")
        data = run.read_bytes(name)
        if name.endswith(".parquet"):
            found[name] = pq.read_table(pa.BufferReader(data)).to_pylist()
        else:
            found[name] = json.loads(data) if name.endswith(MANIFEST) else data
    return found


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    """What should be the same wherever the run directory is: the report says where it is, and how long it took."""
    report = ("report.html", f"report/{MANIFEST}", "report/tables/stages.csv", "report/_files.arrow")
    for name in found:
        if name.endswith(MANIFEST):
            found[name] |= {"seconds": 0, "finished_at": ""}
    return {name: value for name, value in found.items() if name not in report}


def test_stages_give_on_a_store_what_they_give_on_a_local_path(
    tmp_path: Path,
    recipe: Path,
    store_uri: str,
    shared_ray: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With keys in the URI, which must not appear in anything that is written or printed."""
    uri = store_uri.replace("s3://", f"s3://{KEY}:{SECRET}@")
    local, store = perform_all(recipe, tmp_path / "run"), perform_all(recipe, uri)
    perform("select", recipe, uri)
    app(["status", "--run", uri], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "select (iteration 0): done already (24 rows)" in printed
    assert [line.split()[2] for line in printed.splitlines() if line.startswith("select  ")] == ["done"]
    found = everything_in(store)
    assert {"report.html", "recipe.yaml", "iteration-0/selection/direction.safetensors"} <= set(found)
    for keys in (KEY, SECRET):
        assert keys not in printed and keys not in repr(found)
    assert without_times(found) == without_times(everything_in(local))
    assert len(store.stage("selection", 0).read_table(name="selected.parquet")) == 12


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://KEYS@nobucket/run?QUERY", "there is no bucket nobucket"),
        ("s3://KEYS@nobucket/run?endpoint_override=http://127.0.0.1:9&scheme=http", "NETWORK_CONNECTION"),
        ("s3://KEYS@bucket/run?endpoint=x", "Unexpected query parameter"),
        ("s3://KEYS/unquoted@bucket/run", "Cannot parse URI: 's3://bucket/run'"),
        ("nosuch://KEYS@bucket/run", "Unrecognized filesystem type in URI: nosuch://bucket/run"),
    ],
)
def test_an_unusable_store_is_reported_without_its_keys(store_query: str, uri: str, message: str) -> None:
    uri = uri.replace("KEYS", f"{KEY}:{SECRET}").replace("QUERY", store_query)
    with pytest.raises(RunDirectoryError, match=message) as error:
        RunDirectory.open(uri)
    text = "".join(traceback.format_exception(error.value))
    assert "cannot open the run directory" in text and KEY not in text and SECRET not in text


def test_the_doctor_looks_at_a_store(store_uri: str) -> None:
    good, bad = examine(store_uri)[-1], examine(f"s3://{KEY}:{SECRET}@bucket/run?endpoint=x")[-1]
    assert good.found == f"s3://{bucket_of(store_uri)}/run can be reached" and not good.fix
    assert "Unexpected query" in bad.found and SECRET not in bad.found and bad.fix


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "--run", "URI"],
        ["pair", "RECIPE", "--run", "URI"],
        ["select", "--compare", "URI", "URI"],
        ["filter", "none.jsonl", "--model", "none", "--out", "URI"],
    ],
)
def test_errors_do_not_tell_keys(
    recipe: Path, store_uri: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    uri = store_uri.replace("s3://", f"s3://{KEY}:{SECRET}@")
    with pytest.raises(ValueError) as error:
        app([a.replace("URI", uri).replace("RECIPE", str(recipe)) for a in arguments], standalone_mode=False)
    message = "".join(capsys.readouterr()) + "".join(traceback.format_exception(error.value))
    assert "run" in message and KEY not in message and SECRET not in message


@pytest.mark.slow
def test_a_killed_driver_goes_on_from_the_store(
    tmp_path: Path, tiny_model: Path, store_uri: str, preference_rows: Any, filter_command: Any
) -> None:
    preferences = tmp_path / "preferences.jsonl"
    preferences.write_text("\n".join(json.dumps(row) for row in preference_rows(400, LANGUAGES)))
    subprocess.run(filter_command(preferences, tiny_model, tmp_path / "out"), check=True, timeout=300)
    out = RunDirectory.open(store_uri)
    sketches = StageFolder(out.filesystem, f"{out.path}/work/iteration-0/sketches")
    call = filter_command(preferences, tiny_model, store_uri)
    process = subprocess.Popen(call, start_new_session=True)
    try:
        end = time.monotonic() + 240
        while not sketches.files(".parquet"):
            assert process.poll() is None and time.monotonic() < end, "no part was written before the end"
            time.sleep(0.05)
        process.kill()
        process.wait(60)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # what is left of its Ray
    before = set(sketches.files(".parquet"))
    assert sketches.manifest() is None and before
    assert 0 < len(sketches.ids("pair_id")) < 400
    again = subprocess.run(call, check=True, timeout=300, capture_output=True, text=True)
    assert "sketch (iteration 0): resuming" in again.stdout
    assert f"kept pairs: s3://{bucket_of(store_uri)}/run/selected.parquet" in again.stdout
    assert before <= set(sketches.files(".parquet")), "rows that were there are not computed again"

    local = RunDirectory.open(tmp_path / "out")
    undisturbed = local / "work" / "iteration-0" / "sketches"
    tables = [folder.read_table().sort_by("pair_id") for folder in (undisturbed, sketches)]
    assert tables[0]["pair_id"].to_pylist() == tables[1]["pair_id"].to_pylist()
    assert len(set(tables[1]["pair_id"].to_pylist())) == len(tables[1]) == 400
    for one, other in zip(*(sketch_numbers(table, Sketch().stored_dtype) for table in tables), strict=True):
        assert np.linalg.norm(one - other) <= 0.01 * np.linalg.norm(one)
    kept = [folder.read_table(["prompt"], name="selected.parquet").to_pylist() for folder in (local, out)]
    assert kept[0] == kept[1] and len(kept[0]) == 200
