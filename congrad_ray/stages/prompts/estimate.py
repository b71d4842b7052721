"""The estimate of the prompts, for plans."""

from __future__ import annotations

from congrad_ray.planning.estimate import Estimate, Planned
from congrad_ray.planning.storage import number_bytes, table_bytes, text_bytes
from congrad_ray.planning.volume import Volume, rows_of
from congrad_ray.stages.prompts.schema import PROMPTS


def _volume(planned: Planned, iteration: int) -> Volume:
    rows = rows_of(planned.recipe)
    return Volume(rows.training + rows.evaluation if iteration == 0 else 0)


def _stored(planned: Planned, volume: Volume) -> float:
    of_row = number_bytes(PROMPTS) + text_bytes(planned, planned.lengths.prompt)
    return table_bytes(planned, "prompts", PROMPTS, volume.rows, of_row)


ESTIMATE = Estimate(volume=_volume, stored=_stored)
