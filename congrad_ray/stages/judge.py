"""The stage `judge`: a score for every response, from an LLM judge and a rubric.

Every single judgement is a row of `judgements/samples/`, which makes the engine's work resumable; the table
JUDGEMENTS has one row per response, the mean of its readable judgements.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from congrad_ray.judging.rubric import load_rubric
from congrad_ray.judging.scores import expected_score, read_score, score_token_ids
from congrad_ray.llm.engine import (
    Completion,
    Request,
    complete,
    engine_failures,
    judge_source,
    load_chat_tokenizer,
    sampling_seed,
)
from congrad_ray.llm.requests import read_requests
from congrad_ray.models import policy, policy_input
from congrad_ray.recipe import Recipe
from congrad_ray.rundir import StageFolder
from congrad_ray.stages.base import Context, Outcome, Stage
from congrad_ray.stages.rows import FAILURE, FAILURE_FIELD, outcome_of, write_rows
from congrad_ray.tables import JUDGEMENT_SAMPLES, JUDGEMENTS, RESPONSES, row_id, table_of

Row = dict[str, Any]

_ROWS_PER_PART = 4096


def run(context: Context) -> Outcome:
    """Judges every response. Raises RubricError, ModelError or ValueError before any engine starts."""
    output = context.output
    responses = context.input("responses")
    number = pc.count(responses.read_table(["response_id"])["response_id"]).as_py()
    samples = StageFolder(output.filesystem, f"{output.path}/samples")
    done = samples.ids("judgement_id")
    asked = context.recipe.judge.samples if context.recipe.judge.method == "sampled" else 1
    if len(done) < number * asked:
        _ask(replace(context, output=samples), responses, asked, done, number * asked - len(done))
    _combine(samples, output, asked)
    return outcome_of(output, "response_id", _counters(samples, output), number)


def _ask(context: Context, responses: StageFolder, asked: int, done: set[str], missing: int) -> None:
    """Asks the judge what is missing and writes JUDGEMENT_SAMPLES."""
    recipe, judge = context.recipe, context.recipe.judge
    by_policy = judge.model == "policy"
    source = policy(recipe, context.run, context.iteration) if by_policy else judge_source(judge.model, recipe)
    rubric = load_rubric(judge.rubric)
    by_distribution = judge.method == "expected_score"
    tokens = score_token_ids(load_chat_tokenizer(source).get_vocab()) if by_distribution else []
    columns = ("response_id", "prompt_id", "language", "prompt", "response")

    def judgements_of(response: Row) -> Iterator[Row]:
        for sample in range(asked):
            identifier = row_id("judgement", response["response_id"], sample)
            yield {"judgement_id": identifier, **{name: response[name] for name in columns}}

    def request(row: Row) -> Request:
        text = rubric.fill(row["language"], judge.method, row["prompt"], row["response"])
        messages = [{"role": "user", "content": text}]
        if by_distribution:
            return Request(messages, max_tokens=1)
        seed = sampling_seed(recipe.seed, row["judgement_id"])
        return Request(messages, judge.max_tokens, judge.temperature, judge.top_p, seed)

    def answer(row: Row, completion: Completion) -> Row:
        mass = None
        if by_distribution:
            score, mass = expected_score(completion.first_logprobs, tokens)
            score = score if mass >= judge.min_probability_mass else None
        else:
            score = read_score(completion.text)
        why = None if score is not None else "low_mass" if by_distribution else "no_score"
        return {
            **row,
            "score": score,
            "mass": mass,
            "output": completion.text,
            "unreadable": why,
            "prompt_tokens": completion.prompt_tokens,
            "output_tokens": completion.response_tokens,
        }

    # A judgement that could not be made is one that cannot be read: the response stays, with a null score.
    def keep_failed(batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        for row in rows:
            if failed := row[FAILURE]:
                row.update({"unreadable": failed["reason"], "output": failed["detail"], FAILURE: None})
        return table_of(rows, pa.schema([*JUDGEMENT_SAMPLES, FAILURE_FIELD]))

    schema = pa.schema([JUDGEMENT_SAMPLES.field("judgement_id"), *(RESPONSES.field(name) for name in columns)])
    requests = read_requests(responses, judgements_of, schema, done)
    scored = [token for spellings in tokens for token in spellings]
    answers = complete(
        requests,
        missing,
        source,
        context.profile,
        request,
        answer,
        JUDGEMENT_SAMPLES,
        1 if by_distribution else judge.max_tokens,
        context.notify(),
        scored,
    )
    answers = answers.map_batches(keep_failed, batch_format="pyarrow", batch_size=None)
    with engine_failures():
        write_rows(answers, context, JUDGEMENT_SAMPLES, "judgement_id", missing, _counted)


def _counted(row: Row) -> dict[str, int]:
    return {
        "congrad_tokens": (row["prompt_tokens"] or 0) + (row["output_tokens"] or 0),
        "congrad_unreadable_judgements": int(row["score"] is None),
    }


def _combine(samples: StageFolder, output: StageFolder, asked: int) -> None:
    """Writes JUDGEMENTS from JUDGEMENT_SAMPLES, reading its parts in the order in which they were written.

    The judgements of a response are asked one after the other, so few responses are incomplete at any time and
    neither a shuffle nor the whole table in memory is needed.
    """
    done = output.ids("response_id")
    pending: dict[str, dict[str, Row]] = {}
    complete_rows: list[Row] = []

    def write() -> None:
        output.write_table(f"part-{uuid.uuid4().hex}.parquet", table_of(complete_rows, JUDGEMENTS))
        complete_rows.clear()

    infos = samples.filesystem.get_file_info(samples.parts())
    for info in sorted(infos, key=lambda info: (info.mtime_ns or 0, info.path)):
        for row in pq.read_table(info.path, filesystem=samples.filesystem).to_pylist():
            if row["response_id"] in done:
                continue
            judgements = pending.setdefault(row["response_id"], {})
            judgements[row["judgement_id"]] = row
            if len(judgements) == asked:
                complete_rows.append(_judgement(list(pending.pop(row["response_id"]).values()), asked))
                done.add(row["response_id"])
                if len(complete_rows) == _ROWS_PER_PART:
                    write()
    if complete_rows:
        write()


def _judgement(judgements: list[Row], asked: int) -> Row:
    """One response's row of JUDGEMENTS: the mean of the readable scores."""
    judgements.sort(key=lambda row: str(row["judgement_id"]))
    scores = [row["score"] for row in judgements if row["score"] is not None]
    return {
        **{name: judgements[0][name] for name in ("response_id", "prompt_id", "language")},
        "score": sum(scores) / len(scores) if scores else None,
        "readable": len(scores),
        "asked": asked,
        "outputs": [row["output"] or "" for row in judgements],
    }


