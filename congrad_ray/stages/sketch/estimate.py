"""The estimate of sketching, for plans, and the memory that a micro-batch takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.estimate import Change, Estimate, Planned, Replicas, with_changed
from congrad_ray.planning.flops import forward_flops
from congrad_ray.planning.memory import BYTES, Memory, process_bytes, weight_bytes
from congrad_ray.planning.storage import number_bytes, table_bytes
from congrad_ray.planning.volume import Lengths, Volume, pairs_of
from congrad_ray.rundir.directory import Manifest, parquet_bytes
from congrad_ray.stages.sketch.schema import PAIRS_PER_PART, PART_BYTES, sketch_bytes, sketches_schema

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from congrad_ray.modeling.shape import ModelShape
    from congrad_ray.stages.sketch.countsketch import FoldRule


def schema_of(recipe: Recipe) -> pa.Schema:
    """The table's schema with the recipe's settings; the exact method stores a number for each language."""
    width = len(recipe.prompts.languages) if recipe.sketch.method == "exact" else recipe.sketch.width
    return sketches_schema(width, recipe.sketch.stored_dtype)


def _volume(planned: Planned, iteration: int) -> Volume:
    pairs, lengths = pairs_of(planned.recipe, planned.lengths), planned.lengths
    return Volume(
        pairs,
        2 * pairs,
        trained=pairs * (lengths.prompt + 2 * lengths.paired_response),
        completions=2 * pairs * lengths.paired_response,
    )


def sketch_flops(volume: Volume, shape: ModelShape, recipe: Recipe, lengths: Lengths) -> float:
    """A forward and a backward to the inputs alone, as dear as the forward, and the products of folded sides.

    Attention's backward costs twice its forward (it has two operands) and runs over two rows a pair. The output
    embedding takes one product each way. Checkpointing adds a forward, the exact method a second pass.
    """
    from congrad_ray.stages.sketch.countsketch import FoldRule

    settings = recipe.sketch
    exact = settings.method == "exact"
    fold = FoldRule(1 if exact else None if settings.fold == "auto" else settings.fold, settings.min_side)
    row = lengths.prompt + lengths.paired_response
    attention = forward_flops(shape, volume.requests * row, row / 2, 0) - forward_flops(
        shape, volume.requests * row, 0, 0
    )
    passes = 3 if settings.gradient_checkpointing else 2
    products = sum(-(-out // fold(out)) * -(-into // fold(into)) for out, into in _sketched_layers(shape, recipe))
    once = (
        forward_flops(shape, volume.trained, 0, 0) * passes
        + attention * (passes + 1)
        + 4.0 * shape.head * volume.completions
        + 2.0 * products * volume.trained
    )
    return once * (2 if exact else 1)


def sketch_memory(
    shape: ModelShape, recipe: Recipe, profile: Profile, assumptions: Assumptions, available: float | None
) -> Memory:
    """A sketch replica with micro-batches as large as fit `available`, one pair at least."""
    settings, longest = recipe.sketch, 2 * recipe.model.max_length
    devices, budget = max(1, int(profile.sketchers.gpus)), settings.batch_tokens(profile.device)
    wanted = max(1, budget // longest)
    fixed = {
        "weights": _weight_bytes(shape, recipe),
        "sketch_tables": 0.0,  # the map works places out; see countsketch.py
        "sketches": 8.0 * wanted * settings.width,  # float32, with what turns over the end
        "process": process_bytes(profile, assumptions, devices),
    }
    if settings.method == "exact":
        entries = sum(out * into for out, into in _sketched_layers(shape, recipe))
        fixed["language_gradients"] = 4.0 * entries * len(recipe.prompts.languages)

    def memory(pairs: int, note: str = "") -> Memory:
        working = sketch_working_bytes(shape, recipe, pairs) * (1 + assumptions.overhead(profile.device))
        parts = {**fixed, "activations": working}
        return Memory(parts, sum(parts.values()), note)

    found = memory(wanted)
    if available is None or found.peak <= available or wanted == 1:
        return found
    one = memory(1)
    if one.peak > available:
        return one
    fitting = max(1, int((available - one.peak) // one.parts["activations"]) + 1)
    note = f"micro-batches of {fitting * longest:,} tokens fit, not sketch.max_tokens_per_batch"
    return memory(fitting, f"{note} = {budget:,}")


def _sketched_layers(shape: ModelShape, recipe: Recipe) -> list[tuple[int, int]]:
    """(out, in) of the layers whose gradients are sketched; an adapter is taken to be on every linear layer."""
    lora = recipe.sketched_adapter
    if lora is None:
        return list(shape.linear)
    return [side for out, into in shape.linear for side in ((lora.r, into), (out, lora.r))]


def _weight_bytes(shape: ModelShape, recipe: Recipe) -> float:
    """Of a replica's model, with its adapter where that is sketched."""
    lora = recipe.sketched_adapter
    adapter = sum(out * into for out, into in _sketched_layers(shape, recipe)) if lora else 0
    return weight_bytes(shape, recipe, lora) + adapter * BYTES[recipe.model.dtype]


