"""Floating-point operations of every stage, and the seconds they take at a stated share of the peak."""

from __future__ import annotations

from congrad_ray.config.recipe import Recipe
from congrad_ray.modeling.shape import ModelShape
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.tokens import Lengths, StageCount
from congrad_ray.stages.sketch.countsketch import FoldRule


def forward_flops(shape: ModelShape, tokens: float, context: float, predicted: float) -> float:
    """A forward pass over `tokens`, each attending to `context` others on average, of which `predicted` go
    through the output embedding.

    2 per parameter and token, and 4 * layers * heads * head size per token and token attended to: the products
    with keys and with values (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Sliding windows are not taken
    off, and all experts of a mixture are counted.
    """
    attention = 4.0 * shape.layers * shape.attention_heads * shape.head_size * context
    return tokens * (2.0 * shape.body + attention) + predicted * 2.0 * shape.head


def stage_flops(
    count: StageCount, shape: ModelShape, recipe: Recipe, lengths: Lengths, assumptions: Assumptions
) -> tuple[float, float]:
    """FLOPs of a stage: those on prompts or in forward and backward, and those on generated tokens."""
    if count.stage == "sketch":
        return _sketch_flops(count, shape, recipe, lengths), 0.0
    if count.stage == "train":
        return _train_flops(count, shape, recipe, lengths, assumptions), 0.0
    if not count.requests:
        return 0.0, 0.0
    read, written = count.prefill / count.requests, count.decode / count.requests
    # Causal: a prompt's token sees half of the prompt on average. Only the last one is predicted from.
    prefill = forward_flops(shape, count.prefill, read / 2, count.requests)
    return prefill, forward_flops(shape, count.decode, read + written / 2, count.decode)


def _sketch_flops(count: StageCount, shape: ModelShape, recipe: Recipe, lengths: Lengths) -> float:
    """A forward and a backward to the inputs alone, as dear as the forward, and the products of folded sides.

    Attention's backward costs twice its forward (it has two operands) and runs over two rows a pair. The output
    embedding takes one product each way. Checkpointing adds a forward, the exact method a second pass.
    """
    settings = recipe.sketch
    exact = settings.method == "exact"
    fold = FoldRule(1 if exact else None if settings.fold == "auto" else settings.fold, settings.min_side)
    row = lengths.prompt + lengths.paired_response
    attention = forward_flops(shape, count.requests * row, row / 2, 0) - forward_flops(
        shape, count.requests * row, 0, 0
    )
    passes = 3 if settings.gradient_checkpointing else 2
    products = sum(-(-out // fold(out)) * -(-into // fold(into)) for out, into in shape.linear)
    once = (
        forward_flops(shape, count.trained, 0, 0) * passes
        + attention * (passes + 1)
        + 4.0 * shape.head * count.completions
        + 2.0 * products * count.trained
    )
    return once * (2 if exact else 1)


def _train_flops(
    count: StageCount, shape: ModelShape, recipe: Recipe, lengths: Lengths, assumptions: Assumptions
) -> float:
    """Three times the forward (Kaplan et al. 2020: 6 per parameter and token), four with checkpointing.

    The logits are always computed a second time in the backward (`modeling.logprobs`).
    """
    row = lengths.prompt + lengths.paired_response
    tokens = count.trained * (1 + assumptions.training_padding)
    passes = 4 if recipe.train.gradient_checkpointing else 3
    return forward_flops(shape, tokens, row / 2, 0) * passes + 8.0 * shape.head * count.completions


def seconds(
    stage: str, flops: tuple[float, float], peak_flops: float, replicas: int, assumptions: Assumptions
) -> float:
    """Seconds of a stage on `replicas`, each of `peak_flops` FLOP/s, its start included."""
    if stage in ("sketch", "train"):
        work, start = flops[0] / assumptions.backward_mfu, assumptions.replica_start_s
    else:
        work, start = (
            flops[0] / assumptions.prefill_mfu + flops[1] / assumptions.decode_mfu,
            assumptions.engine_start_s,
        )
    return start + work / (peak_flops * replicas)
