"""The estimate of the starting model's answers, for plans."""

from __future__ import annotations

import math
from collections.abc import Mapping

from congrad_ray.config.recipe import Recipe
from congrad_ray.planning.engines import engine_replicas, policy_name
from congrad_ray.planning.estimate import Estimate, Planned
from congrad_ray.planning.storage import number_bytes, table_bytes, text_bytes
from congrad_ray.planning.volume import Volume, rows_of
from congrad_ray.rundir.directory import Manifest
from congrad_ray.stages.evaluate.schema import ANSWERS


def _volume(planned: Planned, iteration: int) -> Volume:
    """Once, before the first iteration."""
    answers = rows_of(planned.recipe).answers if iteration == 0 else 0
    return Volume(answers, answers, answers * planned.lengths.prompt, answers * planned.lengths.answer)


def answers_stored(planned: Planned, volume: Volume, stage: str) -> float:
    """Bytes of a table of ANSWERS."""
    texts = text_bytes(planned, planned.lengths.prompt) + text_bytes(planned, planned.lengths.answer)
    parts = math.ceil(volume.rows / planned.profile.engines.rows_per_batch(planned.recipe.evaluate.max_tokens))
    return table_bytes(planned, stage, ANSWERS, volume.rows, number_bytes(ANSWERS) + texts, parts)


def answers_measured(recipe: Recipe, manifest: Manifest, finished: Mapping[str, Manifest]) -> dict[str, float]:
    """The mean length of an answer, where a finished stage knows it."""
    if "mean_answer_tokens" not in manifest.counters:
        return {}
    return {"answer": manifest.counters["mean_answer_tokens"]}


ESTIMATE = Estimate(
    volume=_volume,
    stored=lambda planned, volume: answers_stored(planned, volume, "baseline"),
    measured=answers_measured,
    replicas=engine_replicas(
        lambda shapes: shapes.policy, lambda recipe, iteration: [policy_name(0)] if iteration == 0 else []
    ),
)
