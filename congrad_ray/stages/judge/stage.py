"""The stage `judge`: a score for every response, from an LLM judge and a rubric.

Every single judgement is a row of `judgements/samples/`, which makes the engine's work resumable; the table
JUDGEMENTS has one row per response, the mean of its readable judgements.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from congrad_ray.config.recipe import Recipe
from congrad_ray.data.tables import row_id, table_of
from congrad_ray.modeling.source import policy, policy_input
from congrad_ray.modeling.tokenization import chat_prompt_ids
from congrad_ray.planning.volume import rows_of
from congrad_ray.rundir.directory import RunDirectoryError, StageFolder
from congrad_ray.rundir.ids import Ids
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.engines import (
    Completion,
    Request,
    Task,
    complete,
    engine_failures,
    judge_source,
    load_chat_tokenizer,
    sampling_seed,
    with_length,
)
from congrad_ray.runtime.requests import read_requests
from congrad_ray.runtime.resources import pool_demand
from congrad_ray.runtime.rows import Counts, outcome_of, write_rows
from congrad_ray.stages.base import Stage
from congrad_ray.stages.generate.schema import RESPONSES
from congrad_ray.stages.judge.estimate import ESTIMATE
from congrad_ray.stages.judge.figures import STEP, figures
from congrad_ray.stages.judge.rubric import Rubric, load_rubric
from congrad_ray.stages.judge.schema import JUDGEMENT_SAMPLES, JUDGEMENTS, ROWS_PER_PART
from congrad_ray.stages.judge.scores import expected_score, read_score, score_token_ids
from congrad_ray.stages.judge.unreadable import Tally, by_reason, counts_by_language, explain, keep_failed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Row = dict[str, Any]

# A mean probability of the score tokens below this is reported: what is left over says little.
_TINY_MASS = 0.01


def run(context: Context) -> Outcome:
    """Judges every response. Raises RubricError, ModelError or ValueError before any engine starts.

    Raises RunDirectoryError as soon as more judgements are unreadable than `limits.unreadable_share` allows.
    """
    output = context.output
    responses = context.input("responses")
    languages = responses.read_table(["language"])["language"].value_counts().to_pylist()
    number = sum(row["counts"] for row in languages)
    samples = StageFolder(output.filesystem, f"{output.path}/samples")
    done = samples.ids("judgement_id")
    asked = context.recipe.judge.samples if context.recipe.judge.method == "sampled" else 1
    tally = Tally({row["values"]: row["counts"] * asked for row in languages})
    if len(done):
        for language, row in counts_by_language(samples.read_table(["language", "unreadable"])).items():
            tally.add(language, row["asked"], row["asked"] - row["readable"])
        _stop_if_unreadable(context, samples, tally)
    if len(done) < number * asked:
        _ask(replace(context, output=samples), responses, asked, done, number * asked - len(done), tally)
    outcome_of(samples, "judgement_id")  # none is there twice: a response is complete once
    _combine(samples, output, asked)
    outcome = outcome_of(output, "response_id", _counters(samples, output), number)
    _warn(context, outcome.counters["judgements"])
    return outcome


def _ask(context: Context, responses: StageFolder, asked: int, done: Ids, missing: int, tally: Tally) -> None:
    """Asks the judge what is missing and writes JUDGEMENT_SAMPLES."""
    recipe, judge = context.recipe, context.recipe.judge
    by_policy = judge.model == "policy"
    source = policy(recipe, context.run, context.iteration) if by_policy else judge_source(judge.model, recipe)
    source = with_length(source, recipe.judgement_length)
    rubric = load_rubric(judge.rubric)
    by_distribution = judge.method == "expected_score"
    tokenizer = load_chat_tokenizer(source)
    tokens = score_token_ids(tokenizer.get_vocab()) if by_distribution else []
    _check_room(recipe, rubric, tokenizer)
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
        mass = why = None
        if by_distribution:
            score, mass = expected_score(completion.first_logprobs, tokens)
            if score is None or mass < judge.min_probability_mass:
                score, why = None, "low_mass"
        elif completion.truncated:  # the score was still to come, or another one
            score, why = None, "truncated"
        else:
            score = read_score(completion.text, row["language"])
            why = "no_score" if score is None else None
        return {
            **row,
            "score": score,
            "mass": mass,
            "output": completion.text,
            "unreadable": why,
            "prompt_tokens": completion.prompt_tokens,
            "output_tokens": completion.response_tokens,
        }

    def check(counts: Counts) -> None:
        for name, language, number in counts:
            if name == "congrad_judgements":
                tally.add(language, number, 0)
            elif name == "congrad_unreadable_judgements":
                tally.add(language, 0, number)
        _stop_if_unreadable(context, context.output, tally)

    schema = pa.schema([JUDGEMENT_SAMPLES.field("judgement_id"), *(RESPONSES.field(name) for name in columns)])
    requests = read_requests(responses, judgements_of, schema, done)
    answers = complete(
        requests,
        missing,
        source,
        context.profile,
        Task(
            request,
            answer,
            JUDGEMENT_SAMPLES,
            1 if by_distribution else judge.max_tokens,
            [token for spellings in tokens for token in spellings],
            "judge.max_length" if judge.max_length else "model.max_length",
        ),
        context.notify(),
    ).map_batches(lambda batch: keep_failed(batch, JUDGEMENT_SAMPLES), batch_format="pyarrow", batch_size=None)
    with engine_failures():
        write_rows(answers, context, JUDGEMENT_SAMPLES, "judgement_id", missing, _counted, check)


def _check_room(recipe: Recipe, rubric: Rubric, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where a language's rubric leaves no room for the longest response to be judged."""
    judge, length = recipe.judge, recipe.judgement_length
    written = judge.max_tokens if judge.method == "sampled" else 1
    texts = {
        tag: rubric.fill(tag, judge.method, [{"role": "user", "content": ""}], "")
        for tag in recipe.prompts.languages
    }
    asked = {
        tag: len(chat_prompt_ids(tokenizer, [{"role": "user", "content": text}])) for tag, text in texts.items()
    }
    longest = max(asked, key=lambda tag: asked[tag])
    needed = asked[longest] + recipe.generate.max_tokens + written
    if needed >= length:
        raise ValueError(
            f"judge: a rubric of {asked[longest]} tokens ({longest}), a response of generate.max_tokens "
            f"({recipe.generate.max_tokens}) and a judgement of {written} are {needed} tokens: no room for a "
            f"prompt in judge.max_length ({length}; null: model.max_length). Raise it to {needed} and the tokens "
            "of your prompts, as far as the judge has positions, or give a folder of shorter texts as judge.rubric"
        )


