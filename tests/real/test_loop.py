"""The commands with real models on real text: filter and train, the whole loop, and going on after SIGKILL."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from congrad_ray.pipeline.order import STAGES
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.train.metrics import read_metrics
from faults.cluster import kill, left_over

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "jobs" / "recipes" / "smollm2.yaml"
LANGUAGES = ("en", "es", "de", "fr", "ru")
Row = dict[str, Any]
Settings = dict[str, object]


def congrad(verb: str, *arguments: object, settings: Settings | None = None) -> list[str]:
    overrides = [f"--set={key}={value}" for key, value in (settings or {}).items()]
    return [sys.executable, "-m", "congrad_ray", verb, *map(str, arguments), *overrides]


def run_to_end(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)  # with its seconds; pytest -s shows it
    return result.stdout


def run_killed(command: list[str], folder: Path, rays: str) -> dict[str, bytes]:
    """SIGKILL to the driver at the first part in `folder`, then to the rest of its Ray: the parts there are."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        end = time.monotonic() + 300
        while not list(folder.glob("part-*.parquet")):
            assert process.poll() is None and time.monotonic() < end, "no part was written before the end"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for left in left_over(rays):
            kill(left)
    assert not (folder / "_manifest.json").exists()
    return {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")}


def rows_of(folder: Path, id_column: str, parts: dict[str, bytes]) -> list[str]:
    """The ids in a folder, none of them twice; the parts that were there before are there as they were."""
    found = [i for path in folder.glob("*.parquet") for i in pq.read_table(path)[id_column].to_pylist()]
    assert len(found) == len(set(found))
    assert parts.items() <= {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")}.items()
    return found


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture
def prompts(tmp_path: Path, short_rows: Any) -> Path:
    """32 real prompts, mostly English: 24 to train on, and 2 in each of four languages to evaluate on."""
    wanted = {"en": 14, "es": 6, "de": 6, "fr": 6}
    # The very shortest ones are greetings and the like.
    rows = [row for tag, count in wanted.items() for row in short_rows("prompts.jsonl", tag, 40 + count)[40:]]
    return write(tmp_path / "prompts.jsonl", rows)


def settings_of(model: Path, prompts: Path) -> Settings:
    return {
        "model.name": model,
        "prompts.train.name": prompts,
        "prompts.evaluation.name": prompts,
        "prompts.train_per_language": 12,
        "prompts.evaluation_per_language": 2,
    }


@pytest.mark.timeout(900)
def test_filter_and_train_with_a_large_vocabulary(
    real_model: Callable[[str], Path], short_rows: Any, own_ray: str, tmp_path: Path
) -> None:
    """`congrad filter` on 40 pairs of plain strings, as for a base model; `congrad train` takes what it kept."""
    from transformers import AutoModelForCausalLM

    model, each = real_model("gemma3-270m"), 8
    pairs = [row for tag in LANGUAGES for row in short_rows("preferences.jsonl", tag, each)]
    preferences, out = write(tmp_path / "pairs.jsonl", pairs), tmp_path / "out"
    run_to_end(congrad("filter", preferences, "--model", model, "--out", out, "--max-length", 512))

    work = RunDirectory.open(out / "work")
    assert work.stage("sketches", 0).manifest().rows == len(pairs)
    scores = pq.read_table(out / "scores.parquet").to_pylist()
    assert Counter(row["language"] for row in scores) == dict.fromkeys(LANGUAGES, each)
    assert all(math.isfinite(row["cosine"]) and -1 <= row["cosine"] <= 1 for row in scores)
    kept = pq.read_table(out / "selected.parquet").to_pylist()
    assert Counter(row["language"] for row in kept) == dict.fromkeys(LANGUAGES, each // 2)
    assert all({name: row[name] for name in pairs[0]} in pairs for row in kept)

    settings = {
        "model.name": model,
        "model.max_length": 512,
        "train.max_steps": 2,
        "train.batch_size": 8,
    }
    run_to_end(congrad("train", RECIPE, "--run", out / "work", settings=settings))
    metrics = read_metrics(work.stage("policy", 0))
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in metrics)
    counters = work.stage("policy", 0).manifest().counters
    assert counters["steps"] == 2 and counters["reference_gap"] < 1e-3
    trained = AutoModelForCausalLM.from_pretrained(out / "work" / "iteration-0" / "policy", dtype="float32")
    before = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    assert trained.get_output_embeddings().weight is trained.get_input_embeddings().weight
    moved = [not old.equal(new) for old, new in zip(before.parameters(), trained.parameters(), strict=True)]
    assert any(moved) and all(weight.isfinite().all() for weight in trained.parameters())


@pytest.mark.timeout(1200)
def test_the_whole_loop(real_model: Callable[[str], Path], prompts: Path, own_ray: str, tmp_path: Path) -> None:
    """From 24 prompts to a report, with a judge that is no good at judging but can be read."""
    run = tmp_path / "run"
    shorter = {
        "generate.max_tokens": 96,
        "pair.truncated": "keep",
        "evaluate.max_tokens": 48,
        "evaluate.judge_max_tokens": 64,
    }
    settings = settings_of(real_model("smollm2"), prompts) | shorter
    run_to_end(congrad("run", RECIPE, "--run", run, settings=settings))
    directory = RunDirectory.open(run)
    manifests = {
        name: directory.stage(stage.folder, 0 if stage.each_iteration else None).manifest()
        for name, stage in STAGES.items()
    }
    assert all(manifests[name] for name in STAGES if name not in ("benchmark", "report")), manifests
    rows = {name: manifest.rows for name, manifest in manifests.items() if manifest}
    assert rows["prompts"] == 24 + 8
    assert rows["generate"] == rows["judge"] == 24 * 4
    assert manifests["judge"].counters["unreadable_share"] < 0.1
    assert 0 < rows["pair"] == rows["sketch"] == rows["select"] and 0 < rows["train"] <= rows["pair"]
    assert manifests["train"].counters["reference_gap"] < 1e-3
    assert rows["baseline"] == rows["evaluate"] == 8 * 2  # greedy and sampled
    assert "<html" in (run / "report.html").read_text()


@pytest.mark.timeout(900)
def test_generating_goes_on_after_a_kill(
    real_model: Callable[[str], Path], prompts: Path, own_ray: str, tmp_path: Path
) -> None:
    profile = tmp_path / "profile.yaml"  # of small batches, so that many are still to come at the first one's end
    engines = {"cpus": 1, "batch_size": 8, "max_num_seqs": 8, "enforce_eager": True}
    profile.write_text(json.dumps({"name": "small-batches", "device": "cpu", "engines": engines}))  # JSON is YAML
    settings = {
        **settings_of(real_model("smollm2"), prompts),
        "generate.num_generations": 2,
        "generate.max_tokens": 48,
    }
    run = tmp_path / "run"
    command = congrad("run", RECIPE, "--run", run, "--profile", profile, "--until", "generate", settings=settings)
    folder = run / "iteration-0" / "responses"
    parts = run_killed(command, folder, own_ray)
    output = run_to_end(command)
    assert "prompts: done already" in output and "generate (iteration 0): resuming" in output
    assert len(rows_of(folder, "response_id", parts)) == 24 * 2


@pytest.mark.timeout(900)
def test_sketching_goes_on_after_a_kill(
    real_model: Callable[[str], Path], short_rows: Any, own_ray: str, tmp_path: Path
) -> None:
    pairs = [row for tag in LANGUAGES for row in short_rows("preferences.jsonl", tag, 8)]
    preferences, out = write(tmp_path / "pairs.jsonl", pairs), tmp_path / "out"
    batches = ("--max-length", 512, "--max-tokens-per-batch", 512)
    command = congrad("filter", preferences, "--model", real_model("smollm2"), "--out", out, "--chat", *batches)
    folder = out / "work" / "iteration-0" / "sketches"
    parts = run_killed(command, folder, own_ray)
    assert "resuming" in run_to_end(command)
    assert len(rows_of(folder, "pair_id", parts)) == len(pairs)
    assert len(pq.read_table(out / "selected.parquet")) == len(pairs) // 2
