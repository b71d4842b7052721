"""The estimate of generating, for plans."""

from __future__ import annotations

import math
from collections.abc import Mapping

from congrad_ray.config.recipe import Recipe
from congrad_ray.planning.engines import engine_replicas, policy_name
from congrad_ray.planning.estimate import Estimate, Planned
from congrad_ray.planning.storage import ID_BYTES, number_bytes, table_bytes, text_bytes
from congrad_ray.planning.volume import Volume, rows_of
from congrad_ray.rundir.directory import Manifest
from congrad_ray.stages.generate.schema import RESPONSES


def _volume(planned: Planned, iteration: int) -> Volume:
    responses, lengths = rows_of(planned.recipe).responses, planned.lengths
    return Volume(responses, responses, responses * lengths.prompt, responses * lengths.response)


def _stored(planned: Planned, volume: Volume) -> float:
    recipe = planned.recipe
    prompt, response = (text_bytes(planned, n) for n in (planned.lengths.prompt, planned.lengths.response))
    # The samples of a prompt stand close together: zstd finds its text and id again.
    again = 1 - 1 / recipe.generate.num_generations
    of_row = number_bytes(RESPONSES) + prompt + response - again * (ID_BYTES + prompt)
    parts = math.ceil(volume.rows / planned.profile.engines.rows_per_batch(recipe.generate.max_tokens))
    return table_bytes(planned, "generate", RESPONSES, volume.rows, of_row, parts)


def _measured(recipe: Recipe, manifest: Manifest, finished: Mapping[str, Manifest]) -> dict[str, float]:
    found: dict[str, float] = {}
    counts, means = manifest.counters.get("responses", {}), manifest.counters.get("mean_tokens", {})
    if counts and counts.keys() == means.keys():
        mean = sum(counts[tag] * means[tag] for tag in counts) / sum(counts.values())
        found |= {"response": mean, "paired_response": mean, "answer": mean}
    if "mean_prompt_tokens" in manifest.counters:
        found["prompt"] = manifest.counters["mean_prompt_tokens"]
    return found


ESTIMATE = Estimate(
    volume=_volume,
    stored=_stored,
    measured=_measured,
    replicas=engine_replicas(lambda shapes: shapes.policy, lambda recipe, iteration: [policy_name(iteration)]),
)
