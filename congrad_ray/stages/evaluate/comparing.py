"""A judge's comparisons of two answers to the same prompt, in both orders."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from congrad_ray.config.endpoint import Endpoint
from congrad_ray.config.evaluation import Evaluate
from congrad_ray.config.profile import PoolName
from congrad_ray.config.recipe import Recipe
from congrad_ray.data.tables import row_id
from congrad_ray.modeling.source import ModelSource, policy
from congrad_ray.modeling.tokenization import chat_prompt_ids
from congrad_ray.rundir.directory import StageFolder
from congrad_ray.runtime.asking import ask
from congrad_ray.runtime.context import Context
from congrad_ray.runtime.endpoint import check_endpoint, endpoint_key
from congrad_ray.runtime.engines import (
    Completion,
    Request,
    Task,
    engine_failures,
    judge_source,
    load_chat_tokenizer,
    with_length,
)
from congrad_ray.runtime.pools import positions
from congrad_ray.runtime.rows import outcome_of, write_rows
from congrad_ray.stages.evaluate.schema import COMPARISONS
from congrad_ray.stages.evaluate.statistics import EVERY_LANGUAGE, WinRate
from congrad_ray.stages.judge.pairwise import ORDERS, fill_pairwise, pairwise_template, read_win
from congrad_ray.stages.judge.unreadable import explain, keep_failed

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class Baseline:
    """What a model is compared with: its name, and by prompt id rows with `answer_id` and `response`."""

    name: str
    answers: Mapping[str, Row]


def judge_of(context: Context) -> ModelSource | Endpoint | None:
    """Who compares answers; None where all prompts have a true score.

    A model gets room for the longest comparison; a server is asked whether it answers. Raises ValueError where
    there is no room, and SettingsError for a server that does not answer or whose key is not there.
    """
    recipe, how = context.recipe, context.recipe.evaluate
    prompts = context.prompts.read_table(["split", "task"])
    if not pc.any(pc.and_(pc.equal(prompts["split"], "evaluation"), pc.is_null(prompts["task"]))).as_py():
        return None
    if how.endpoint is not None:
        check_server(how)
        return how.endpoint
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


def check_server(how: Evaluate) -> None:
    """Asks the server that compares, where there is one, about one example. Raises SettingsError as `judge_of`."""
    if how.endpoint is None:
        return
    task = _task(how)
    example = {"prompt": [{"role": "user", "content": "?"}], "order": "model_first"}
    request = task.request({**example, "model_response": "yes", "baseline_response": "no"})
    check_endpoint(how.endpoint, endpoint_key(how.endpoint), task, request)


def compare(
    context: Context, judge: ModelSource | Endpoint, answers: Sequence[Row], baselines: Sequence[Baseline]
) -> list[Row]:
    """The COMPARISONS of a model's greedy answers that have no true score with each of the baselines.

    Written to `comparisons/`; those made are kept. A prompt that a baseline did not answer is left out.
    """
    import ray

    output = StageFolder(context.output.filesystem, f"{context.output.path}/comparisons")
    wanted = wanted_comparisons(answers, baselines)
    there = output.ids("comparison_id").contains([row["comparison_id"] for row in wanted])
    missing = [row for row, is_there in zip(wanted, there, strict=True) if not is_there]
    if missing:
        name = judge.model if isinstance(judge, Endpoint) else judge.name
        logger.info(f"{len(missing)} comparisons by {name}")
        within = replace(context, output=output)
        # A model that answers, too, has its engine already.
        pool: PoolName = "engines" if context.recipe.evaluate.judge == "start" else "judge_engines"
        compared = ask(
            ray.data.from_arrow(pa.Table.from_pylist(missing)),
            len(missing),
            judge,
            context.profile,
            _task(context.recipe.evaluate),
            within.notify(),
            pool=pool,
        ).map_batches(lambda batch: keep_failed(batch, COMPARISONS), batch_format="pyarrow", batch_size=None)
        with engine_failures():
            write_rows(compared, within, COMPARISONS, "comparison_id", len(missing))
    outcome_of(output, "comparison_id")  # a retried task may write one twice
    return output.read_table().to_pylist() if output.parts() else []


def cost_of(how: Evaluate, comparisons: Sequence[Row]) -> float | None:
    """US dollars that a server's comparisons cost; None without a server, or one without prices."""
    if how.endpoint is None:
        return None
    read, written = (sum(row[name] or 0 for row in comparisons) for name in ("prompt_tokens", "output_tokens"))
    return how.endpoint.dollars(read, written)


