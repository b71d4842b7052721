"""All stages of all iterations, in order."""

from __future__ import annotations

from collections.abc import Callable

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.modeling.adapters import check_quantization
from congrad_ray.modeling.source import check_models
from congrad_ray.pipeline.order import FIRST, ITERATED, LAST
from congrad_ray.pipeline.runner import loads_models, run_stage
from congrad_ray.rundir.directory import Manifest, RunDirectory
from congrad_ray.runtime.lock import only_writer
from congrad_ray.stages.base import Stage


def run_all(
    recipe: Recipe,
    profile: Profile,
    run: RunDirectory,
    until: str | None = None,
    redo: bool = False,
    after: Callable[[Stage, Manifest], None] = lambda stage, manifest: None,
) -> None:
    """All stages of all iterations in order; `until` names the last stage to run (of the last iteration)."""
    steps = [(stage, 0) for stage in FIRST]
    steps += [(stage, iteration) for iteration in range(recipe.iterations) for stage in ITERATED]
    steps += [(stage, recipe.iterations - 1) for stage in LAST]
    if until is not None:
        end = max(number for number, (stage, _) in enumerate(steps) if stage.name == until)
        steps = steps[: end + 1]
    with only_writer(run):
        to_do = [step for step in steps if not _is_done(run, *step)]
        if any(loads_models(stage, recipe, iteration) for stage, iteration in to_do):
            # Before the first stage, not before the first that needs them.
            check_models(recipe, present=True)
            check_quantization(recipe.train.lora, profile.device)
        for stage, iteration in steps:
            after(stage, run_stage(stage, recipe, profile, run, iteration, redo))


def _is_done(run: RunDirectory, stage: Stage, iteration: int) -> bool:
    return run.stage(stage.folder, iteration if stage.each_iteration else None).manifest() is not None
