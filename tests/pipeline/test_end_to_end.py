"""The demo recipe in small, with every real engine: vLLM, Ray Data, Ray actors, Ray Train with DeepSpeed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from congrad_ray.config.recipe import load_recipe
from congrad_ray.data.tables import response_id
from congrad_ray.modeling.source import policy
from congrad_ray.modeling.tokenization import chat_prompt_ids
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.generate.schema import RESPONSES
from congrad_ray.stages.judge.rubric import load_rubric
from congrad_ray.stages.judge.schema import JUDGEMENTS
from congrad_ray.stages.judge.scores import expected_score, score_token_ids

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("generate", "judge", "pair", "sketch", "select", "train", "evaluate")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in world's model, trained for seconds: it answers badly, but it answers."""
    from congrad_ray.world.model import world_model

    return world_model(cache_dir=tmp_path_factory.mktemp("world"), training_tokens=150_000)


def command(world: Path, run: Path | str, iterations: int = 1) -> list[str]:
    settings = {
        "iterations": iterations,
        "model.name": world,
        "prompts.languages": "[en, de]",
        "prompts.unseen_languages": "[it]",
        "prompts.train_per_language": 12,
        "prompts.evaluation_per_language": 4,
        "generate.max_tokens": 24,
        "evaluate.max_tokens": 24,
        "judge.min_probability_mass": 0.0,
        "pair.truncated": "keep",
        "sketch.width": 1024,
        "train.batch_size": 4,
        "train.max_tokens_per_batch": 150,
        "train.save_steps": 2,
    }
    overrides = [f"--set={key}={value}" for key, value in settings.items()]
    demo = ROOT / "jobs" / "recipes" / "demo.yaml"
    return [sys.executable, "-m", "congrad_ray", "run", str(demo), "--run", str(run), *overrides]


def run_to_end(arguments: Sequence[str]) -> str:
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def ids(run: Path, folder: str, column: str) -> list[str]:
    parts = sorted((run / "iteration-0" / folder).glob("*.parquet"))
    return [i for part in parts for i in pq.read_table(part, columns=[column])[column].to_pylist()]


def check_finished(run: Path, iterations: int) -> None:
    """Every stage is done, no row is lost or double, and the trained model is one that others can load."""
    from transformers import AutoModelForCausalLM

    directory = RunDirectory.open(run)
    assert (
        len(ids(run, "responses", "response_id")) == len(set(ids(run, "responses", "response_id"))) == 2 * 12 * 4
    )
    assert set(ids(run, "judgements", "response_id")) == set(ids(run, "responses", "response_id"))
    assert len(ids(run, "judgements", "response_id")) == 2 * 12 * 4
    assert sorted(ids(run, "sketches", "pair_id")) == sorted(ids(run, "pairs", "pair_id"))
    answers = [*ids(run, "evaluation", "answer_id"), *ids(run, "../baseline", "answer_id")]
    assert len(ids(run, "evaluation", "answer_id")) == len(answers) / 2 == len(set(answers)) / 2 == 3 * 4 * 2
    for iteration in range(iterations):
        summary = directory.stage("evaluation", iteration).read_json("summary.json")
        assert {(row["language"], row["seen"]) for row in summary["score_changes"]} >= {
            ("en", True),
            ("de", True),
            ("it", False),
        }
        assert all(0 <= row["after"] <= 1 for row in summary["score_changes"])
        model = AutoModelForCausalLM.from_pretrained(run / f"iteration-{iteration}" / "policy")
        assert model.num_parameters() > 0
        assert (run / f"iteration-{iteration}" / "policy" / "model.safetensors").exists()
    report = (run / "report.html").read_text()
    # What the page may do is tests/stages/report's matter.
    assert "<html" in report and "Content-Security-Policy" in report


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "demo"
    run_to_end(command(world, run))
    return run


def test_the_demo_recipe_in_small_goes_from_prompts_to_an_aligned_model(finished: Path) -> None:
    check_finished(finished, iterations=1)


def test_the_reference_log_probabilities_of_the_sketch_stage_are_those_of_the_policy(finished: Path) -> None:
    """Training starts where sketching measured: its first loss is log 2 and its first margin 0."""
    manifest = json.loads((finished / "iteration-0" / "policy" / "_manifest.json").read_text())
    assert manifest["counters"]["reference_gap"] < 1e-3


def test_answers_are_distinct_samples_of_the_policy_and_their_tokens_are_counted(finished: Path) -> None:
    run, recipe = RunDirectory.open(finished), load_recipe(finished / "recipe.yaml")
    prompts = [row for row in run.stage("prompts", None).read_table().to_pylist() if row["split"] == "train"]
    table = run.stage("responses", 0).read_table()
    assert table.schema.equals(RESPONSES)
    rows = table.to_pylist()
    wanted = {response_id(row["prompt_id"], 0, sample) for row in prompts for sample in range(4)}
    assert {row["response_id"] for row in rows} == wanted
    assert len({row["seed"] for row in rows}) == len(rows)
    by_prompt = {row["prompt_id"]: set() for row in prompts}
    for row in rows:
        by_prompt[row["prompt_id"]].add(row["response"])
    assert sum(len(texts) > 1 for texts in by_prompt.values()) > len(by_prompt) / 2, "seeds make a difference"
    tokenizer = policy(recipe, run, 0).load_tokenizer()
    for row in rows:
        assert row["prompt_tokens"] == len(chat_prompt_ids(tokenizer, row["prompt"]))
        assert 1 <= row["response_tokens"] <= 24
    manifest = json.loads((finished / "iteration-0" / "responses" / "_manifest.json").read_text())
    assert manifest["counters"]["responses"] == {"de": 48, "en": 48}


