"""The model replicas that score held-out pairs: actors that turn pairs into log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from congrad_ray.data.preferences import tokenize_arguments
from congrad_ray.data.tables import FAILURE, FAILURE_FIELD, failure, row_id
from congrad_ray.modeling.source import ModelSource
from congrad_ray.modeling.tokenization import MissingChatTemplate, PairTooLong, TokenizedPair, tokenize_pair
from congrad_ray.runtime.attempts import attempt, killed_worker
from congrad_ray.runtime.notices import Notify
from congrad_ray.stages.benchmark.schema import SCORED

Row = dict[str, Any]


@dataclass(frozen=True)
class ScorerSpec:
    """What every replica is made of, and where it computes."""

    source: ModelSource
    model: str
    """'M_0', 'M_1', ...."""
    device: str = "cpu"
    devices: int = 1
    threads: int = 1
    max_tokens: int = 4096
    """Padded tokens of a micro-batch."""


class Scorer:
    """Turns rows of PREFERENCES into rows of SCORED.

    `attempts`, the actor of `runtime.attempts`: pairs that repeatedly kill their replica are quarantined. `write`
    takes the rows where they are computed, and what it returns is returned in their place.
    """

    def __init__(
        self,
        spec: ScorerSpec,
        attempts: Any = None,
        write: Callable[[pa.Table], pa.Table] = lambda rows: rows,
        notify: Notify | None = None,
    ) -> None:
        import torch

        from congrad_ray.modeling.shared_prompts import why_not_shared

        self._spec, self._attempts, self._write = spec, attempts, write
        self._notify = notify or Notify()
        self._notify.forward_warnings()
        self._notify(f"loading {spec.source.name} on each {spec.device} replica")
        if spec.device == "cpu":
            torch.set_num_threads(spec.threads)
        self._tokenizer = spec.source.load_tokenizer()
        self._model: Any = spec.source.load_model(spec.device, spec.devices)
        self._shares = why_not_shared(self._model) is None
        self._max_tokens = spec.max_tokens

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows: list[Row] = batch.to_pylist()
        results: list[Row] = [
            {
                "score_id": row_id("score", self._spec.model, row["pair_id"]),
                "model": self._spec.model,
                "pair_id": row["pair_id"],
                "language": row["language"],
            }
            for row in rows
        ]

        def work(places: list[int]) -> None:
            self._score(rows, results, places)

        if self._attempts is None:
            work(list(range(len(rows))))
        else:
            for place in attempt(self._attempts, [result["score_id"] for result in results], work):
                results[place][FAILURE] = killed_worker()
        self._notify.computed(0, last=True)
        schema = pa.schema([*(column.with_nullable(True) for column in SCORED), FAILURE_FIELD])
        return self._write(pa.Table.from_pylist(results, schema=schema))

    def _score(self, rows: Sequence[Row], results: list[Row], places: Sequence[int]) -> None:
        from congrad_ray.modeling.batching import token_budget_batches

        usable: list[tuple[int, TokenizedPair]] = []
        max_length = self._spec.source.settings.max_length
        for place in places:
            try:
                pair = tokenize_pair(self._tokenizer, max_length=max_length, **tokenize_arguments(rows[place]))
            except MissingChatTemplate:
                raise
            except ValueError as error:
                reason = "pair_too_long" if isinstance(error, PairTooLong) else "cannot_tokenize"
                results[place][FAILURE] = failure(reason, error)
                continue
            usable.append((place, pair))
        for members in token_budget_batches([pair.padded_tokens for _, pair in usable], self._max_tokens):
            self._enter(results, [usable[member] for member in members])

    def _enter(self, results: list[Row], members: Sequence[tuple[int, TokenizedPair]]) -> None:
        """Enters what is found for a micro-batch, in halves where the device has not the memory for the whole."""
        from congrad_ray.stages.sketch.memory import is_out_of_memory

        try:
            sums = self._sums([pair for _, pair in members])
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            sums, said = None, str(error)
        if sums is None:
            if len(members) == 1:
                place, pair = members[0]
                detail = f"a pair of {pair.padded_tokens} tokens: {said}"
                results[place][FAILURE] = failure("out_of_memory", detail)
                return
            middle = len(members) // 2
            self._enter(results, members[:middle])
            self._enter(results, members[middle:])
            return
        for number, (place, pair) in enumerate(members):
            chosen, rejected = sums[number], sums[len(members) + number]
            if not (math.isfinite(chosen) and math.isfinite(rejected)):
                results[place][FAILURE] = failure("logps_not_finite", f"chosen {chosen}, rejected {rejected}")
                continue
            results[place].update(
                chosen_logps=chosen,
                rejected_logps=rejected,
                prompt_tokens=len(pair.prompt_ids),
                chosen_tokens=len(pair.chosen_ids),
                rejected_tokens=len(pair.rejected_ids),
            )
        self._notify.computed(len(members))

    def _sums(self, pairs: Sequence[TokenizedPair]) -> list[float]:
        """Summed log-probabilities, chosen first."""
        import torch

        from congrad_ray.modeling.packing import shared_prompt_tokens, two_sequence_tokens
        from congrad_ray.modeling.shared_prompts import attention_over, completion_sums

        device = self._model.get_input_embeddings().weight.device
        if self._shares:
            tokens = shared_prompt_tokens(pairs, device)
        else:
            tokens = two_sequence_tokens(pairs, int(self._tokenizer.pad_token_id), device)
        with torch.inference_mode(), attention_over(self._model, tokens) as arguments:
            found: list[float] = completion_sums(self._model, tokens, arguments).tolist()
        return found
