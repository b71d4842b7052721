"""The estimate of evaluating, for plans."""

from __future__ import annotations

from dataclasses import replace

from congrad_ray.config.recipe import BUILTIN_WORLD, Recipe
from congrad_ray.planning.engines import engine_replicas, policy_name
from congrad_ray.planning.estimate import Estimate, Planned, Served
from congrad_ray.planning.volume import Volume, rows_of
from congrad_ray.stages.baseline.estimate import answers_measured, answers_stored
from congrad_ray.stages.judge.pairwise import pairwise_template


def _volume(planned: Planned, iteration: int) -> Volume:
    """Of the engines: the answers, and the comparisons where no server makes them."""
    answers, lengths = rows_of(planned.recipe).answers, planned.lengths
    answered = Volume(answers, answers, answers * lengths.prompt, answers * lengths.answer)
    if planned.recipe.evaluate.endpoint is not None:
        return answered
    compared = _compared(planned, iteration)
    return replace(
        answered,
        requests=answered.requests + compared.requests,
        prefill=answered.prefill + compared.prefill,
        decode=answered.decode + compared.decode,
    )


def _compared(planned: Planned, iteration: int) -> Volume:
    """Both orders of the greedy answers with each of the baselines."""
    recipe, lengths = planned.recipe, planned.lengths
    rows = _baselines(recipe, iteration) * 2 * rows_of(recipe).evaluation
    question = len(pairwise_template().encode()) / planned.assumptions.bytes_per_token + lengths.prompt
    return Volume(rows, rows, rows * (question + 2 * lengths.answer), rows * lengths.verdict)


def _served(planned: Planned, iteration: int) -> Served:
    """What comparisons by a server take: as long as its requests a minute say, and what their tokens cost."""
    endpoint = planned.recipe.evaluate.endpoint
    if endpoint is None:
        return Served()
    volume, per_minute = _compared(planned, iteration), endpoint.requests_per_minute
    seconds = 60.0 * volume.requests / per_minute if per_minute else 0.0
    return Served(seconds, endpoint.dollars(volume.prefill, volume.decode))


def _baselines(recipe: Recipe, iteration: int) -> int:
    """How many there are to compare with; none in the built-in world, which knows true scores instead."""
    how = recipe.evaluate
    if recipe.prompts.evaluation.name == BUILTIN_WORLD:
        return 0
    models = {0 if name == "start" else iteration for name in how.baselines}
    return len(models) + (how.references is not None)


def _asks(recipe: Recipe, iteration: int) -> list[str | None]:
    """The new policy, and the model that compares its answers."""
    asked: list[str | None] = [policy_name(iteration + 1)]
    if recipe.prompts.evaluation.name != BUILTIN_WORLD and recipe.evaluate.endpoint is None:
        asked.append(policy_name(0) if recipe.evaluate.judge == "start" else recipe.evaluate.judge)
    return asked


ESTIMATE = Estimate(
    volume=_volume,
    stored=lambda planned, volume: answers_stored(planned, volume, "evaluate"),
    measured=answers_measured,
    served=_served,
    replicas=engine_replicas(
        lambda shapes: max(shapes.policy, shapes.evaluation_judge, key=lambda shape: shape.parameters), _asks
    ),
)
