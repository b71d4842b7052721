"""The estimate of selecting, for plans."""

from __future__ import annotations

from congrad_ray.planning.estimate import Estimate, Planned
from congrad_ray.planning.storage import number_bytes, table_bytes, text_bytes
from congrad_ray.planning.volume import Volume, kept_pairs, pairs_of
from congrad_ray.stages.select.schema import SCORES, SELECTED


def _volume(planned: Planned, iteration: int) -> Volume:
    return Volume(pairs_of(planned.recipe, planned.lengths))


def _stored(planned: Planned, volume: Volume) -> float:
    recipe, lengths = planned.recipe, planned.lengths
    kept = kept_pairs(recipe, lengths, planned.assumptions, volume.rows) / volume.rows
    texts = text_bytes(planned, lengths.prompt) + 2 * text_bytes(planned, lengths.paired_response)
    of_row = number_bytes(SCORES) + kept * (number_bytes(SELECTED) + texts)
    # The direction for each language, and the languages' gradients, in float32.
    direction = 8.0 * len(recipe.prompts.languages) * recipe.sketch.width
    return table_bytes(planned, "select", SCORES, volume.rows, of_row, parts=2) + direction


ESTIMATE = Estimate(volume=_volume, stored=_stored)
