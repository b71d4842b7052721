"""The model replicas of the sketch stage: actors that turn rows of pairs into what is known of their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa

from congrad_ray.config.recipe import Recipe
from congrad_ray.data.preferences import tokenize_arguments
from congrad_ray.data.tables import FAILURE, FAILURE_FIELD, Message, failure
from congrad_ray.modeling.source import ModelSource
from congrad_ray.modeling.tokenization import (
    MissingChatTemplate,
    PairTooLong,
    TokenizedPair,
    tokenize_pair,
)
from congrad_ray.rundir.directory import Folder
from congrad_ray.rundir.ids import Ids
from congrad_ray.runtime.attempts import attempt, killed_worker
from congrad_ray.runtime.notices import Notify
from congrad_ray.stages.sketch.schema import sketch_bytes, sketches_schema

if TYPE_CHECKING:
    import torch

    from congrad_ray.modeling.packing import PairTokens
    from congrad_ray.stages.sketch.countsketch import CountSketch
    from congrad_ray.stages.sketch.exact import LayerVectors

LANGUAGE_GRADIENTS = "language_gradients.safetensors"


@dataclass(frozen=True)
class MicroBatch:
    """Pairs that go through the model together, their rows in the table they came in, and their layout."""

    rows: list[int]
    pairs: list[TokenizedPair]
    tokens: PairTokens


@dataclass(frozen=True)
class ReplicaSpec:
    """What every replica of a stage is made of: the model, the recipe, and where it computes."""

    source: ModelSource
    recipe: Recipe
    device: str = "cpu"
    devices: int = 1
    """Over how many devices of its process the model's layers are spread."""
    threads: int = 1
    """Of torch, on a CPU."""


class PairRow(TypedDict):
    """What is read of a row of the pairs table, or of PREFERENCES, whose texts may be messages as JSON."""

    pair_id: str
    language: str
    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    chosen_score: NotRequired[float]
    rejected_score: NotRequired[float]
    chat: NotRequired[bool]
    tools: NotRequired[str | None]
    chat_template_kwargs: NotRequired[str | None]


def _pair_rows(batch: pa.Table) -> list[PairRow]:
    rows: list[PairRow] = batch.select(
        [name for name in batch.column_names if name in PairRow.__annotations__]
    ).to_pylist()
    return rows


class Replica:
    """A model replica in an actor: reads rows of pairs, reports those it cannot use, forms micro-batches."""

    def __init__(self, spec: ReplicaSpec, notify: Notify | None = None) -> None:
        source, device = spec.source, spec.device
        self._notify = notify or Notify()
        self._notify.forward_warnings()
        self._notify(f"loading {source.name} on each {device} replica")
        import torch

        from congrad_ray.modeling.adapters import model_to_train
        from congrad_ray.modeling.loss import loss_settings
        from congrad_ray.stages.sketch.capture import GradientCapture

        if device == "cpu":
            torch.set_num_threads(spec.threads)
        self.recipe = spec.recipe
        settings = self.recipe.sketch
        self._tokenizer = source.load_tokenizer()
        pad = self._tokenizer.pad_token_id
        assert isinstance(pad, int)
        # With an adapter, the one that training starts from: its gradients are what training would follow.
        model: Any = (
            model_to_train(source, self.recipe.train, device, spec.devices)
            if self.recipe.sketched_adapter
            else source.load_model(device, spec.devices)
        )
        self.capture = GradientCapture(
            model,
            settings.layers,
            loss_settings(self.recipe.train),
            settings.gradient_checkpointing,
            pad,
        )
        if self.capture.why_not_shared is not None:
            self._notify(f"each prompt is computed twice, once for each response: {self.capture.why_not_shared}")
        self.max_tokens = settings.batch_tokens(device)

    def micro_batches(self, rows: Sequence[PairRow], failures: dict[int, dict[str, str]]) -> Iterator[MicroBatch]:
        """The usable rows by length, within the token budget; the others are entered in `failures`."""
        from congrad_ray.modeling.batching import token_budget_batches

        usable: list[tuple[int, TokenizedPair]] = []
        for index, row in enumerate(rows):
            try:
                pair = tokenize_pair(
                    self._tokenizer, max_length=self.recipe.model.max_length, **tokenize_arguments(row)
                )
            except MissingChatTemplate:
                raise
            except ValueError as error:
                reason = "pair_too_long" if isinstance(error, PairTooLong) else "cannot_tokenize"
                failures[index] = failure(reason, error)
                continue
            usable.append((index, pair))
        for members in token_budget_batches([pair.padded_tokens for _, pair in usable], self.max_tokens):
            pairs = [usable[member][1] for member in members]
            yield MicroBatch([usable[member][0] for member in members], pairs, self.capture.layout(pairs))

    def weights(self, rows: Sequence[PairRow]) -> torch.Tensor:
        """Factors on the pairs' losses, and so on their c: (rows,) float32 on the CPU."""
        import torch

        from congrad_ray.modeling.loss import margin_weights

        if not self.recipe.train.margin_weighting:
            return torch.ones(len(rows))
        chosen = torch.tensor([row["chosen_score"] for row in rows])
        return margin_weights(chosen, torch.tensor([row["rejected_score"] for row in rows]))


