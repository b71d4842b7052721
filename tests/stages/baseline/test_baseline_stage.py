"""What an older version's evaluation has of the starting model's answers is taken over, where it is the same."""

import shutil
from pathlib import Path

import pyarrow.compute as pc
import pytest

from congrad_ray.config.recipe import Recipe, load_recipe
from congrad_ray.pipeline.order import STAGES
from congrad_ray.pipeline.runner import input_fingerprints
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError
from congrad_ray.stages.baseline.stage import adopted

OLD = Path(__file__).parents[2] / "pipeline" / "old-run"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunDirectory, Recipe]:
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return RunDirectory.open(tmp_path / "old" / "run"), load_recipe("recipe.yaml")


def test_answers_of_the_same_settings_are_taken_over(old: tuple[RunDirectory, Recipe]) -> None:
    run, recipe = old
    table = adopted(recipe, run)
    assert table is not None and set(table["model"].to_pylist()) == {"M_0"}
    judged = recipe.evaluate.model_copy(update={"judge_max_tokens": 7})  # decides no answer
    again = adopted(recipe.model_copy(update={"evaluate": judged}), run)
    assert again is not None and again.equals(table)


@pytest.mark.parametrize(
    ("section", "changed"), [("evaluate", {"max_tokens": 5}), ("evaluate", {"sampled": True}), ("", {"seed": 9})]
)
def test_answers_of_other_settings_are_not(
    old: tuple[RunDirectory, Recipe], section: str, changed: dict[str, int]
) -> None:
    run, recipe = old
    if section:
        inner = getattr(recipe, section)
        value = next(iter(changed))
        assert getattr(inner, value) != changed[value]
        changed = {section: inner.model_copy(update=changed)}
    assert adopted(recipe.model_copy(update=changed), run) is None


def test_answers_to_other_prompts_or_of_today_are_not(old: tuple[RunDirectory, Recipe]) -> None:
    run, recipe = old
    folder = run.stage("evaluation", 0)
    kept = folder.read_json("_manifest.json")
    folder.write_json("_manifest.json", {**kept, "inputs": {**kept["inputs"], "prompts": "others"}})
    assert adopted(recipe, run) is None
    folder.write_json("_manifest.json", kept)
    assert adopted(recipe, run) is not None
    for path in folder.files(".parquet"):
        table = folder.read_parquet(path)
        folder.write_table(path.rsplit("/", 1)[1], table.filter(pc.not_equal(table["model"], "M_0")))
    assert adopted(recipe, run) is None


def test_a_later_iteration_of_an_older_run_needs_the_answers_taken_over(old: tuple[RunDirectory, Recipe]) -> None:
    run, recipe = old
    evaluate = STAGES["evaluate"]
    with pytest.raises(RunDirectoryError, match="evaluate needs baseline, which is not finished"):
        input_fingerprints(evaluate, run, 0)
    table = adopted(recipe, run)
    assert table is not None
    folder = run.stage("baseline", None)
    folder.write_table("adopted.parquet", table)
    folder.commit("baseline", None, "f", {}, {}, len(table), 0.0, {})
    assert input_fingerprints(evaluate, run, 0)["baseline"] == "f"