def _ways_out(recipe: Recipe) -> dict[str, str]:
    judge = recipe.judge
    return {
        "no_score": "the judge does not write the line that the rubric asks for, such as Score: 4, or it says two "
        "things: set judge.method: expected_score, which needs no such line, or take a judge.model that follows "
        "instructions",
        "truncated": f"raise judge.max_tokens ({judge.max_tokens}), or set judge.method: expected_score",
        "low_mass": f"lower judge.min_probability_mass ({judge.min_probability_mass:g})",
        "prompt_too_long": f"raise judge.max_length ({recipe.judgement_length})",
        "bad_request": "the judge's chat template refuses what it is asked: take another judge.model",
    }


def _stop_if_unreadable(context: Context, samples: StageFolder, tally: Tally) -> None:
    """Raises RunDirectoryError where most judgements cannot be read, with what the judge wrote."""
    limit = context.recipe.limits.unreadable_share
    if tally.share() <= limit:
        return
    rows = samples.read_table(["unreadable", "output"]).to_pylist()
    raise RunDirectoryError(
        f"{explain('judgements', rows, _ways_out(context.recipe))}\n"
        f"That is more than limits.unreadable_share ({limit:g}) allows, so the stage stops here. All are in "
        f"{samples.path}. Change the setting and give --redo, or raise limits.unreadable_share and run the same "
        "command again."
    )


