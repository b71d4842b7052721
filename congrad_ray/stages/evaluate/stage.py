"""The stage `evaluate`: the trained policy against the starting model, on prompts held out.

Where a prompt has a task (the built-in world), answers get their true score by program. All other prompts are
compared pairwise by a judge, in both orders. M_0 answers in iteration 0 and its answers serve all later ones.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from congrad_ray.config.recipe import Recipe
from congrad_ray.data.tables import row_id
from congrad_ray.modeling.source import ModelSource, policy
from congrad_ray.modeling.tokenization import chat_prompt_ids
from congrad_ray.planning.volume import rows_of
from congrad_ray.rundir.directory import RunDirectoryError, StageFolder
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.engines import (
    Completion,
    Request,
    Task,
    complete,
    engine_failures,
    judge_source,
    load_chat_tokenizer,
    positions,
    sampling_seed,
    with_length,
)
from congrad_ray.runtime.requests import read_requests
from congrad_ray.runtime.resources import pool_demand
from congrad_ray.runtime.rows import outcome_of, write_rows
from congrad_ray.stages.base import Stage
from congrad_ray.stages.evaluate.estimate import ESTIMATE
from congrad_ray.stages.evaluate.figures import figures
from congrad_ray.stages.evaluate.pairwise import ORDERS, fill_pairwise, pairwise_template, read_win
from congrad_ray.stages.evaluate.schema import ANSWERS, COMPARISONS
from congrad_ray.stages.evaluate.statistics import (
    EVERY_LANGUAGE,
    ScoreChange,
    WinRate,
    score_changes,
    summarise_answers,
    win_rates,
)
from congrad_ray.stages.judge.unreadable import explain, keep_failed
from congrad_ray.stages.prompts.schema import PROMPTS

logger = logging.getLogger(__name__)

Row = dict[str, Any]

BASELINE = "M_0"


def run(context: Context) -> Outcome:
    """Writes ANSWERS, `comparisons/` and `summary.json`.

    Raises RunDirectoryError without evaluation prompts, and ValueError where comparisons do not fit their judge.
    """
    recipe, output = context.recipe, context.output
    model = f"M_{context.iteration + 1}"
    judge = _judge(context)
    expected = 0
    if context.iteration == 0:
        expected += _answer(context, policy(recipe, context.run, 0), BASELINE)
    expected += _answer(context, policy(recipe, context.run, context.iteration + 1), model)
    answers = output.read_table().to_pylist()
    if context.iteration > 0:
        first = context.input("evaluation", 0).read_table().to_pylist()
        answers += [row for row in first if row["model"] == BASELINE]
    comparisons = _compare(context, judge, answers, model) if judge else []
    changes = score_changes(answers, BASELINE, model, recipe.seed)
    rates = win_rates(comparisons, recipe.seed, recipe.evaluate.min_prompts)
    warnings = _warnings(recipe, comparisons, rates)
    for warning in warnings:
        logger.warning(warning)
    output.write_json(
        "summary.json",
        {
            "model": model,
            "baseline": BASELINE,
            "answers": [asdict(summary) for summary in summarise_answers(answers)],
            "score_changes": [asdict(change) for change in changes],
            "win_rates": [asdict(rate) for rate in rates],
            "warnings": warnings,
        },
    )
    tokens = pc.mean(output.read_table(["response_tokens"])["response_tokens"]).as_py()
    counters = {**_counters(changes, rates), "mean_answer_tokens": round(tokens, 1)}
    return outcome_of(output, "answer_id", counters, expected)


def _judge(context: Context) -> ModelSource | None:
    """The model that compares answers, with room for the longest of them; None where all have a true score.

    Raises ValueError where there is no such room.
    """
    recipe, how = context.recipe, context.recipe.evaluate
    prompts = context.prompts.read_table(["split", "task"])
    if not pc.any(pc.and_(pc.equal(prompts["split"], "evaluation"), pc.is_null(prompts["task"]))).as_py():
        return None
    source = policy(recipe, context.run, 0) if how.judge == "start" else judge_source(how.judge, recipe)
    length = recipe.comparison_length
    if how.judge_max_length is None:
        length = min(length, positions(source) or length)
    text = fill_pairwise(pairwise_template(), [{"role": "user", "content": ""}], "", "")
    asked = len(chat_prompt_ids(load_chat_tokenizer(source), [{"role": "user", "content": text}]))
    needed = asked + 2 * how.max_tokens + how.judge_max_tokens
    if needed >= length:
        raise ValueError(
            f"evaluate: an instruction of {asked} tokens, two answers of evaluate.max_tokens ({how.max_tokens}) "
            f"and a verdict of evaluate.judge_max_tokens ({how.judge_max_tokens}) are {needed} tokens: no room "
            f"for a prompt in evaluate.judge_max_length ({length}; null: up to the judge's positions). Raise it, "
            "lower the other two, or take an evaluate.judge with more positions"
        )
    return with_length(source, length)


def _answer(context: Context, source: ModelSource, model: str) -> int:
    """Writes the answers of one model that are missing; returns how many there are to be."""
    recipe, output = context.recipe, context.output
    how = recipe.evaluate
    decodings = ("greedy", "sampled") if how.sampled else ("greedy",)
    expected = _answer_ids(context.prompts, model, decodings)
    if not expected:
        raise RunDirectoryError(
            f"no prompt of {context.prompts.path} is for evaluation: see prompts.evaluation in the recipe, and "
            "the reasons in the prompts' quarantine/"
        )
    columns = ("prompt_id", "language", "seen", "prompt")

    def questions_of(prompt: Row) -> Iterator[Row]:
        if prompt["split"] != "evaluation":
            return
        for decoding in decodings:
            yield {
                **{name: prompt[name] for name in (*columns, "task")},
                "answer_id": row_id("answer", prompt["prompt_id"], model, decoding, 0),
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

    fields = [ANSWERS.field(name) for name in ("answer_id", *columns, "model", "decoding")]
    done = output.ids("answer_id")  # of both models
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


def _counted(row: Row) -> dict[str, int]:
    return {"congrad_tokens": row["response_tokens"]}


def _answer_ids(prompts: StageFolder, model: str, decodings: tuple[str, ...]) -> list[str]:
    table = prompts.read_table(["prompt_id", "split"])
    ids = table.filter(pc.equal(table["split"], "evaluation"))["prompt_id"].to_pylist()
    return [row_id("answer", identifier, model, decoding, 0) for identifier in ids for decoding in decodings]


def _compare(context: Context, source: ModelSource, answers: list[Row], model: str) -> list[Row]:
    """The judge's comparisons of greedy answers that have no true score, in both orders; those made are kept."""
    import ray

    recipe = context.recipe
    output = StageFolder(context.output.filesystem, f"{context.output.path}/comparisons")
    greedy = [row for row in answers if row["decoding"] == "greedy" and row["true_score"] is None]
    baselines = {row["prompt_id"]: row for row in greedy if row["model"] == BASELINE}
    done = output.ids("comparison_id")
    wanted = []
    for row in greedy:
        if row["model"] != model or row["prompt_id"] not in baselines:
            continue
        baseline = baselines[row["prompt_id"]]
        for order in ORDERS:
            identifier = row_id("comparison", row["answer_id"], baseline["answer_id"], order)
            wanted.append(
                {
                    **{name: row[name] for name in ("prompt_id", "language", "seen", "prompt", "model")},
                    "comparison_id": identifier,
                    "baseline": BASELINE,
                    "order": order,
                    "model_response": row["response"],
                    "baseline_response": baseline["response"],
                }
            )
    there = done.contains([row["comparison_id"] for row in wanted])
    missing = [row for row, is_there in zip(wanted, there, strict=True) if not is_there]
    template = pairwise_template()

    def request(row: Row) -> Request:
        texts = [row["model_response"], row["baseline_response"]]
        first, second = texts if row["order"] == "model_first" else reversed(texts)
        text = fill_pairwise(template, row["prompt"], first, second)
        return Request([{"role": "user", "content": text}], recipe.evaluate.judge_max_tokens)

    def answer(row: Row, completion: Completion) -> Row:
        # A verdict that is cut off may have been followed by another.
        win = None if completion.truncated else read_win(completion.text, row["order"])
        why = "truncated" if completion.truncated else "no_verdict" if win is None else None
        return {**row, "win": win, "output": completion.text, "unreadable": why}

    if missing:
        logger.info(f"{len(missing)} comparisons by {source.name}")
        dataset = ray.data.from_arrow(pa.Table.from_pylist(missing))
        within = replace(context, output=output)
        compared = complete(
            dataset,
            len(missing),
            source,
            context.profile,
            Task(
                request,
                answer,
                COMPARISONS,
                recipe.evaluate.judge_max_tokens,
                length_setting="evaluate.judge_max_length",
            ),
            within.notify(),
        ).map_batches(lambda batch: keep_failed(batch, COMPARISONS), batch_format="pyarrow", batch_size=None)
        with engine_failures():
            write_rows(compared, within, COMPARISONS, "comparison_id", len(missing))
    outcome_of(output, "comparison_id")  # a retried task may write one twice
    return output.read_table().to_pylist() if output.parts() else []


