"""The exact gradient of one pair by plain autograd: slow, large and easy to trust."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from congrad_ray.gradient.layers import target_layers, weight_as_out_in
from congrad_ray.preference.batching import PairBatch
from congrad_ray.preference.logprobs import completion_logprobs


def pair_gradient(model: PreTrainedModel, batch: PairBatch, layers: str | None = None) -> dict[str, Tensor]:
    """u = grad log p(chosen) - grad log p(rejected) of the one pair in `batch`.

    Returns {layer name: (out, in) float32} over the layers that `PairGradientSketcher` targets, and leaves
    the model's gradients and flags alone. It holds as much memory as the targeted weights. Put the model in
    eval mode first if it has dropout. Raises ValueError unless `batch` has one pair, and `UnsupportedLayers`
    as `target_layers` does.
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
            chosen, rejected = completion_logprobs(model, batch)
            gradients = torch.autograd.grad(chosen - rejected, weights)
    finally:
        for weight, flag in zip(weights, required, strict=True):
            weight.requires_grad_(flag)
    return {
        name: weight_as_out_in(layer, gradient).float()
        for (name, layer), gradient in zip(targets.items(), gradients, strict=True)
    }