def test_judgements_are_the_expected_scores_of_the_models_own_distribution(finished: Path) -> None:
    """vLLM's log-probabilities against those of Transformers, for every judgement."""
    run, recipe = RunDirectory.open(finished), load_recipe(finished / "recipe.yaml")
    table = run.stage("judgements", 0).read_table()
    assert table.schema.equals(JUDGEMENTS)
    scores = {row["response_id"]: row["score"] for row in table.to_pylist()}
    samples = (run.stage("judgements", 0) / "samples").read_table().to_pylist()
    source = policy(recipe, run, 0)
    model, tokenizer = source.load_model("cpu"), source.load_tokenizer()
    digits = score_token_ids(tokenizer.get_vocab())
    rubric = load_rubric(recipe.judge.rubric)
    readable = 0
    for row in run.stage("responses", 0).read_table().to_pylist():
        text = rubric.fill(row["language"], "expected_score", row["prompt"], row["response"])
        ids = chat_prompt_ids(tokenizer, [{"role": "user", "content": text}])
        if len(ids) + 1 > recipe.model.max_length:
            assert scores[row["response_id"]] is None
            continue
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        expected, mass = expected_score(dict(enumerate(logprobs.tolist())), digits)
        assert scores[row["response_id"]] == pytest.approx(expected, abs=1e-3)
        found = next(sample for sample in samples if sample["response_id"] == row["response_id"])
        assert found["mass"] == pytest.approx(mass, abs=1e-3) and found["output"] in "012345"
        readable += 1
    assert readable > len(scores) / 2
    manifest = json.loads((finished / "iteration-0" / "judgements" / "_manifest.json").read_text())
    for language, counts in manifest["counters"]["judgements"].items():
        assert counts["asked"] == 48 == counts["readable"] + sum(counts["unreadable"].values()), language


def test_a_second_run_skips_everything_within_seconds(world: Path, finished: Path) -> None:
    before = time.monotonic()
    output = run_to_end(command(world, finished))
    assert output.count("done already") == len(STAGES) + 2  # prompts and baseline; the report is written each time
    assert time.monotonic() - before < 60  # it starts no Ray; mostly imports


def test_changed_settings_are_refused_from_the_stage_they_matter_to(world: Path, finished: Path) -> None:
    arguments = [*command(world, finished), "--set=select.keep=0.25"]
    refused = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert refused.returncode == 2
    assert "sketch (iteration 0): done already" in refused.stdout
    assert "select (iteration 0)" in refused.stderr and "--redo" in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_interrupted_in_every_stage_it_goes_on_and_finishes(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "interrupted"
    for stage in STAGES:
        process = subprocess.Popen(
            command(world, run),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        lines = []
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if f"{stage} (iteration 0):" in line and ("starting" in line or "resuming" in line):
                    break
            # Long enough to be in the middle of the stages that take long.
            time.sleep(8 if stage in ("generate", "judge", "sketch", "train", "evaluate") else 0)
            process.send_signal(signal.SIGINT)
            lines.append(process.communicate(timeout=120)[0])
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        # The stages of this process may be over before the signal arrives.
        assert process.returncode in (130, 0), f"interrupted in {stage}:\n" + "".join(lines)
    run_to_end(command(world, run))
    check_finished(run, iterations=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_iterations_train_on_their_own_samples(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "two"
    run_to_end(command(world, run, iterations=2))
    check_finished(run, iterations=2)
    first, second = (json.loads((run / f"iteration-{i}/responses/_manifest.json").read_text()) for i in (0, 1))
    assert first["fingerprint"] != second["fingerprint"]
    assert list(second["inputs"]) == ["prompts", "iteration-0/policy"]


@pytest.mark.slow
def test_the_demo_recipe_in_small_on_an_object_store(
    world: Path, store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engines of `evaluate` and the trained model's loader fetch the policy from the store."""
    monkeypatch.setenv("CONGRAD_RAY_CACHE", str(tmp_path))
    secret = "a-secret-nobody-may-see"
    arguments = command(world, store_uri.replace("s3://", f"s3://key:{secret}@"))
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=580, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert secret not in result.stdout + result.stderr
    run = RunDirectory.open(store_uri)
    assert len(run.stage("evaluation", 0).ids("answer_id")) == 3 * 4 * 2
    for path in run.files(recursive=True):
        assert secret.encode() not in run.read_bytes(path.removeprefix(f"{run.path}/"))
    model = policy(load_recipe(ROOT / "jobs" / "recipes" / "demo.yaml"), run, 1).load_model("cpu")
    assert model.num_parameters() > 0
    output = run_to_end(arguments)
    assert output.count("done already") == len(STAGES) + 2  # prompts and baseline
