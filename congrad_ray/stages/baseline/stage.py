"""The stage `baseline`: the starting model's answers to the evaluation prompts.

It comes before the first iteration, so that the engine that answers goes on to generate.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from congrad_ray.config.recipe import Recipe
from congrad_ray.modeling.source import policy
from congrad_ray.planning.volume import rows_of
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.resources import pool_demand
from congrad_ray.runtime.rows import outcome_of
from congrad_ray.stages.base import Stage
from congrad_ray.stages.baseline.estimate import ESTIMATE
from congrad_ray.stages.evaluate.answers import START, answer_prompts, answer_settings, mean_answer_tokens
from congrad_ray.stages.evaluate.schema import ANSWERS


def run(context: Context) -> Outcome:
    """Writes ANSWERS of M_0. Raises RunDirectoryError without evaluation prompts."""
    expected = answer_prompts(context, policy(context.recipe, context.run, 0), START)
    counters = {"mean_answer_tokens": mean_answer_tokens(context.output)}
    return outcome_of(context.output, "answer_id", counters, expected)


def settings(recipe: Recipe, iteration: int) -> Any:
    """What decides the answers beside the prompts."""
    return answer_settings(recipe)


def adopted(recipe: Recipe, run: RunDirectory) -> pa.Table | None:
    """M_0's answers in the evaluation of iteration 0, where older versions have them.

    None where that is not finished, or was made of other prompts or with other settings of answers.
    """
    folder = run.stage("evaluation", 0)
    manifest, prompts = folder.manifest(), run.stage("prompts", None).manifest()
    if manifest is None or prompts is None or manifest.inputs.get("prompts") != prompts.fingerprint:
        return None
    now, then = answer_settings(recipe), manifest.settings
    if not isinstance(then, dict) or not isinstance(then.get("evaluate"), dict):
        return None
    same = all(then.get(name) == now[name] for name in ("model", "seed")) and all(
        then["evaluate"].get(name) == value for name, value in now["evaluate"].items()
    )
    table = folder.read_table() if same else None
    found = None if table is None else table.filter(pc.equal(table["model"], START))
    return found if found is not None and len(found) else None


STAGE = Stage(
    name="baseline",
    folder="baseline",
    summary="Answer the evaluation prompts with the starting model",
    example="evaluate.sampled=false",
    inputs=lambda iteration: [("prompts", None)],
    settings=settings,
    run=run,
    demand=lambda recipe, profile: pool_demand(
        "baseline", rows_of(recipe).answers, "vLLM engines", "engines", profile
    ),
    schema=lambda recipe: ANSWERS,
    estimate=ESTIMATE,
    each_iteration=False,
    chats=True,
    parts=("",),
    adopted=adopted,
)
