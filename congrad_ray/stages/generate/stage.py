"""The stage `generate`: n sampled responses of the policy to every training prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from congrad_ray.config.recipe import Recipe
from congrad_ray.data.tables import response_id
from congrad_ray.modeling.source import policy, policy_input
from congrad_ray.planning.volume import rows_of
from congrad_ray.rundir.directory import RunDirectoryError, StageFolder
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.engines import Completion, Request, Task, complete, engine_failures, sampling_seed
from congrad_ray.runtime.requests import read_requests
from congrad_ray.runtime.resources import pool_demand
from congrad_ray.runtime.rows import outcome_of, write_rows
from congrad_ray.stages.base import Stage
from congrad_ray.stages.generate.estimate import ESTIMATE
from congrad_ray.stages.generate.schema import RESPONSES
from congrad_ray.stages.view import Step, rows_by_language

Row = dict[str, Any]


def run(context: Context) -> Outcome:
    """Writes RESPONSES, one row per prompt and sample. Raises RunDirectoryError when no prompt is for training."""
    recipe, iteration, output = context.recipe, context.iteration, context.output
    sampling, seed = recipe.generate, recipe.seed
    columns = ["response_id", "prompt_id", "language", "prompt", "sample", "seed"]
    requests_schema = pa.schema([RESPONSES.field(name) for name in columns])

    def samples_of(prompt: Row) -> Iterator[Row]:
        if prompt["split"] != "train":
            return
        for sample in range(sampling.num_generations):
            identifier = response_id(prompt["prompt_id"], iteration, sample)
            yield {
                **{name: prompt[name] for name in ("prompt_id", "language", "prompt")},
                "response_id": identifier,
                "sample": sample,
                "seed": sampling_seed(seed, identifier),
            }

    def request(row: Row) -> Request:
        return Request(
            row["prompt"],
            sampling.max_tokens,
            sampling.temperature,
            sampling.top_p,
            row["seed"],
            sampling.top_k,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.stop,
        )

    def answer(row: Row, completion: Completion) -> Row:
        return {
            **row,
            "response": completion.text,
            "prompt_tokens": completion.prompt_tokens,
            "response_tokens": completion.response_tokens,
            "truncated": completion.truncated,
        }

    prompts = pc.sum(pc.equal(context.prompts.read_table(["split"])["split"], "train")).as_py() or 0
    if not prompts:
        raise RunDirectoryError(
            f"no prompt of {context.prompts.path} is for training: see prompts.train and prompts.languages in the "
            "recipe, and the reasons in the prompts' quarantine/"
        )
    total = prompts * sampling.num_generations
    done = output.ids("response_id")
    if len(done) < total:
        requests = read_requests(context.prompts, samples_of, requests_schema, done)
        model = policy(recipe, context.run, iteration)
        answers = complete(
            requests,
            total - len(done),
            model,
            context.profile,
            Task(request, answer, RESPONSES, sampling.max_tokens),
            context.notify(),
        )
        with engine_failures():
            write_rows(answers, context, RESPONSES, "response_id", total - len(done), _counted)
    return outcome_of(output, "response_id", _counters(output), total)


def _counted(row: Row) -> dict[str, int]:
    return {"congrad_tokens": row["prompt_tokens"] + row["response_tokens"]}


def _counters(output: StageFolder) -> dict[str, Any]:
    """Responses, mean tokens and the truncated share by language; that share and prompts' mean tokens over all."""
    if not output.parts():
        return {}
    table = output.read_table(["language", "prompt_tokens", "response_tokens", "truncated"])
    groups = table.group_by("language").aggregate(
        [("language", "count"), ("response_tokens", "mean"), ("truncated", "mean")]
    )
    rows = sorted(groups.to_pylist(), key=lambda row: row["language"])
    return {
        "truncated_share": round(pc.mean(table["truncated"]).as_py(), 4),
        "mean_prompt_tokens": round(pc.mean(table["prompt_tokens"]).as_py(), 1),
        "responses": {row["language"]: row["language_count"] for row in rows},
        "mean_tokens": {row["language"]: round(row["response_tokens_mean"], 1) for row in rows},
        "truncated_share_by_language": {row["language"]: round(row["truncated_mean"], 4) for row in rows},
    }


def settings(recipe: Recipe, iteration: int) -> Any:
    """What decides the responses beside the prompts and the policy."""
    return {
        "model": recipe.model.model_dump(mode="json"),
        "generate": recipe.generate.model_dump(mode="json"),
        "seed": recipe.seed,
        "iteration": iteration,
    }


STAGE = Stage(
    name="generate",
    folder="responses",
    summary="Sample responses from the policy with vLLM under Ray Data",
    example="generate.temperature=1.0",
    inputs=lambda iteration: [("prompts", None), *policy_input(iteration)],
    settings=settings,
    run=run,
    demand=lambda recipe, profile: pool_demand(
        "generate", rows_of(recipe).responses, "vLLM engines", "engines", profile
    ),
    schema=lambda recipe: RESPONSES,
    estimate=ESTIMATE,
    step=Step(
        "responses",
        "responses",
        "of prompts × generations",
        rows_by_language,
        "prompts",
        lambda recipe: recipe.generate.num_generations,
    ),
    chats=True,
    parts=("",),
)
