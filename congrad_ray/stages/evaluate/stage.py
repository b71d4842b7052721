"""The stage `evaluate`: the trained policy against the starting model and others, on prompts held out.

Where a prompt has a task (the built-in world), answers get their true score by program. All other prompts are
compared pairwise by a judge, in both orders. M_0's answers are those of the stage `baseline`.
"""

from __future__ import annotations

import logging
from typing import Any

import pyarrow.compute as pc

from congrad_ray.config.recipe import Recipe, Source
from congrad_ray.data.files import source_digest
from congrad_ray.data.tables import row_id
from congrad_ray.modeling.source import policy
from congrad_ray.planning.volume import rows_of
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.resources import pool_demand
from congrad_ray.runtime.rows import outcome_of
from congrad_ray.stages.base import Stage
from congrad_ray.stages.evaluate.answers import START, answer_prompts, mean_answer_tokens
from congrad_ray.stages.evaluate.comparing import Baseline, compare, judge_of
from congrad_ray.stages.evaluate.estimate import ESTIMATE
from congrad_ray.stages.evaluate.figures import figures
from congrad_ray.stages.evaluate.references import REFERENCES, References, read_references
from congrad_ray.stages.evaluate.schema import ANSWERS
from congrad_ray.stages.evaluate.summary import evaluated
from congrad_ray.stages.judge.pairwise import pairwise_template

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def run(context: Context) -> Outcome:
    """Writes ANSWERS of the trained policy, `comparisons/` and `summary.json`.

    Raises RunDirectoryError without evaluation prompts, ValueError where comparisons do not fit their judge, and
    InputError for references that cannot be used.
    """
    recipe, output = context.recipe, context.output
    before, model = f"M_{context.iteration}", f"M_{context.iteration + 1}"
    judge = judge_of(context)
    references = _references(context)  # before any engine
    expected = answer_prompts(context, policy(recipe, context.run, context.iteration + 1), model)
    own = output.read_table().to_pylist()
    others = context.run.stage("baseline", None).read_table().to_pylist()
    if context.iteration > 0:
        last = context.input("evaluation", context.iteration - 1).read_table()
        others += last.filter(pc.equal(last["model"], before)).to_pylist()
    names = dict.fromkeys(START if name == "start" else before for name in recipe.evaluate.baselines)
    baselines = [baseline_of(name, others) for name in names]
    notes = []
    if references is not None:
        baselines.append(Baseline(REFERENCES, references.answers))
        note = references.note(recipe.evaluate.references or "", len({row["prompt_id"] for row in own}))
        notes = [note] if note else []
    comparisons = compare(context, judge, own, baselines) if judge else []
    found = evaluated(recipe, model, START, [*own, *others], baselines, comparisons, notes)
    for warning in found.warnings:
        logger.warning(warning)
    output.write_json("summary.json", found.summary)
    counters = {**found.counters, "mean_answer_tokens": mean_answer_tokens(output)}
    return outcome_of(output, "answer_id", counters, expected)


def baseline_of(model: str, answers: list[Row]) -> Baseline:
    """A model to compare with, by its greedy answers."""
    rows = [row for row in answers if row["model"] == model and row["decoding"] == "greedy"]
    return Baseline(model, {row["prompt_id"]: row for row in rows})


def _references(context: Context) -> References | None:
    name = context.recipe.evaluate.references
    if name is None:
        return None
    table = context.prompts.read_table(["prompt_id", "split"])
    ids = set(table.filter(pc.equal(table["split"], "evaluation"))["prompt_id"].to_pylist())
    return read_references(reference_source(context.recipe, name), context.recipe.prompts, ids)


def reference_source(recipe: Recipe, name: str) -> Source:
    """A file of reference answers, whose columns and languages are called as those of the evaluation prompts."""
    like = recipe.prompts.evaluation
    return Source(
        name=name,
        prompt_column=like.prompt_column,
        language_column=like.language_column,
        language_names=like.language_names,
    )


def settings(recipe: Recipe, iteration: int) -> Any:
    """What decides the evaluation beside the prompts and the policies."""
    how = recipe.evaluate
    found = how.model_dump(mode="json", exclude={"endpoint"})
    if how.endpoint is not None:  # prices, limits and the key's place decide nothing
        found["endpoint"] = how.endpoint.model_dump(mode="json", include={"url", "model"})
    if how.references is not None:
        found["references"] = source_digest(reference_source(recipe, how.references)) or how.references
    return {
        "model": recipe.model.model_dump(mode="json"),
        "evaluate": found,
        "pairwise": row_id(pairwise_template()),
        "seed": recipe.seed,
        "iteration": iteration,
    }


STAGE = Stage(
    name="evaluate",
    folder="evaluation",
    summary="Compare the trained model with its starting point",
    example="evaluate.sampled=false",
    inputs=lambda iteration: [
        ("prompts", None),
        ("baseline", None),
        ("policy", iteration),
        *([("evaluation", iteration - 1)] if iteration > 0 else []),
    ],
    older_inputs=lambda iteration: [
        ("prompts", None),
        ("policy", iteration),
        *([("evaluation", 0)] if iteration > 0 else []),
    ],
    settings=settings,
    run=run,
    demand=lambda recipe, profile: pool_demand(
        "evaluate", rows_of(recipe).answers, "vLLM engines", "engines", profile
    ),
    schema=lambda recipe: ANSWERS,
    estimate=ESTIMATE,
    figures=figures,
    chats=True,
    parts=("", "comparisons"),
)