def sketch_working_bytes(shape: ModelShape, recipe: Recipe, pairs: int) -> int:
    """Bytes beside the weights, at their peak, for a micro-batch of pairs with rows of model.max_length."""
    from congrad_ray.modeling.adapters import with_adapter
    from congrad_ray.modeling.loss import loss_settings
    from congrad_ray.modeling.rehearsal import extrapolated, peak_bytes
    from congrad_ray.modeling.shape import meta_model
    from congrad_ray.modeling.tokenization import TokenizedPair
    from congrad_ray.stages.sketch.capture import GradientCapture
    from congrad_ray.stages.sketch.countsketch import CountSketch
    from congrad_ray.stages.sketch.sketcher import sketch_pairs

    settings, length = recipe.sketch, recipe.model.max_length
    fold = _fold_rule(recipe)

    def peak(config: PretrainedConfig) -> int:
        model = meta_model(config, recipe.model.dtype)
        if recipe.sketched_adapter is not None:
            with_adapter(model, recipe.sketched_adapter, seed=0)
        sketch = CountSketch(settings.width, settings.seed, fold)
        loss = loss_settings(recipe.train)
        with GradientCapture(model, settings.layers, loss, settings.gradient_checkpointing) as capture:
            ids = [0] * (length - 1)
            batch = capture.layout([TokenizedPair([0], ids, ids)] * pairs)
            return peak_bytes(model, lambda: sketch_pairs(capture, sketch, batch))

    return extrapolated(shape, peak)


def _fold_rule(recipe: Recipe) -> FoldRule:
    from congrad_ray.stages.sketch.countsketch import FoldRule

    settings = recipe.sketch
    return FoldRule(None if settings.fold == "auto" else settings.fold, settings.min_side)


def _stored(planned: Planned, volume: Volume) -> float:
    recipe, lengths = planned.recipe, planned.lengths
    schema = schema_of(recipe)
    dtype = recipe.sketch.stored_dtype
    stored = schema.field("sketch").type.byte_width
    of_row = number_bytes(schema) - stored + stored_sketch_bytes(stored // np.dtype(dtype).itemsize, dtype)
    text = planned.assumptions.bytes_per_token * (lengths.prompt + 2 * lengths.paired_response)
    of_part = max(1, min(PAIRS_PER_PART, PART_BYTES[planned.profile.device] // text))
    return table_bytes(planned, "sketch", schema, volume.rows, of_row, math.ceil(volume.rows / of_part))


@cache
def stored_sketch_bytes(width: int, dtype: str) -> float:
    """Bytes of a sketch on disk, from a few that are drawn from a normal distribution and stored as a part is.

    Many gradient entries add up in each number, which makes them nearly normal for a model of real size. Those of
    a tiny one have longer tails, and zstd finds more in them.
    """
    import torch

    from congrad_ray.stages.sketch.storage import to_storage

    rows = 16
    drawn = torch.randn((rows, width), generator=torch.Generator().manual_seed(0))
    stored, _ = to_storage(drawn, dtype)
    field = sketches_schema(width, dtype).field("sketch")
    table = pa.table([pa.array(sketch_bytes(stored), field.type)], schema=pa.schema([field]))
    return len(parquet_bytes(table)) / rows


def _measured(recipe: Recipe, manifest: Manifest, finished: Mapping[str, Manifest]) -> dict[str, float]:
    if not manifest.rows:
        return {}
    return {
        "prompt": manifest.counters["prompt_tokens"] / manifest.rows,
        "paired_response": manifest.counters["response_tokens"] / (2 * manifest.rows),
    }


def _changes(recipe: Recipe, profile: Profile) -> Iterator[Change]:
    texts = []
    if not recipe.sketch.gradient_checkpointing:
        recipe = with_changed(recipe, "sketch", gradient_checkpointing=True)
        texts.append("--set sketch.gradient_checkpointing=true")
        yield Change(recipe, profile, texts[0])
    if profile.device == "cuda":
        for gpus in (2.0, 4.0, 8.0):
            if gpus > profile.sketchers.gpus:
                profile = with_changed(profile, "sketchers", gpus=gpus)
                text = " and ".join([*texts, f"sketchers.gpus: {gpus:g} in the profile"])
                yield Change(recipe, profile, text)


ESTIMATE = Estimate(
    volume=_volume,
    stored=_stored,
    measured=_measured,
    replicas=Replicas(
        model=lambda shapes: shapes.policy,
        memory=lambda planned, available: sketch_memory(
            planned.shapes.policy, planned.recipe, planned.profile, planned.assumptions, available
        ),
        flops=lambda planned, volume: (
            sketch_flops(volume, planned.shapes.policy, planned.recipe, planned.lengths),
            0.0,
        ),
        mfu=lambda assumptions: (assumptions.backward_mfu, 1.0),
        start_s=lambda assumptions: assumptions.replica_start_s,
        changes=_changes,
    ),
)