def _warnings(recipe: Recipe, comparisons: list[Row], rates: list[WinRate]) -> list[str]:
    """What a reader of the win rates has to know. It stops nothing: no later stage needs the comparisons."""
    how, found = recipe.evaluate, []
    unreadable = sum(row["win"] is None for row in comparisons)
    if unreadable > recipe.limits.unreadable_share * len(comparisons):
        ways_out = {
            "no_verdict": "the judge does not write the line that it is asked for, such as Verdict: A, or says "
            "two things: take an evaluate.judge that follows instructions",
            "truncated": f"raise evaluate.judge_max_tokens ({how.judge_max_tokens})",
            "prompt_too_long": f"raise evaluate.judge_max_length ({how.judge_max_length or 'null'}), as far as "
            "the judge has positions, or lower evaluate.max_tokens",
            "bad_request": "the judge's chat template refuses what it is asked: take another evaluate.judge",
        }
        found.append(f"{explain('comparisons', comparisons, ways_out)}\nWin rates are of what is left.")
    few = [
        f"{'all' if rate.language == EVERY_LANGUAGE else rate.language} ({rate.prompts})"
        for rate in rates
        if rate.prompts < how.min_prompts
    ]
    if few:
        found.append(
            f"no win rate where fewer than evaluate.min_prompts ({how.min_prompts}) prompts have a verdict that "
            f"can be read: {', '.join(few)}"
        )
    return found