def _counters(samples: StageFolder, output: StageFolder) -> dict[str, Any]:
    """Mean scores by language and what could not be read, by language and reason."""
    table = output.read_table(["language", "score"])
    groups = table.group_by("language").aggregate([("score", "mean"), ("score", "count"), ("language", "count")])
    rows = sorted(groups.to_pylist(), key=lambda row: row["language"])
    asked = samples.read_table(["unreadable", "prompt_tokens", "output_tokens"])
    reasons = asked.group_by("unreadable").aggregate([("unreadable", "count")])
    return {
        "mean_prompt_tokens": _rounded_mean(asked["prompt_tokens"], 1),
        "mean_output_tokens": _rounded_mean(asked["output_tokens"], 1),
        "mean_score": _rounded_mean(table["score"], 4),
        "unreadable": table["score"].null_count,
        "unreadable_share": round(table["score"].null_count / len(table), 4),
        "mean_score_by_language": {
            row["language"]: round(row["score_mean"], 4) for row in rows if row["score_mean"] is not None
        },
        "unreadable_by_language": {
            row["language"]: row["language_count"] - row["score_count"]
            for row in rows
            if row["language_count"] > row["score_count"]
        },
        "unreadable_judgements_by_reason": {
            row["unreadable"]: row["unreadable_count"]
            for row in sorted(reasons.to_pylist(), key=lambda row: str(row["unreadable"]))
            if row["unreadable"] is not None
        },
    }


def _rounded_mean(column: pa.ChunkedArray, digits: int) -> float | None:
    mean = pc.mean(column).as_py()
    return None if mean is None else round(mean, digits)


def settings(recipe: Recipe, iteration: int) -> Any:
    """What decides the judgements beside the responses: the judge, the rubric's text, and the seed."""
    return {
        "model": recipe.model.model_dump(mode="json"),
        "judge": recipe.judge.model_dump(mode="json"),
        "rubric": load_rubric(recipe.judge.rubric).digest(),
        "seed": recipe.seed,
    }


STAGE = Stage(
    name="judge",
    folder="judgements",
    summary="a score for every response from an LLM judge",
    inputs=lambda iteration: [("responses", iteration), *policy_input(iteration)],
    settings=settings,
    run=run,
    chats=True,
)
