"""The evaluate stage with real engines: true scores, comparisons in both orders, and a later iteration."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from congrad_ray.execution import run_stage
from congrad_ray.profile import Profile
from congrad_ray.recipe import Recipe
from congrad_ray.rundir import RunDirectory, RunDirectoryError
from congrad_ray.stages.base import Context
from congrad_ray.stages.evaluate import STAGE, run
from congrad_ray.tables import ANSWERS, COMPARISONS, PROMPTS, prompt_id, table_of
from congrad_ray.world.score import true_score
from congrad_ray.world.tasks import world_prompts


@pytest.fixture(scope="module", autouse=True)
def ray_is_stopped_after() -> Iterator[None]:
    yield
    import ray

    ray.shutdown()


def _row(language: str, content: str, split: str, seen: bool, task: str | None) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    values = {"prompt_id": prompt_id(language, messages), "language": language, "prompt": messages}
    return {**values, "split": split, "seen": seen, "task": task}


def _write_prompts(directory: RunDirectory, rows: list[dict[str, Any]]) -> None:
    folder = directory.stage("prompts", None)
    folder.begin("fingerprint", False, "prompts")
    folder.write_table("part-0.parquet", table_of(rows, PROMPTS))
    folder.commit("prompts", None, "fingerprint", {}, {}, len(rows), 0.0, {})


def _commit_policy(directory: RunDirectory, iteration: int, model: Path) -> None:
    folder = directory.stage("policy", iteration)
    shutil.copytree(model, folder.path)
    folder.begin(f"policy-{iteration}", False, "train")
    folder.commit("train", iteration, f"policy-{iteration}", {}, {}, 1, 0.0, {})


def _recipe(model: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "iterations": 2,
            "model": {"name": str(model), "dtype": "float32", "max_length": 512},
            "prompts": {"languages": ["en"], "unseen_languages": ["de"]},
            "generate": {"max_tokens": 16},
            "evaluate": {"max_tokens": 16, "judge_max_tokens": 8},
        }
    )


def test_no_evaluation_prompt_is_an_error_before_any_engine(tiny_model: Path, tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path / "run")
    _write_prompts(directory, [_row("en", "fox", "train", True, None)])
    context = Context(_recipe(tiny_model), Profile(name="local"), directory, 0, directory.stage("evaluation", 0))
    with pytest.raises(RunDirectoryError, match=r"no prompt of .* is for evaluation"):
        run(context)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_iterations_against_the_start(tiny_model: Path, tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path / "run")
    tasks = {language: world_prompts(language, 3, 0, "evaluation") for language in ("en", "de")}
    rows = [
        _row(language, item.prompt, "evaluation", language == "en", item.task)
        for language, items in tasks.items()
        for item in items
    ]
    free = [_row("en", word, "evaluation", True, None) for word in ("fox", "dog")]
    _write_prompts(directory, [*rows, *free, _row("en", "quick", "train", True, None)])
    _commit_policy(directory, 0, tiny_model)
    _commit_policy(directory, 1, tiny_model)
    recipe, profile = _recipe(tiny_model), Profile(name="local")

    manifest = run_stage(STAGE, recipe, profile, directory)
    output = directory.stage("evaluation", 0)
    table = output.read_table()
    assert table.schema.equals(ANSWERS)
    answers = table.to_pylist()
    assert len(answers) == manifest.rows == 2 * 2 * 8  # models, decodings, prompts
    task_of = {row["prompt_id"]: row["task"] for row in rows}
    for answer in answers:
        task = task_of.get(answer["prompt_id"])
        score = None if task is None else true_score(task, answer["language"], answer["response"])
        assert answer["true_score"] == (score if score is None else pytest.approx(score))
    compared = (output / "comparisons").read_table()
    assert compared.schema.equals(COMPARISONS)
    assert sorted(zip(compared["order"].to_pylist(), compared["prompt_id"].to_pylist(), strict=True)) == sorted(
        (order, row["prompt_id"]) for order in ("model_first", "baseline_first") for row in free
    )
    summary = output.read_json("summary.json")
    assert (summary["model"], summary["baseline"]) == ("M_1", "M_0")
    changes = {(c["language"], c["seen"], c["decoding"]): c for c in summary["score_changes"]}
    assert changes["*", True, "greedy"]["count"] == changes["*", False, "greedy"]["count"] == 3
    counters = manifest.counters
    assert counters["greedy_seen_before"] == pytest.approx(changes["*", True, "greedy"]["before"], abs=1e-4)
    # The same checkpoint twice, decoded greedily, has nothing to tell apart.
    assert counters["greedy_seen_after"] == pytest.approx(counters["greedy_seen_before"], abs=0.05)

    manifest = run_stage(STAGE, recipe, profile, directory, iteration=1)
    assert manifest.rows == 2 * 8  # M_0 answered in iteration 0
    summary = directory.stage("evaluation", 1).read_json("summary.json")
    assert summary["model"] == "M_2"
    assert {row["model"] for row in summary["answers"]} == {"M_0", "M_2"}
    assert sum(change["count"] for change in summary["score_changes"] if change["language"] == "*") == 2 * 6
