"""Exact gradients: one pair's by plain autograd, and inner products of many without storing any."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from congrad_ray.modeling.batching import PairBatch
from congrad_ray.modeling.logprobs import completion_logprobs
from congrad_ray.modeling.loss import DPO, ChosenRejected, LossSettings, gradient_seeds
from congrad_ray.modeling.packing import PairTokens
from congrad_ray.stages.sketch.capture import Captured, GradientCapture, pair_segments
from congrad_ray.stages.sketch.layers import target_layers, weight_as_out_in

# Entries of per-pair gradients of one layer alive at a time in `gram_matrix`: 128 MiB.
_ENTRIES = 2**25

LayerVectors = dict[str, Tensor]  # layer name to (vectors, out, in) float32


def pair_gradient(
    model: PreTrainedModel, batch: PairBatch, layers: str | None = None, loss: LossSettings = DPO
) -> dict[str, Tensor]:
    """u of the one pair in `batch` by autograd: for DPO grad log p(chosen) - grad log p(rejected).

    Slow, large and easy to trust. Returns {layer name: (out, in) float32} over the layers that `GradientCapture`
    targets, and leaves the model's gradients and flags alone. It holds as much memory as the targeted weights. Put
    the model in eval mode first if it has dropout. Raises ValueError unless `batch` has one pair, and
    `UnsupportedLayers` as `target_layers` does.
    """
    if batch.pairs != 1:
        raise ValueError(f"the batch has {batch.pairs} pairs; pair_gradient takes one at a time")
    targets = target_layers(model, layers)
    weights = [layer.get_parameter("weight") for layer in targets.values()]
    required = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            logps = completion_logprobs(model, batch)
            both = ChosenRejected(*logps.detach().chunk(2))
            _, seeds = gradient_seeds(both, both, loss, ChosenRejected(batch.chosen_tokens, batch.rejected_tokens))
            gradients = torch.autograd.grad(logps, weights, seeds)
    finally:
        for weight, flag in zip(weights, required, strict=True):
            weight.requires_grad_(flag)
    return {
        name: weight_as_out_in(layer, gradient).float()
        for (name, layer), gradient in zip(targets.items(), gradients, strict=True)
    }


class _Visitor:
    """Keeps a layer's inputs as they are."""

    def keep(self, name: str, inputs: Tensor) -> Tensor:
        return inputs


class GramVisitor(_Visitor):
    """Inner products of the B pairs' u with each other, in `gram`, (B, B) float64.

    A block of rows of one layer's gradients is alive at a time.
    """

    def __init__(self, batch: PairTokens) -> None:
        self.gram = torch.zeros((batch.pairs, batch.pairs), dtype=torch.float64, device=batch.input_ids.device)

    def visit(self, name: str, kept: Tensor, gradients: Tensor, starts: Sequence[int]) -> None:
        rows = max(1, _ENTRIES // (len(self.gram) * kept.shape[1]))
        for d in gradients.float().split(rows, dim=1):
            block = torch.stack([d[part].T @ kept[part].float() for _, part in pair_segments(starts)])
            # Row by row of the weight, summed in float64: one product over millions of entries loses digits.
            products = block.transpose(0, 1) @ block.permute(1, 2, 0)
            self.gram.add_(products.sum(0, dtype=torch.float64).to(self.gram.device))


def gram_matrix(capture: GradientCapture, batch: PairTokens) -> Tensor:
    """What `GramVisitor` finds, by one forward and one backward pass. Raises as `GradientCapture.run` does."""
    visitor = GramVisitor(batch)
    capture.run(batch, visitor)
    return visitor.gram


def add_weighted_sums_(
    sums: LayerVectors, weights: Tensor, capture: GradientCapture, batch: PairTokens
) -> Captured:
    """Adds sum_b weights[l, b] * c_b * u_b to `sums`[layer][l] for every layer and l.

    `weights` is (vectors, B). `sums` is filled with zeros for layers
    that it lacks, so start with an empty dict; it holds as many copies of the targeted weights, in float32, as
    there are vectors.
    """

    class Visitor(_Visitor):
        def visit(self, name: str, kept: Tensor, gradients: Tensor, starts: Sequence[int]) -> None:
            if name not in sums:
                shape = (len(weights), gradients.shape[1], kept.shape[1])
                sums[name] = torch.zeros(shape, dtype=torch.float32, device=kept.device)
            for pair, part in pair_segments(starts):
                for vector, weight in enumerate(weights[:, pair].tolist()):
                    if weight:
                        sums[name][vector].addmm_(gradients[part].float().T, kept[part].float(), alpha=weight)

    return capture.run(batch, Visitor(), times_coefficient=True)


def dots_and_norms(
    vectors: LayerVectors, capture: GradientCapture, batch: PairTokens
) -> tuple[Tensor, Tensor, Captured]:
    """<u_b, vector_l> as (B, vectors) and |u_b| as (B,), both float64, and what else the pass found.

    One layer of one pair's gradient is alive at a time.
    """
    count = len(next(iter(vectors.values())))
    dots = torch.zeros((batch.pairs, count), dtype=torch.float64, device=batch.input_ids.device)
    squared_norms = torch.zeros(batch.pairs, dtype=torch.float64, device=batch.input_ids.device)

    class Visitor(_Visitor):
        def visit(self, name: str, kept: Tensor, gradients: Tensor, starts: Sequence[int]) -> None:
            flat = vectors[name].to(kept.device).flatten(1)
            for pair, part in pair_segments(starts):
                gradient = (gradients[part].float().T @ kept[part].float()).flatten()
                dots[pair] += (flat @ gradient).to(dots.device)
                squared_norms[pair] += (gradient @ gradient).to(dots.device)

    captured = capture.run(batch, Visitor())
    return dots, squared_norms.sqrt(), captured
