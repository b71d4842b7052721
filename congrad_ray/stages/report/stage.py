"""report: RUN/report.html with its cards, figures and tables, of whatever the run has so far."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from congrad_ray.planning.volume import rows_of
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.resources import driver_demand
from congrad_ray.stages.base import Stage
from congrad_ray.stages.report.cards import model_card, pairs_card
from congrad_ray.stages.report.facts import gather
from congrad_ray.stages.report.figures import figures, pictures
from congrad_ray.stages.report.html import render
from congrad_ray.stages.report.tables import tables
from congrad_ray.stages.report.vega import bundle, svg

logger = logging.getLogger(__name__)


def report_of(stages: Sequence[Stage]) -> Stage:
    """The stage that reports on these stages."""
    steps = [stage.step for stage in stages if stage.step]

    def run(context: Context) -> Outcome:
        """Writes the page and the cards at the run's root, pictures and tables into the stage's own folder.

        A run that stopped early gets the parts that exist.
        """
        facts = gather(context.run, stages)
        drawn = figures(facts)
        page = render(facts, drawn, steps, context.recipe, bundle()).encode()
        context.run.write_bytes("report.html", page)
        for name, card_of in (("model_card.md", model_card), ("dataset_card.md", pairs_card)):
            card = card_of(facts, context.recipe)
            if card is not None:
                context.run.write_bytes(name, card.encode())
        pictured = {name: svg(spec) for name, spec in pictures(drawn).items()}
        listed = tables(facts)
        # What an earlier report has left of charts and tables that are no more would be taken for this one's.
        for folder, ending, texts in (("figures", "svg", pictured), ("tables", "csv", listed)):
            place = context.output / folder
            place.delete()
            for name, text in texts.items():
                place.write_bytes(f"{name}.{ending}", text.encode())
        finished = sum(stage.manifest is not None for stage in facts.stages)
        logger.info(
            f"{context.run.path}/report.html: {finished} of {len(facts.stages)} stages that were begun; beside it "
            f"report/ with {len(pictured)} figures and {len(listed)} tables"
        )
        counters = {"iterations": len(facts.iterations), "bytes": len(page), "figures": len(pictured)}
        return Outcome(finished, counters)

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