def _task(how: Evaluate) -> Task:
    template = pairwise_template()

    def request(row: Row) -> Request:
        texts = [row["model_response"], row["baseline_response"]]
        first, second = texts if row["order"] == "model_first" else reversed(texts)
        text = fill_pairwise(template, row["prompt"], first, second)
        return Request([{"role": "user", "content": text}], how.judge_max_tokens)

    def answer(row: Row, completion: Completion) -> Row:
        # A verdict that is cut off may have been followed by another.
        win = None if completion.truncated else read_win(completion.text, row["order"])
        why = "truncated" if completion.truncated else "no_verdict" if win is None else None
        return {
            **row,
            "win": win,
            "output": completion.text,
            "unreadable": why,
            "prompt_tokens": completion.prompt_tokens,
            "output_tokens": completion.response_tokens,
        }

    return Task(request, answer, COMPARISONS, how.judge_max_tokens, length_setting="evaluate.judge_max_length")


def wanted_comparisons(answers: Sequence[Row], baselines: Sequence[Baseline]) -> list[Row]:
    """What the judge is to compare: the first columns of COMPARISONS, and both texts."""
    columns = ("prompt_id", "language", "seen", "prompt", "model")
    return [
        {
            **{name: row[name] for name in columns},
            "comparison_id": row_id("comparison", row["answer_id"], other["answer_id"], order),
            "baseline": baseline.name,
            "order": order,
            "model_response": row["response"],
            "baseline_response": other["response"],
        }
        for baseline in baselines
        for row in answers
        if row["decoding"] == "greedy"
        and row["true_score"] is None
        and (other := baseline.answers.get(row["prompt_id"]))
        for order in ORDERS
    ]


def warnings_of(recipe: Recipe, comparisons: Sequence[Row], rates: Sequence[WinRate]) -> list[str]:
    """What a reader of the win rates has to know. It stops nothing: no later stage needs the comparisons."""
    how, found = recipe.evaluate, []
    unreadable = sum(row["win"] is None for row in comparisons)
    if unreadable > recipe.limits.unreadable_share * len(comparisons):
        found.append(f"{explain('comparisons', comparisons, _ways_out(how))}\nWin rates are of what is left.")
    few = [
        f"{'all' if rate.language == EVERY_LANGUAGE else rate.language}"
        f"{f' against {rate.baseline}' if len({rate.baseline for rate in rates}) > 1 else ''} ({rate.prompts})"
        for rate in rates
        if rate.prompts < how.min_prompts
    ]
    if few:
        found.append(
            f"no win rate where fewer than evaluate.min_prompts ({how.min_prompts}) prompts have a verdict that "
            f"can be read: {', '.join(few)}"
        )
    return found


def _ways_out(how: Evaluate) -> dict[str, str]:
    another = "evaluate.endpoint" if how.endpoint else "evaluate.judge"
    return {
        "no_verdict": "the judge does not write the line that it is asked for, such as Verdict: A, or says "
        f"two things: take an {another} that follows instructions",
        "truncated": f"raise evaluate.judge_max_tokens ({how.judge_max_tokens})",
        "prompt_too_long": f"raise evaluate.judge_max_length ({how.judge_max_length or 'null'}), as far as "
        "the judge has positions, or lower evaluate.max_tokens",
        "bad_request": f"the judge's chat template refuses what it is asked: take another {another}",
    }
