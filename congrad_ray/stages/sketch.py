"""sketch: the count-sketch of every pair's gradient, by a Ray actor pool of model replicas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from congrad_ray.models import ModelSource, policy, policy_input
from congrad_ray.preference.tokenization import (
    MissingChatTemplate,
    PairTooLong,
    TokenizedPair,
    chat_prompt_ids,
    tokenize_pair,
)
from congrad_ray.recipe import Recipe
from congrad_ray.rundir import RunDirectoryError
from congrad_ray.stages.base import Context, Outcome, Stage
from congrad_ray.stages.rows import FAILURE, FAILURE_FIELD, failure, outcome_of, read_missing, write_rows
from congrad_ray.tables import MESSAGES, sketches_schema

if TYPE_CHECKING:
    import torch

_PAIRS_PER_TASK = 64


class SketchReplica:
    """A model replica in an actor of the pool: turns rows of pairs into rows of sketches."""

    def __init__(self, source: ModelSource, recipe: Recipe, device: str, threads: int) -> None:
        import torch

        from congrad_ray.gradient.capture import PairGradientSketcher

        if device == "cpu":
            torch.set_num_threads(threads)
        self._device = device
        self._recipe = recipe
        self._tokenizer = source.load_tokenizer()
        self._sketcher = PairGradientSketcher(
            source.load_model(device), recipe.sketch.width, recipe.sketch.seed, recipe.sketch.layers
        )
        schema = sketches_schema(recipe.sketch.width)
        self._schema = pa.schema([field.with_nullable(True) for field in schema] + [FAILURE_FIELD])

    def __call__(self, batch: pa.Table) -> pa.Table:
        from congrad_ray.preference.batching import token_budget_batches

        rows = batch.select(["pair_id", "language", "prompt", "chosen", "rejected"]).to_pylist()
        results: list[dict[str, Any]] = [
            {"pair_id": row["pair_id"], "language": row["language"], FAILURE: None} for row in rows
        ]
        tokenized: list[tuple[int, TokenizedPair]] = []
        for index, row in enumerate(rows):
            try:
                pair = tokenize_pair(
                    self._tokenizer,
                    row["prompt"],
                    row["chosen"],
                    row["rejected"],
                    self._recipe.model.max_length,
                )
            except MissingChatTemplate:
                raise
            except ValueError as error:
                reason = "pair_too_long" if isinstance(error, PairTooLong) else "cannot_tokenize"
                results[index][FAILURE] = failure(reason, error)
                continue
            tokenized.append((index, pair))
        lengths = [pair.padded_tokens for _, pair in tokenized]
        for members in token_budget_batches(lengths, self._recipe.sketch.max_tokens_per_batch):
            self._sketch([tokenized[member] for member in members], results)
        return pa.Table.from_pylist(results, schema=self._schema)

    def _sketch(self, members: list[tuple[int, TokenizedPair]], results: list[dict[str, Any]]) -> None:
        from congrad_ray.preference.batching import collate_pairs

        pad = self._tokenizer.pad_token_id
        assert isinstance(pad, int)
        batch = collate_pairs([pair for _, pair in members], pad, self._device)
        found = self._sketcher.sketch(batch)
        coefficients = self._coefficients(found.chosen_logps, found.rejected_logps, batch)
        for row, (index, pair) in enumerate(members):
            norm = float(found.norms[row])
            if not norm < float("inf"):  # NaN compares false as well
                results[index][FAILURE] = failure("gradient_not_finite", f"norm of u is {norm}")
                continue
            results[index].update(
                sketch=found.sketches[row].cpu().numpy(),
                norm=norm,
                coefficient=float(coefficients[row]),
                chosen_logps=float(found.chosen_logps[row]),
                rejected_logps=float(found.rejected_logps[row]),
                prompt_tokens=len(pair.prompt_ids),
                chosen_tokens=len(pair.chosen_ids),
                rejected_tokens=len(pair.rejected_ids),
            )

    def _coefficients(self, chosen: torch.Tensor, rejected: torch.Tensor, batch: Any) -> torch.Tensor:
        """c of every pair where policy and reference are the same, as they are when an iteration starts."""
        from congrad_ray.preference.loss import pair_coefficient

        settings = self._recipe.train
        return pair_coefficient(
            chosen,
            rejected,
            chosen,
            rejected,
            settings.beta,
            settings.length_penalty,
            batch.chosen_tokens,
            batch.rejected_tokens,
        )


def run(context: Context) -> Outcome:
    """Sketches the pairs that have no sketch yet."""
    from ray.data import ActorPoolStrategy

    recipe, pool = context.recipe, context.profile.sketchers
    source = policy(recipe, context.run, context.iteration)
    # A model that is not there, or cannot chat, should be told before actors start.
    tokenizer = source.load_tokenizer()
    pairs = context.input("pairs")
    schema = pq.read_schema(pairs.parts()[0], filesystem=pairs.filesystem)
    if schema.field("prompt").type == MESSAGES:
        chat_prompt_ids(tokenizer, [{"role": "user", "content": "?"}])
    dataset, missing = read_missing(pairs, context.output, "pair_id")
    if missing:
        sketched = dataset.repartition(target_num_rows_per_block=_PAIRS_PER_TASK).map_batches(
            SketchReplica,
            fn_constructor_args=(
                source,
                recipe,
                context.profile.device,
                context.profile.threads or max(1, int(pool.cpus)),
            ),
            batch_format="pyarrow",
            batch_size=_PAIRS_PER_TASK,
            compute=ActorPoolStrategy(min_size=pool.min_actors, max_size=pool.max_actors),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
        )
        write_rows(sketched, context, sketches_schema(recipe.sketch.width), "pair_id", missing, _PAIRS_PER_TASK)
    if not context.output.parts():
        raise RunDirectoryError(f"not one pair could be sketched: {context.output.quarantine_counts()}")
    tokens = context.output.read_table(["prompt_tokens", "chosen_tokens", "rejected_tokens"]).to_pydict()
    return outcome_of(
        context.output,
        "pair_id",
        {
            "response_tokens": sum(tokens["chosen_tokens"]) + sum(tokens["rejected_tokens"]),
            "prompt_tokens": sum(tokens["prompt_tokens"]),
        },
    )


def _settings(recipe: Recipe, iteration: int) -> Any:
    sketch = recipe.sketch.model_dump(mode="json", exclude={"max_tokens_per_batch"})
    return [recipe.model.model_dump(mode="json"), sketch, recipe.train.beta, recipe.train.length_penalty]


STAGE = Stage(
    name="sketch",
    folder="sketches",
    summary="one forward and one backward per pair, its gradient count-sketched",
    inputs=lambda iteration: [("pairs", iteration), *policy_input(iteration)],
    settings=_settings,
    run=run,
)
