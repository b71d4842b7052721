"""The order of the stages: a new one is a line here."""

from __future__ import annotations

from collections.abc import Sequence

from congrad_ray.config.recipe import Recipe
from congrad_ray.stages.base import Stage
from congrad_ray.stages.baseline import stage as baseline
from congrad_ray.stages.benchmark import stage as benchmark
from congrad_ray.stages.evaluate import stage as evaluate
from congrad_ray.stages.generate import stage as generate
from congrad_ray.stages.judge import stage as judge
from congrad_ray.stages.pair import stage as pair
from congrad_ray.stages.prompts import stage as prompts
from congrad_ray.stages.report.stage import report_of
from congrad_ray.stages.select import stage as select
from congrad_ray.stages.sketch import stage as sketch
from congrad_ray.stages.train import stage as train

FIRST: Sequence[Stage] = (prompts.STAGE, baseline.STAGE)
ITERATED: Sequence[Stage] = (
    generate.STAGE,
    judge.STAGE,
    pair.STAGE,
    sketch.STAGE,
    select.STAGE,
    train.STAGE,
    benchmark.STAGE,
    evaluate.STAGE,
)
LAST: Sequence[Stage] = (report_of((*FIRST, *ITERATED)),)
STAGES: dict[str, Stage] = {stage.name: stage for stage in (*FIRST, *ITERATED, *LAST)}


def wanted_stages(recipe: Recipe) -> list[Stage]:
    """The stages that a run of this recipe does, each once, in order."""
    return [stage for stage in (*FIRST, *ITERATED, *LAST) if stage.wanted(recipe)]


def steps_of(recipe: Recipe) -> list[tuple[Stage, int | None]]:
    """The stages of a run in order, each with its iteration where it has one."""
    steps: list[tuple[Stage, int | None]] = [(stage, None) for stage in FIRST]
    steps += [(stage, number) for number in range(recipe.iterations) for stage in ITERATED]
    steps += [(stage, None) for stage in LAST]
    return [(stage, number) for stage, number in steps if stage.wanted(recipe)]
