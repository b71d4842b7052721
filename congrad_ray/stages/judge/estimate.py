"""The estimate of judging, for plans."""

from __future__ import annotations

import math
from collections.abc import Mapping

from congrad_ray.config.recipe import Recipe
from congrad_ray.planning.engines import engine_replicas
from congrad_ray.planning.estimate import Estimate, Planned
from congrad_ray.planning.storage import ID_BYTES, number_bytes, table_bytes, text_bytes
from congrad_ray.planning.volume import Volume, rows_of
from congrad_ray.rundir.directory import Manifest
from congrad_ray.stages.judge.rubric import load_rubric
from congrad_ray.stages.judge.schema import JUDGEMENT_SAMPLES, JUDGEMENTS, ROWS_PER_PART


def _volume(planned: Planned, iteration: int) -> Volume:
    judgements, lengths = rows_of(planned.recipe).judgements, planned.lengths
    asked = lengths.judge_prompt
    if asked is None:
        instruction = rubric_bytes(planned.recipe) / planned.assumptions.bytes_per_token
        asked = instruction + lengths.prompt + lengths.response
    return Volume(judgements, judgements, judgements * asked, judgements * lengths.judgement)


def rubric_bytes(recipe: Recipe) -> float:
    """UTF-8 bytes of the judge's instruction without the texts it judges, on average over the languages."""
    rubric = load_rubric(recipe.judge.rubric)
    blank = [{"role": "user", "content": ""}]
    filled = [rubric.fill(language, recipe.judge.method, blank, "") for language in recipe.prompts.languages]
    return sum(len(text.encode()) for text in filled) / len(filled)


def _stored(planned: Planned, volume: Volume) -> float:
    recipe = planned.recipe
    judge, responses = recipe.judge, rows_of(recipe).responses
    # As for responses; and what the judge wrote is there twice: a row for each judgement and for each response.
    again = 1 - 1 / recipe.generate.num_generations
    written = 2 * text_bytes(planned, planned.lengths.judgement)
    of_sample = number_bytes(JUDGEMENT_SAMPLES) - again * ID_BYTES + written
    of_row = number_bytes(JUDGEMENTS) - again * ID_BYTES + volume.rows / responses * of_sample
    max_tokens = judge.max_tokens if judge.method == "sampled" else 1
    parts = math.ceil(volume.rows / planned.profile.engines.rows_per_batch(max_tokens))
    parts += math.ceil(responses / ROWS_PER_PART)
    return table_bytes(planned, "judge", JUDGEMENTS, responses, of_row, parts)


def _measured(recipe: Recipe, manifest: Manifest, finished: Mapping[str, Manifest]) -> dict[str, float]:
    counters = manifest.counters
    if counters.get("mean_prompt_tokens") is None:
        return {}
    return {"judge_prompt": counters["mean_prompt_tokens"], "judgement": counters["mean_output_tokens"]}


ESTIMATE = Estimate(
    volume=_volume,
    stored=_stored,
    measured=_measured,
    replicas=engine_replicas(lambda shapes: shapes.judge),
)
