"""The order of the stages and iterations, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from congrad_ray.execution import run_stage
from congrad_ray.lock import only_writer
from congrad_ray.logs import Log
from congrad_ray.profile import Profile
from congrad_ray.recipe import Recipe
from congrad_ray.rundir import Manifest, RunDirectory
from congrad_ray.stages import evaluate, generate, judge, pair, prompts, report, select, sketch, train
from congrad_ray.stages.base import Stage

FIRST: Sequence[Stage] = (prompts.STAGE,)
ITERATED: Sequence[Stage] = (
    generate.STAGE,
    judge.STAGE,
    pair.STAGE,
    sketch.STAGE,
    select.STAGE,
    train.STAGE,
    evaluate.STAGE,
)
LAST: Sequence[Stage] = (report.STAGE,)
STAGES: dict[str, Stage] = {stage.name: stage for stage in (*FIRST, *ITERATED, *LAST)}


def run_all(
    recipe: Recipe,
    profile: Profile,
    run: RunDirectory,
    until: str | None = None,
    redo: bool = False,
    log: Log = print,
    after: Callable[[Stage, Manifest], None] = lambda stage, manifest: None,
) -> None:
    """All stages of all iterations in order; `until` names the last stage to run (of the last iteration)."""
    steps = [(stage, 0) for stage in FIRST]
    steps += [(stage, iteration) for iteration in range(recipe.iterations) for stage in ITERATED]
    steps += [(stage, recipe.iterations - 1) for stage in LAST]
    if until is not None:
        end = max(number for number, (stage, _) in enumerate(steps) if stage.name == until)
        steps = steps[: end + 1]
    with only_writer(run, log):
        for stage, iteration in steps:
            after(stage, run_stage(stage, recipe, profile, run, iteration, redo, log))
