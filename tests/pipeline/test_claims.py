"""A mistake does not poison the next try: what a failed stage leaves behind, and what a refusal says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from congrad_ray.config.profile import Profile, load_profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import validate
from congrad_ray.data.records import InputError
from congrad_ray.data.tables import quarantined, row_id
from congrad_ray.modeling.source import ModelError
from congrad_ray.pipeline.loop import run_all
from congrad_ray.pipeline.order import STAGES
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.rundir.directory import STARTED, RunDirectory, RunDirectoryError
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.resources import driver_demand
from congrad_ray.stages.base import Stage

PROFILE = Profile(name="test")


def recipe_of(**sections: Any) -> Recipe:
    return validate(Recipe, {"name": "t", "prompts": {"languages": ["en"]}, **sections}, "t")


def stage_of(work: Any, name: str = "work") -> Stage:
    """A stage that needs nothing; the recipe's seed and train.beta are its settings."""
    return Stage(
        name=name,
        folder=name,
        summary="working",
        inputs=lambda iteration: [],
        settings=lambda recipe, iteration: {"seed": recipe.seed, "model": {"name": recipe.model.name}},
        run=work,
        demand=lambda recipe, profile: driver_demand(name, 1),
        each_iteration=False,
        uses_ray=False,
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(tmp_path / "run")


def fail(context: Context) -> Outcome:
    raise InputError("no file data.jsonl")


def succeed(context: Context) -> Outcome:
    return Outcome(1)


def test_a_stage_that_fails_before_its_first_row_leaves_no_claim(run: RunDirectory) -> None:
    with pytest.raises(InputError, match=r"no file data\.jsonl"):
        run_stage(stage_of(fail), recipe_of(), PROFILE, run)
    assert not run.stage("work", None).exists()
    assert run_stage(stage_of(succeed), recipe_of(seed=1), PROFILE, run).rows == 1


def test_rows_in_quarantine_stay_until_the_next_try(run: RunDirectory) -> None:
    def refuse(context: Context) -> Outcome:
        context.output.write_quarantine([quarantined("line 1", None, "bad", "no text")])
        raise InputError("no usable row")

    with pytest.raises(InputError):
        run_stage(stage_of(refuse), recipe_of(), PROFILE, run)
    folder = run.stage("work", None)
    assert folder.quarantine_counts() == {"bad": 1} and not folder.begun()
    assert run_stage(stage_of(succeed), recipe_of(seed=1), PROFILE, run).rows == 1
    assert folder.quarantine_counts() == {}


def test_rows_that_were_written_stay_claimed(run: RunDirectory) -> None:
    def half(context: Context) -> Outcome:
        context.output.write_bytes("part-0.parquet", b"rows")
        raise InputError("the second file is damaged")

    with pytest.raises(InputError):
        run_stage(stage_of(half), recipe_of(), PROFILE, run)
    assert run.stage("work", None).begun()
    with pytest.raises(RunDirectoryError, match=r"(?s)work in .* was begun with other settings.*seed: 0 -> 1"):
        run_stage(stage_of(succeed), recipe_of(seed=1), PROFILE, run)


def test_a_claim_of_before_that_keeps_no_settings_is_known_by_its_fingerprint(run: RunDirectory) -> None:
    folder = run.stage("work", None)
    folder.write_json(STARTED, {"fingerprint": "abc"})
    folder.write_bytes("part-0.parquet", b"rows")
    with pytest.raises(RunDirectoryError, match=r"\(fingerprint abc, now [0-9a-f]+\)"):
        run_stage(stage_of(succeed), recipe_of(), PROFILE, run)


def test_settings_are_named_as_in_the_recipe_however_a_stage_keeps_them(run: RunDirectory) -> None:
    prompts = {"languages": ["en"], "train_per_language": 2, "evaluation_per_language": 1}
    run_stage(STAGES["prompts"], recipe_of(prompts=prompts), PROFILE, run)
    changed = {**prompts, "languages": ["en", "de"], "train_per_language": 3}
    with pytest.raises(RunDirectoryError) as refused:
        run_stage(STAGES["prompts"], recipe_of(prompts=changed), PROFILE, run)
    lines = str(refused.value).splitlines()
    assert '  prompts.languages: ["en"] -> ["en", "de"]' in lines
    assert "  prompts.train_per_language: 2 -> 3" in lines
    assert len(lines) == 4


def test_an_input_that_was_made_again_is_named(run: RunDirectory) -> None:
    first = run.stage("first", None)
    first.commit("first", None, "one", None, {}, 1, 0.0, {})
    stage = Stage(
        name="second",
        folder="second",
        summary="",
        inputs=lambda iteration: [("first", None)],
        settings=lambda recipe, iteration: {"model": {}},
        run=succeed,
        demand=lambda recipe, profile: driver_demand("second", 1),
        each_iteration=False,
        uses_ray=False,
    )
    run_stage(stage, recipe_of(), PROFILE, run)
    first.commit("first", None, "two", None, {}, 1, 0.0, {})
    with pytest.raises(RunDirectoryError, match="first: made again since"):
        run_stage(stage, recipe_of(), PROFILE, run)


@pytest.mark.parametrize("section", [{"model": {"name": "my-modle"}}, {"judge": {"model": "my-modle"}}])
def test_a_model_that_is_nowhere_is_refused_before_the_first_stage(
    run: RunDirectory, section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("congrad_ray.pipeline.runner.connect", lambda *arguments: pytest.fail("Ray was started"))
    with pytest.raises(ModelError, match=r"no model my-modle: there is no such folder in .*HF_HUB_OFFLINE=1"):
        run_all(recipe_of(**section), load_profile("local"), run)
    assert not run.files(recursive=True)


def test_a_stage_on_ray_claims_nothing_when_its_model_is_missing(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("congrad_ray.pipeline.runner.connect", lambda *arguments: pytest.fail("Ray was started"))
    run.stage("prompts", None).commit("prompts", None, "p", None, {}, 1, 0.0, {})
    with pytest.raises(ModelError, match="no model my-modle"):
        run_stage(STAGES["generate"], recipe_of(model={"name": "my-modle"}), load_profile("local"), run)
    assert not run.stage("responses", 0).exists()


@pytest.mark.parametrize("parts", [(), ("", "samples")])
def test_small_parts_are_merged_before_a_stage_is_committed(
    run: RunDirectory, parts: tuple[str, ...], shared_ray: None
) -> None:
    def write(context: Context) -> Outcome:
        for number in range(70):
            for folder in (context.output, context.output / "samples"):
                folder.write_table(f"part-{row_id(number)}.parquet", pa.table({"id": [row_id(number)]}))
        return Outcome(70)

    stage = replace(stage_of(write), uses_ray=True, settings=lambda recipe, iteration: {"size": 1}, parts=parts)
    run_stage(stage, recipe_of(model={"name": "none"}), PROFILE, run)
    folder = run.stage("work", None)
    ids = sorted(row_id(number) for number in range(70))
    for where in (folder, folder / "samples"):
        assert len(where.files(".parquet")) == (1 if parts else 70)
        assert sorted(where.read_table()["id"].to_pylist()) == ids
    assert run_stage(stage, recipe_of(model={"name": "none"}), PROFILE, run).rows == 70  # its files are whole
