"""The estimate of benchmarks, for plans: held-out pairs are known before a run, the harness' tasks are not."""

from __future__ import annotations

from congrad_ray.config.recipe import Recipe
from congrad_ray.planning.estimate import Estimate, Planned
from congrad_ray.planning.storage import number_bytes, table_bytes
from congrad_ray.planning.volume import Volume
from congrad_ray.stages.benchmark.schema import SCORED


def held_out_pairs(recipe: Recipe) -> int:
    """The most pairs that are scored by one model, if the file has no other languages than the recipe."""
    languages = len(recipe.prompts.languages) + len(recipe.prompts.unseen_languages)
    return languages * recipe.benchmark.preferences_per_language if recipe.benchmark.preferences else 0


def _volume(planned: Planned, iteration: int) -> Volume:
    """M_0 is measured in the first iteration only."""
    pairs = held_out_pairs(planned.recipe) * (2 if iteration == 0 else 1)
    read = planned.lengths.prompt + 2 * planned.lengths.paired_response
    return Volume(rows=pairs, requests=pairs, prefill=pairs * read)


def _stored(planned: Planned, volume: Volume) -> float:
    return table_bytes(planned, "benchmark: scored", SCORED, volume.rows, number_bytes(SCORED))


def _note(recipe: Recipe) -> str | None:
    settings = recipe.benchmark
    if not settings.tasks:
        return None
    each = "all" if settings.limit is None else f"at most {settings.limit}"
    return (
        f"not estimated: {', '.join(settings.tasks)} ({each} documents of each task). How many tasks and tokens "
        "these are is known when their datasets are read; `congrad status` has the time of a finished iteration"
    )


ESTIMATE = Estimate(volume=_volume, stored=_stored, note=_note)
