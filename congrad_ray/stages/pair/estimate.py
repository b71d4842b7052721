"""The estimate of pairing, for plans."""

from __future__ import annotations

from collections.abc import Mapping

from congrad_ray.config.recipe import Recipe
from congrad_ray.planning.estimate import Estimate, Planned
from congrad_ray.planning.storage import number_bytes, table_bytes, text_bytes
from congrad_ray.planning.volume import Volume, pairs_of
from congrad_ray.rundir.directory import Manifest
from congrad_ray.stages.pair.schema import PAIRS


def _volume(planned: Planned, iteration: int) -> Volume:
    return Volume(pairs_of(planned.recipe, planned.lengths))


def _stored(planned: Planned, volume: Volume) -> float:
    lengths = planned.lengths
    texts = text_bytes(planned, lengths.prompt) + 2 * text_bytes(planned, lengths.paired_response)
    return table_bytes(planned, "pair", PAIRS, volume.rows, number_bytes(PAIRS) + texts)


def _measured(recipe: Recipe, manifest: Manifest, finished: Mapping[str, Manifest]) -> dict[str, float]:
    responses = finished.get("responses")
    if responses is None:
        return {}
    return {"pairs_per_prompt": manifest.rows * recipe.generate.num_generations / responses.rows}


ESTIMATE = Estimate(volume=_volume, stored=_stored, measured=_measured)
