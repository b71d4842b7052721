"""All stages of all iterations, in order."""

from __future__ import annotations

from collections.abc import Callable

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import SettingsError
from congrad_ray.modeling.adapters import check_quantization
from congrad_ray.modeling.source import check_models
from congrad_ray.pipeline.order import FIRST, STAGES, steps_of
from congrad_ray.pipeline.runner import loads_models, run_stage
from congrad_ray.rundir.directory import Manifest, RunDirectory
from congrad_ray.runtime.lock import only_writer
from congrad_ray.runtime.pools import keeping
from congrad_ray.stages.base import Stage


def run_all(
    recipe: Recipe,
    profile: Profile,
    run: RunDirectory,
    until: str | None = None,
    redo: bool = False,
    after: Callable[[Stage, Manifest], None] = lambda stage, manifest: None,
) -> None:
    """All stages of all iterations in order; `until` names the last stage to run (of the last iteration).

    Raises SettingsError for an `until` that the recipe does not ask for, and as `run_stage` does.
    """
    last = recipe.iterations - 1
    steps = [
        (stage, (0 if stage in FIRST else last) if number is None else number)
        for stage, number in steps_of(recipe)
    ]
    if until is not None:
        places = [number for number, (stage, _) in enumerate(steps) if stage.name == until]
        if not places:
            raise SettingsError(
                f"the recipe does not ask for the stage {until}: see the section {until} of a recipe"
            )
        steps = steps[: places[-1] + 1]
    with only_writer(run), keeping():
        to_do = [step for step in steps if not _is_done(recipe, run, *step)]
        for name in dict.fromkeys(stage.name for stage, _ in to_do):
            STAGES[name].check(recipe)
        if any(loads_models(stage, recipe, iteration) for stage, iteration in to_do):
            # Before the first stage, not before the first that needs them.
            check_models(recipe, present=True)
            check_quantization(recipe.train.lora, profile.device)
        for stage, iteration in steps:
            after(stage, run_stage(stage, recipe, profile, run, iteration, redo))


def _is_done(recipe: Recipe, run: RunDirectory, stage: Stage, iteration: int) -> bool:
    manifest = run.stage(stage.folder, iteration if stage.each_iteration else None).manifest()
    return manifest is not None or stage.adopted(recipe, run) is not None