def _counters(changes: list[ScoreChange], rates: list[WinRate]) -> dict[str, Any]:
    """The means over languages, as flat numbers for the screen."""
    counters: dict[str, Any] = {}
    for change in changes:
        if change.language == EVERY_LANGUAGE:
            name = f"{change.decoding}_{'seen' if change.seen else 'unseen'}"
            counters[f"{name}_before"] = round(change.before, 4)
            counters[f"{name}_after"] = round(change.after, 4)
    for rate in rates:
        if rate.language == EVERY_LANGUAGE and rate.win_rate is not None:
            counters[f"win_rate_{'seen' if rate.seen else 'unseen'}"] = round(rate.win_rate, 4)
    everything = [rate for rate in rates if rate.language == EVERY_LANGUAGE]
    counters["comparisons"] = sum(rate.asked for rate in everything)
    counters["unreadable_comparisons"] = sum(rate.asked - rate.readable for rate in everything)
    return counters


def settings(recipe: Recipe, iteration: int) -> Any:
    """What decides the evaluation beside the prompts and the policies."""
    return {
        "model": recipe.model.model_dump(mode="json"),
        "evaluate": recipe.evaluate.model_dump(mode="json"),
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
        ("policy", iteration),
        *([("evaluation", 0)] if iteration > 0 else []),
    ],
    settings=settings,
    run=run,
    demand=lambda recipe, profile: pool_demand(
        "evaluate", 2 * rows_of(recipe).answers, "vLLM engines", "engines", profile
    ),
    schema=lambda recipe: ANSWERS,
    estimate=ESTIMATE,
    figures=figures,
    chats=True,
    parts=("", "comparisons"),
)
