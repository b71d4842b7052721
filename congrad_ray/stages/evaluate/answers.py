"""Answers of a model to the evaluation prompts: what `baseline` and `evaluate` share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from congrad_ray.config.recipe import Recipe
from congrad_ray.data.tables import row_id
from congrad_ray.modeling.source import ModelSource
from congrad_ray.rundir.directory import RunDirectoryError, StageFolder
from congrad_ray.runtime.context import Context
from congrad_ray.runtime.engines import Completion, Request, Task, complete, engine_failures, sampling_seed
from congrad_ray.runtime.requests import read_requests
from congrad_ray.runtime.rows import write_rows
from congrad_ray.stages.evaluate.schema import ANSWERS
from congrad_ray.stages.prompts.schema import PROMPTS

logger = logging.getLogger(__name__)

Row = dict[str, Any]

START = "M_0"
_OF_PROMPT = ("prompt_id", "language", "seen", "prompt")


def answer_prompts(context: Context, source: ModelSource, model: str) -> int:
    """Writes the ANSWERS of one model that are missing; returns how many there are to be.

    `model` is what the table calls it. Raises RunDirectoryError where no prompt is for evaluation.
    """
    recipe, output = context.recipe, context.output
    how = recipe.evaluate
    decodings = ("greedy", "sampled") if how.sampled else ("greedy",)
    expected = _answer_ids(context.prompts, model, decodings)
    if not expected:
        raise RunDirectoryError(
            f"no prompt of {context.prompts.path} is for evaluation: see prompts.evaluation in the recipe, and "
            "the reasons in the prompts' quarantine/"
        )

    def questions_of(prompt: Row) -> Iterator[Row]:
        if prompt["split"] != "evaluation":
            return
        for decoding in decodings:
            yield {
                **{name: prompt[name] for name in (*_OF_PROMPT, "task")},
                "answer_id": _answer_id(prompt["prompt_id"], model, decoding),
                "model": model,
                "decoding": decoding,
            }

    def request(row: Row) -> Request:
        if row["decoding"] == "greedy":
            return Request(row["prompt"], how.max_tokens)
        seed = sampling_seed(recipe.seed, row["answer_id"])
        return Request(row["prompt"], how.max_tokens, how.temperature, how.top_p, seed)

    def answer(row: Row, completion: Completion) -> Row:
        score = None
        if row["task"] is not None:
            from congrad_ray.world.score import true_score

            score = true_score(row["task"], row["language"], completion.text)
        return {
            **row,
            "response": completion.text,
            "response_tokens": completion.response_tokens,
            "truncated": completion.truncated,
            "true_score": score,
        }

    fields = [ANSWERS.field(name) for name in ("answer_id", *_OF_PROMPT, "model", "decoding")]
    done = output.ids("answer_id")
    missing = len(expected) - int(done.contains(expected).sum())
    if missing:
        logger.info(f"answers of {model}")
        requests = read_requests(context.prompts, questions_of, pa.schema([*fields, PROMPTS.field("task")]), done)
        answers = complete(
            requests,
            missing,
            source,
            context.profile,
            Task(request, answer, ANSWERS, how.max_tokens),
            context.notify(),
        )
        with engine_failures():
            write_rows(answers, context, ANSWERS, "answer_id", missing, _counted)
    return len(expected)


def answer_settings(recipe: Recipe) -> dict[str, Any]:
    """What decides a model's answers beside the prompts and the model."""
    how = recipe.evaluate.model_dump(mode="json", include={"sampled", "temperature", "top_p", "max_tokens"})
    return {"model": recipe.model.model_dump(mode="json"), "evaluate": how, "seed": recipe.seed}


def mean_answer_tokens(output: StageFolder) -> float:
    """The mean over all answers of a stage."""
    mean: float = pc.mean(output.read_table(["response_tokens"])["response_tokens"]).as_py()
    return round(mean, 1)


def _counted(row: Row) -> dict[str, int]:
    return {"congrad_tokens": row["response_tokens"]}


def _answer_ids(prompts: StageFolder, model: str, decodings: tuple[str, ...]) -> list[str]:
    table = prompts.read_table(["prompt_id", "split"])
    ids = table.filter(pc.equal(table["split"], "evaluation"))["prompt_id"].to_pylist()
    return [_answer_id(identifier, model, decoding) for identifier in ids for decoding in decodings]


def _answer_id(prompt: str, model: str, decoding: str) -> str:
    return row_id("answer", prompt, model, decoding, 0)
