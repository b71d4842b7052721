"""The estimate of evaluating, for plans."""

from __future__ import annotations

import math
from collections.abc import Mapping

from congrad_ray.config.recipe import BUILTIN_WORLD, Recipe
from congrad_ray.planning.engines import engine_replicas
from congrad_ray.planning.estimate import Estimate, Planned
from congrad_ray.planning.storage import number_bytes, table_bytes, text_bytes
from congrad_ray.planning.volume import Volume, rows_of
from congrad_ray.rundir.directory import Manifest
from congrad_ray.stages.evaluate.pairwise import pairwise_template
from congrad_ray.stages.evaluate.schema import ANSWERS


def _volume(planned: Planned, iteration: int) -> Volume:
    """M_0 is evaluated in the first iteration only."""
    recipe, lengths, asked_for = planned.recipe, planned.lengths, rows_of(planned.recipe)
    answers = asked_for.answers * (2 if iteration == 0 else 1)
    # Both orders of every greedy answer and its baseline; the built-in world knows true scores instead.
    compared = 0 if recipe.prompts.evaluation.name == BUILTIN_WORLD else 2 * asked_for.evaluation
    question = len(pairwise_template().encode()) / planned.assumptions.bytes_per_token + lengths.prompt
    return Volume(
        answers,
        answers + compared,
        answers * lengths.prompt + compared * (question + 2 * lengths.answer),
        answers * lengths.answer + compared * lengths.verdict,
    )


def _stored(planned: Planned, volume: Volume) -> float:
    texts = text_bytes(planned, planned.lengths.prompt) + text_bytes(planned, planned.lengths.answer)
    parts = math.ceil(volume.rows / planned.profile.engines.rows_per_batch(planned.recipe.evaluate.max_tokens))
    return table_bytes(planned, "evaluate", ANSWERS, volume.rows, number_bytes(ANSWERS) + texts, parts)


def _measured(recipe: Recipe, manifest: Manifest, finished: Mapping[str, Manifest]) -> dict[str, float]:
    if "mean_answer_tokens" not in manifest.counters:
        return {}
    return {"answer": manifest.counters["mean_answer_tokens"]}


ESTIMATE = Estimate(
    volume=_volume,
    stored=_stored,
    measured=_measured,
    replicas=engine_replicas(
        lambda shapes: max(shapes.policy, shapes.evaluation_judge, key=lambda shape: shape.parameters)
    ),
)
