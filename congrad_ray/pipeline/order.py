"""The order of the stages: a new one is a line here."""

from __future__ import annotations

from collections.abc import Sequence

from congrad_ray.stages.base import Stage
from congrad_ray.stages.evaluate import stage as evaluate
from congrad_ray.stages.generate import stage as generate
from congrad_ray.stages.judge import stage as judge
from congrad_ray.stages.pair import stage as pair
from congrad_ray.stages.prompts import stage as prompts
from congrad_ray.stages.report.stage import report_of
from congrad_ray.stages.select import stage as select
from congrad_ray.stages.sketch import stage as sketch
from congrad_ray.stages.train import stage as train

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
LAST: Sequence[Stage] = (report_of((*FIRST, *ITERATED)),)
STAGES: dict[str, Stage] = {stage.name: stage for stage in (*FIRST, *ITERATED, *LAST)}
