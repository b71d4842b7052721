"""report: RUN/report.html, of whatever the run has so far."""

from __future__ import annotations

import logging

from congrad_ray.planning.volume import rows_of
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.resources import driver_demand
from congrad_ray.stages.base import Stage
from congrad_ray.stages.report.facts import gather
from congrad_ray.stages.report.html import render

logger = logging.getLogger(__name__)


def run(context: Context) -> Outcome:
    """Writes the page at the run's root; a run that stopped early gets the parts that exist."""
    facts = gather(context.run)
    page = render(facts, context.recipe.model_dump(mode="json"))
    context.run.write_bytes("report.html", page.encode())
    finished = sum(stage.manifest is not None for stage in facts.stages)
    logger.info(f"{context.run.path}/report.html: {finished} of {len(facts.stages)} stages that were begun")
    return Outcome(finished, {"iterations": len(facts.iterations), "bytes": len(page.encode())})


STAGE = Stage(
    name="report",
    folder="report",
    summary="one HTML file about the run",
    inputs=lambda iteration: [],
    settings=lambda recipe, iteration: recipe.model_dump(mode="json"),
    run=run,
    demand=lambda recipe, profile: driver_demand("report", rows_of(recipe).evaluation),
    each_iteration=False,
    uses_ray=False,
    always=True,
)