def _warn(context: Context, judgements: dict[str, dict[str, Any]]) -> None:
    """Warns about languages of which few judgements can be read."""
    limit = context.recipe.limits.unreadable_share
    for language, row in judgements.items():
        if row["asked"] - row["readable"] > limit * row["asked"]:
            logger.warning(
                f"{language}: {row['readable']} of {row['asked']} judgements can be read "
                f"({by_reason(row['unreadable'])})"
            )
    tiny = {
        tag: row["mean_mass"]
        for tag, row in judgements.items()
        if row["mean_mass"] is not None and row["mean_mass"] < _TINY_MASS
    }
    if tiny:
        logger.warning(
            f"the judge gives the score tokens a mean probability of "
            f"{', '.join(f'{mass:.1g} ({tag})' for tag, mass in tiny.items())}: it would have begun with other "
            "words, so its scores may say little. Look at the pairs; a judge.model that follows instructions helps"
        )


def _counted(row: Row) -> dict[str, int]:
    return {
        "congrad_tokens": (row["prompt_tokens"] or 0) + (row["output_tokens"] or 0),
        "congrad_judgements": 1,
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
        name = f"part-{row_id(*(row['response_id'] for row in complete_rows))}.parquet"
        output.write_table(name, table_of(complete_rows, JUDGEMENTS))
        complete_rows.clear()

    infos = samples.filesystem.get_file_info(samples.parts())
    for info in sorted(infos, key=lambda info: (info.mtime_ns or 0, info.path)):
        part = samples.read_parquet(info.path)
        for row in part.filter(pa.array(~done.contains(part["response_id"]))).to_pylist():
            judgements = pending.setdefault(row["response_id"], {})
            judgements[row["judgement_id"]] = row
            if len(judgements) == asked:
                complete_rows.append(_judgement(list(pending.pop(row["response_id"]).values()), asked))
                if len(complete_rows) == ROWS_PER_PART:
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
    """Mean scores and masses, and judgements asked, readable and unreadable by reason, by language and over all.

    `unreadable` alone counts responses: those of which no judgement could be read.
    """
    table = output.read_table(["language", "score"])
    asked = samples.read_table(["language", "unreadable", "mass", "prompt_tokens", "output_tokens"])
    judgements = counts_by_language(asked)
    for language, row in judgements.items():
        row["mean_score"] = _mean(table.filter(pc.equal(table["language"], language))["score"], 4)
        row["mean_mass"] = _mean(asked.filter(pc.equal(asked["language"], language))["mass"], None)
    return {
        "mean_prompt_tokens": _mean(asked["prompt_tokens"], 1),
        "mean_output_tokens": _mean(asked["output_tokens"], 1),
        "mean_score": _mean(table["score"], 4),
        "mean_mass": _mean(asked["mass"], None),
        "unreadable": table["score"].null_count,
        "unreadable_share": round(table["score"].null_count / len(table), 4),
        "judgements": judgements,
    }


def _mean(column: pa.ChunkedArray, digits: int | None) -> float | None:
    """The mean with this many digits after the point; None: with four significant ones."""
    mean = pc.mean(column).as_py()
    if mean is None or digits is not None:
        return None if mean is None else round(mean, digits)
    return float(f"{mean:.4g}")


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
    summary="Score the responses from 0 to 5 with the policy or another model",
    example="judge.method=expected_score",
    inputs=lambda iteration: [("responses", iteration), *policy_input(iteration)],
    settings=settings,
    run=run,
    demand=lambda recipe, profile: pool_demand(
        "judge", rows_of(recipe).judgements, "vLLM engines", "engines", profile
    ),
    schema=lambda recipe: JUDGEMENTS,
    estimate=ESTIMATE,
    figures=figures,
    step=STEP,
    chats=True,
    parts=("", "samples"),
)