@dataclass(frozen=True)
class Found:
    """What was found for the B pairs of a micro-batch, as NumPy arrays."""

    stored: np.ndarray[Any, Any]  # (B, width)
    scales: np.ndarray[Any, Any]  # (B,)
    norms: np.ndarray[Any, Any]  # (B,)
    logps: np.ndarray[Any, Any]  # (2B,), chosen first
    coefficients: np.ndarray[Any, Any]  # (B,), before the pairs' weights
    audit_exact: np.ndarray[Any, Any] | None = None  # (B,)
    audit_sketched: np.ndarray[Any, Any] | None = None  # (B,)


class SketchReplica(Replica):
    """Turns rows of pairs into rows of the sketches table.

    Micro-batches with a pair of `audited` are checked against exact gradients. With `exact`, the folder that holds
    the languages' gradients, a "sketch" is the coordinates of u in an orthonormal basis of their span. With
    `attempts`, the actor of `runtime.attempts`, pairs that repeatedly kill their replica are quarantined.
    `write` takes the rows where they are computed, and what it returns is returned in their place.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        *,
        audited: Ids | None = None,
        exact: Folder | None = None,
        attempts: Any = None,
        write: Callable[[pa.Table], pa.Table] = lambda rows: rows,
        notify: Notify | None = None,
    ) -> None:
        super().__init__(spec, notify)
        self._write = write
        self._audited = audited
        self._attempts = attempts
        settings = self.recipe.sketch
        if exact is None:
            self._sketch = _count_sketch(self.recipe, list(self.capture.layers))
            width = settings.width
            self._limit_memory()
            self._notify("sketching")
        else:
            self._vectors, self._basis = _load_language_gradients(exact, spec.device)
            width = self._basis.shape[1]
        self._exact = exact is not None
        schema = sketches_schema(width, settings.stored_dtype)
        self._schema = pa.schema([field.with_nullable(True) for field in schema] + [FAILURE_FIELD])

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = _pair_rows(batch)
        results: list[dict[str, Any]] = [{"pair_id": row["pair_id"], "language": row["language"]} for row in rows]

        def work(places: list[int]) -> None:
            failures: dict[int, dict[str, str]] = {}
            for members in self.micro_batches([rows[place] for place in places], failures):
                self._work(rows, results, replace(members, rows=[places[row] for row in members.rows]))
            for row, reason in failures.items():
                results[places[row]][FAILURE] = reason

        if self._attempts is None:
            work(list(range(len(rows))))
        else:
            for place in attempt(self._attempts, batch["pair_id"].to_pylist(), work):
                results[place][FAILURE] = killed_worker()
        self._notify.computed(0, last=True)
        return self._write(pa.Table.from_pylist(results, schema=self._schema))

    def _work(self, rows: Sequence[PairRow], results: list[dict[str, Any]], members: MicroBatch) -> None:
        """Enters what is found for a micro-batch, in halves where the device has not the memory for the whole."""
        from congrad_ray.stages.sketch.memory import is_out_of_memory

        ids = [rows[row]["pair_id"] for row in members.rows]
        audited = self._audited is not None and bool(self._audited.contains(ids).any())
        try:
            found = self._project(members.tokens) if self._exact else self._sketched(members.tokens, audited)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            found, said = None, str(error)
        if found is not None:
            self._enter(rows, results, members, found)
            self._notify.computed(len(members.pairs))
            return
        # Outside of the except clause: the error is gone, and with it the tensors that its frames held.
        tokens = sum(pair.padded_tokens for pair in members.pairs)
        if len(members.pairs) == 1:
            results[members.rows[0]][FAILURE] = failure("out_of_memory", f"a pair of {tokens} tokens: {said}")
            self._notify.computed(1)
            return
        self.max_tokens = max(1, tokens // 2)
        self._notify(
            f"a micro-batch of {tokens} tokens did not fit into memory; the limit is now {self.max_tokens} tokens"
        )
        middle = len(members.pairs) // 2
        for part in (slice(middle), slice(middle, None)):
            pairs = members.pairs[part]
            self._work(rows, results, MicroBatch(members.rows[part], pairs, self.capture.layout(pairs)))

    def _enter(
        self,
        rows: Sequence[PairRow],
        results: list[dict[str, Any]],
        members: MicroBatch,
        found: Found,
    ) -> None:
        tokens = members.tokens
        coefficients = found.coefficients * self.weights([rows[row] for row in members.rows]).numpy()
        sketches = sketch_bytes(found.stored)
        for place, (row, pair) in enumerate(zip(members.rows, members.pairs, strict=True)):
            norm = float(found.norms[place])
            if not math.isfinite(norm):
                results[row][FAILURE] = failure("gradient_not_finite", f"norm of u is {norm}")
                continue
            results[row].update(
                sketch=sketches[place],
                sketch_scale=float(found.scales[place]),
                norm=norm,
                coefficient=float(coefficients[place]),
                chosen_logps=float(found.logps[place]),
                rejected_logps=float(found.logps[tokens.pairs + place]),
                prompt_tokens=len(pair.prompt_ids),
                chosen_tokens=len(pair.chosen_ids),
                rejected_tokens=len(pair.rejected_ids),
                positions=tokens.starts[place + 1] - tokens.starts[place],
                attention_padding=tokens.attention_padding[place],
                audit_exact=_finite(found.audit_exact, place),
                audit_sketched=_finite(found.audit_sketched, place),
            )

    def _sketched(self, tokens: PairTokens, audited: bool) -> Found:
        from congrad_ray.stages.sketch.audit import cosines_with_others
        from congrad_ray.stages.sketch.sketcher import audited_sketches, sketch_pairs
        from congrad_ray.stages.sketch.storage import to_storage

        arguments = (self.capture, self._sketch, tokens, self._compute_dtype())
        gram: torch.Tensor | None = None
        if audited and tokens.pairs > 1:
            result, gram = audited_sketches(*arguments)
        else:
            result = sketch_pairs(*arguments)
        stored, scales = to_storage(result.sketches, self.recipe.sketch.dtype)
        found = {
            "stored": stored,
            "scales": scales,
            "norms": result.norms.cpu().numpy(),
            "logps": np.concatenate([result.chosen_logps.cpu().numpy(), result.rejected_logps.cpu().numpy()]),
            "coefficients": result.coefficients.cpu().numpy(),
        }
        if gram is not None:
            numbers = stored.astype(np.float64) * scales[:, None]
            found["audit_exact"] = cosines_with_others(gram.cpu().numpy())
            found["audit_sketched"] = cosines_with_others(numbers @ numbers.T)
        return Found(**found)

    def _project(self, tokens: PairTokens) -> Found:
        from congrad_ray.stages.sketch.exact import dots_and_norms

        dots, norms, captured = dots_and_norms(self._vectors, self.capture, tokens)
        coordinates = (dots.cpu().numpy() @ self._basis).astype(np.float32)
        ones = np.ones(len(coordinates), np.float32)
        logps, coefficients = captured.logps.cpu().numpy(), captured.coefficients.cpu().numpy()
        return Found(coordinates, ones, norms.cpu().numpy(), logps, coefficients)

    def _compute_dtype(self) -> torch.dtype | None:
        import torch

        name = self.recipe.sketch.compute_dtype
        return None if name is None else getattr(torch, name)

    def _limit_memory(self) -> None:
        from congrad_ray.stages.sketch.memory import fitting_token_budget
        from congrad_ray.stages.sketch.sketcher import sketch_pairs

        length = self.recipe.model.max_length
        if self._surely_fits(length):
            return
        self._notify(f"measuring the memory that a pair of up to model.max_length = {length} tokens takes")

        def work(tokens: PairTokens) -> object:
            return sketch_pairs(self.capture, self._sketch, tokens, self._compute_dtype())

        fitting = fitting_token_budget(self.capture, work, self.max_tokens, length)
        if fitting < self.max_tokens:
            self._notify(
                f"micro-batches of sketch.max_tokens_per_batch = {self.max_tokens} tokens do not fit into memory; "
                f"{fitting} tokens are used"
            )
            self.max_tokens = fitting

    def _surely_fits(self, length: int) -> bool:
        """On a CPU, where trying takes a minute: whether twice what a plan expects of a micro-batch is free."""
        from congrad_ray.modeling.shape import shape_of
        from congrad_ray.stages.sketch.estimate import sketch_working_bytes
        from congrad_ray.stages.sketch.memory import free_memory

        model = self.capture.model
        if model.device.type != "cpu":
            return False
        pairs = max(1, self.max_tokens // (2 * length))
        try:
            shape = shape_of(self.recipe.model.name, model.config, self.recipe.model)
            expected = sketch_working_bytes(shape, self.recipe, pairs)
        except Exception:  # a model that cannot be run without numbers: it is tried
            return False
        return 2 * expected < free_memory(model.device)


def _finite(values: np.ndarray[Any, Any] | None, place: int) -> float | None:
    """The value; None where there is none, or another pair of the micro-batch made it infinite or NaN."""
    value = float("nan") if values is None else float(values[place])
    return value if math.isfinite(value) else None


class SummingReplica(Replica):
    """Adds up the gradients c * u of the pairs it is given, by language."""

    def __init__(self, spec: ReplicaSpec, languages: list[str], notify: Notify | None = None) -> None:
        super().__init__(spec, notify)
        from congrad_ray.stages.sketch.memory import free_memory

        entries = sum(layer.get_parameter("weight").numel() for layer in self.capture.layers.values())
        needed, free = 4 * entries * len(languages), free_memory(self.capture.model.device)
        if needed > free:
            raise ValueError(
                f"sketch.method: exact needs {needed / 2**30:.1f} GiB for the gradients of {len(languages)} "
                f"languages, but {free / 2**30:.1f} GiB are free; use sketch.method: count_sketch or fewer "
                "sketch.layers"
            )
        self._languages = languages
        self._sums: LayerVectors = {}
        self._counts = [0] * len(languages)

    def add(self, batch: pa.Table) -> int:
        """Adds a table of pairs; returns how many rows it has."""
        import torch

        from congrad_ray.stages.sketch.exact import add_weighted_sums_

        rows = _pair_rows(batch)
        for members in self.micro_batches(rows, {}):
            of_language = torch.tensor([self._languages.index(rows[row]["language"]) for row in members.rows])
            weights = torch.zeros((len(self._languages), members.tokens.pairs))
            of_pairs = self.weights([rows[row] for row in members.rows])
            weights[of_language, torch.arange(members.tokens.pairs)] = of_pairs
            add_weighted_sums_(self._sums, weights, self.capture, members.tokens)
            for language in of_language.tolist():
                self._counts[language] += 1
        return len(rows)

    def sums(self) -> tuple[LayerVectors, list[int]]:
        """Sums by layer, (languages, out, in) on the CPU, and how many pairs each language has."""
        return {name: values.cpu() for name, values in self._sums.items()}, self._counts


def _count_sketch(recipe: Recipe, layers: list[str]) -> CountSketch:
    """The recipe's map from gradients over these layers to sketches."""
    from congrad_ray.stages.sketch.countsketch import CountSketch, FoldRule, layer_groups

    settings = recipe.sketch
    fold = FoldRule(None if settings.fold == "auto" else settings.fold, settings.min_side)
    groups = layer_groups(layers, settings.groups)
    return CountSketch(settings.width, settings.seed, fold, settings.groups, groups)


def _load_language_gradients(folder: Folder, device: str) -> tuple[LayerVectors, np.ndarray[Any, Any]]:
    """The languages' gradients, and the matrix (L, L) from inner products with them to coordinates in their span.

    The coordinates are those of the orthonormal basis V / sqrt(lambda) of the eigenvectors of the Gram matrix;
    directions in which the gradients do not reach have coordinate 0.
    """
    from safetensors.torch import load

    vectors = {name: values.to(device) for name, values in load(folder.read_bytes(LANGUAGE_GRADIENTS)).items()}
    flat = [values.double().flatten(1) for values in vectors.values()]
    gram = sum(values @ values.T for values in flat)
    eigenvalues, eigenvectors = np.linalg.eigh(gram.cpu().numpy())  # type: ignore[union-attr]
    reached = eigenvalues > 1e-12 * eigenvalues.max()
    return vectors, eigenvectors * np.where(reached, 1.0 / np.sqrt(np.where(reached, eigenvalues, 1.0)), 0.0)
