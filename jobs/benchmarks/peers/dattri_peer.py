"""Gradients of pairs with dattri's LoGra: one backward pass per batch, P x P normal projections of every layer.

The attributor's cache step without a Hessian, which is the gradient pass alone. A layer's gradient G becomes
L G R^T, where L and R have P rows of N(0, 1/P); the layers follow one another. --projection-dimension is P, at
most 100: above that the library makes the matrices anew for every batch. It has no batching by length, so the
batches are made here. It multiplies by the number of examples in a batch, for a loss that is their mean. The rows
are gradients of log p: u of a pair is row 2n minus row 2n+1.
"""

from __future__ import annotations

import os
import tempfile

# The library compiles its projection, again for every layer and length; without that it is faster.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

import numpy as np
import torch
from common import (
    Example,
    Gradients,
    Measured,
    linear_layers,
    load_model,
    log_probability,
    make_batches,
    measure,
    padded_tokens,
    parse_arguments,
    read_examples,
    shortest,
    stack,
    write_report,
)
from dattri.algorithm.logra import LoGraAttributor
from dattri.task import AttributionTask
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

Batch = dict[str, Tensor]


def mean_log_probability(model: PreTrainedModel, batch: Batch, _device: str) -> Tensor:
    """The mean over the examples of their summed log p."""
    return log_probability(model, batch["input_ids"], batch["labels"]) / len(batch["input_ids"])


def collect(attributor: LoGraAttributor, examples: list[Example], batches: list[list[int]]) -> Gradients:
    """The gradients, one row per example."""
    stacked = [stack([examples[index] for index in batch]) for batch in batches]
    data = [{"input_ids": ids, "labels": labels} for ids, labels in stacked]
    attributor.cache(DataLoader(data, batch_size=1, collate_fn=lambda batch: batch[0]))  # type: ignore[arg-type]
    gradients = np.empty((len(examples), attributor.total_proj_dim), dtype=np.float32)
    for number, batch in enumerate(batches):
        gradients[batch] = attributor.offload_manager.cached_gradients[number].numpy()
    return gradients


def main() -> None:
    """Measures one pass over the pairs."""
    arguments = parse_arguments(__doc__, projection_dimension=16)
    examples = read_examples(arguments)
    model = load_model(arguments.model)
    layers = linear_layers(model)
    lengths = [len(example.token_ids) for example in examples]
    with tempfile.TemporaryDirectory() as folder:
        attributor = LoGraAttributor(
            AttributionTask(mean_log_probability, model, {}, checkpoints_load_func=lambda model, _: model),
            layer_names=layers,
            hessian="Identity",
            proj_dim=arguments.projection_dimension**2,
            offload="none",
            cache_dir=folder,
        )
        # The first call makes the projection matrices, which the attributor keeps.
        _, warm_up, _ = measure(lambda: collect(attributor, [shortest(examples)], [[0]]))

        def work() -> tuple[Gradients, list[list[int]]]:
            batches = make_batches(lengths, arguments.token_budget)
            return collect(attributor, examples, batches), batches

        (gradients, batches), seconds, before = measure(work)

    def project(weights: list[Tensor]) -> Tensor:
        parts = []
        for compressor, weight in zip(attributor.compressors, weights, strict=True):
            left, right = compressor.sparsifier.sparsifier_comp
            parts.append(left(right(weight, ensemble_id=0).T.contiguous(), ensemble_id=0).T.flatten())
        return torch.cat(parts)

    measured = Measured(
        seconds,
        before,
        len(examples),
        padded_tokens(lengths, batches),
        [f"projection matrices and warm-up on one example took {warm_up:.2f} s more", f"{len(batches)} batches"],
    )
    write_report(arguments, "dattri", examples, gradients, measured, model, project)


if __name__ == "__main__":
    main()
