"""The estimate of judging, for plans."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from congrad_ray.config.judging import OneJudge
from congrad_ray.config.recipe import Recipe
from congrad_ray.planning.engines import engine_flops, engine_replicas, policy_name
from congrad_ray.planning.estimate import Estimate, Planned, Served
from congrad_ray.planning.storage import ID_BYTES, number_bytes, table_bytes, text_bytes
from congrad_ray.planning.volume import Volume, judgement_tokens, rows_of
from congrad_ray.rundir.directory import Manifest
from congrad_ray.stages.judge.pairwise import fill_pairwise, pairwise_template
from congrad_ray.stages.judge.rubric import load_rubric
from congrad_ray.stages.judge.schema import JUDGEMENT_SAMPLES, JUDGEMENTS, ROWS_PER_PART


def _volume(planned: Planned, iteration: int) -> Volume:
    """Of all judges."""
    volumes = [volume_of(planned, judge) for judge in planned.recipe.judge.judges.values()]
    return Volume(
        sum(volume.rows for volume in volumes),
        sum(volume.requests for volume in volumes),
        sum(volume.prefill for volume in volumes),
        sum(volume.decode for volume in volumes),
    )


def volume_of(planned: Planned, judge: OneJudge) -> Volume:
    """What one judge reads and writes: a reward model writes nothing, a comparison has two responses."""
    recipe, lengths = planned.recipe, planned.lengths
    judgements = rows_of(recipe).training * judge.judgements_of(recipe.generate.num_generations)
    alone = not recipe.judge.also
    asked = lengths.judge_prompt if alone else None
    if asked is None:
        instruction = instruction_bytes(recipe, judge) / planned.assumptions.bytes_per_token
        responses = 2 if judge.method == "pairwise" else 1
        asked = instruction + lengths.prompt + responses * lengths.response
    written = lengths.judgement if alone else judgement_tokens(judge, planned.assumptions)
    return Volume(judgements, judgements, judgements * asked, judgements * written)


def _flops(planned: Planned, volume: Volume) -> tuple[float, float]:
    """Of the judges that run here."""
    prefill = decode = 0.0
    for judge in planned.recipe.judge.judges.values():
        if judge.endpoint is None:
            read, written = engine_flops(
                planned.shapes.judges.get(judge.model, planned.shapes.judge), volume_of(planned, judge)
            )
            prefill, decode = prefill + read, decode + written
    return prefill, decode


def _engine_models(recipe: Recipe, iteration: int) -> list[str]:
    """Whose engines are asked in an iteration."""
    return [
        policy_name(iteration) if judge.model == "policy" else judge.model
        for judge in recipe.judge.judges.values()
        if judge.endpoint is None
    ]


def _served(planned: Planned, iteration: int) -> Served:
    """What judges behind HTTP take: as long as their requests a minute say, and what their tokens cost."""
    seconds, dollars = 0.0, 0.0
    priced = True
    for judge in planned.recipe.judge.judges.values():
        if judge.endpoint is None:
            continue
        volume = volume_of(planned, judge)
        if judge.endpoint.requests_per_minute:
            seconds += 60.0 * volume.requests / judge.endpoint.requests_per_minute
        cost = judge.endpoint.dollars(volume.prefill, volume.decode)
        priced = priced and cost is not None
        dollars += cost or 0.0
    return Served(seconds, dollars if priced else None)


def instruction_bytes(recipe: Recipe, judge: OneJudge) -> float:
    """UTF-8 bytes of what a judge is told besides the texts it judges, on average over the languages."""
    if judge.method == "reward_model":
        return 0.0
    blank = [{"role": "user", "content": ""}]
    if judge.method == "pairwise":
        return float(len(fill_pairwise(pairwise_template(), blank, "", "").encode()))
    rubric, ending = load_rubric(judge.rubric), judge.ending
    filled = [rubric.fill(language, ending, blank, "") for language in recipe.prompts.languages]
    return sum(len(text.encode()) for text in filled) / len(filled)


def _stored(planned: Planned, volume: Volume) -> float:
    recipe = planned.recipe
    judge, responses = recipe.judge, rows_of(recipe).responses
    # As for responses; and what the judge wrote is there twice: a row for each judgement and for each response.
    again = 1 - 1 / recipe.generate.num_generations
    written = 2 * text_bytes(planned, planned.lengths.judgement)
    of_sample = number_bytes(JUDGEMENT_SAMPLES) - again * ID_BYTES + written
    of_row = number_bytes(JUDGEMENTS) - again * ID_BYTES + volume.rows / responses * of_sample
    parts = math.ceil(volume.rows / planned.profile.engines.rows_per_batch(max(1, judge.writes)))
    parts += math.ceil(responses / ROWS_PER_PART)
    return table_bytes(planned, "judge", JUDGEMENTS, responses, of_row, parts)


def _measured(recipe: Recipe, manifest: Manifest, finished: Mapping[str, Manifest]) -> dict[str, float]:
    counters = manifest.counters
    if counters.get("mean_prompt_tokens") is None or recipe.judge.also:
        return {}
    return {"judge_prompt": counters["mean_prompt_tokens"], "judgement": counters["mean_output_tokens"]}


ESTIMATE = Estimate(
    volume=_volume,
    stored=_stored,
    measured=_measured,
    replicas=replace(engine_replicas(lambda shapes: shapes.judge, _engine_models), flops=_flops),
    served=_served,
)
