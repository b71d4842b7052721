"""report: RUN/report.html, of whatever the run has so far."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from congrad_ray.planning.volume import rows_of
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.resources import driver_demand
from congrad_ray.stages.base import Stage
from congrad_ray.stages.report.facts import gather
from congrad_ray.stages.report.html import render

logger = logging.getLogger(__name__)


def report_of(stages: Sequence[Stage]) -> Stage:
    """The stage that reports on these stages."""
    steps = [stage.step for stage in stages if stage.step]

    def run(context: Context) -> Outcome:
        """Writes the page at the run's root; a run that stopped early gets the parts that exist."""
        facts = gather(context.run, stages)
        page = render(facts, steps, context.recipe)
        context.run.write_bytes("report.html", page.encode())
        finished = sum(stage.manifest is not None for stage in facts.stages)
        logger.info(f"{context.run.path}/report.html: {finished} of {len(facts.stages)} stages that were begun")
        return Outcome(finished, {"iterations": len(facts.iterations), "bytes": len(page.encode())})

    return Stage(
        name="report",
        folder="report",
        summary="Write DIR/report.html",
        inputs=lambda iteration: [],
        settings=lambda recipe, iteration: recipe.model_dump(mode="json"),
        run=run,
        demand=lambda recipe, profile: driver_demand("report", rows_of(recipe).evaluation),
        each_iteration=False,
        uses_ray=False,
        always=True,
    )
