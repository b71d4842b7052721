"""Gradients of pairs with bergson: one backward pass per batch with hooks, P x P projections of every layer.

Uses bergson's hooks and in-memory collector, with no normaliser. A layer's gradient G becomes L G R^T, where L and
R have P rows of +-1/sqrt(P); the layers follow one another. --projection-dimension is P; 0 keeps whole gradients.
Its loss is the sum of -log p over the labelled tokens, so the rows are negated to be gradients of log p, and u of
a pair is row 2n minus row 2n+1. It computes logits at all positions, prompts included.
"""

from __future__ import annotations

import tempfile

import torch
from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
from common import (
    Example,
    Gradients,
    Measured,
    linear_layers,
    load_model,
    make_batches,
    measure,
    padded_tokens,
    parse_arguments,
    read_examples,
    shortest,
    write_report,
)
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel


def collect(
    model: PreTrainedModel, processor: GradientProcessor, examples: list[Example], config: IndexConfig
) -> tuple[Gradients, list[list[int]]]:
    """The gradients of the loss, one row per example, and the batches they were computed in."""
    lengths = [len(example.token_ids) for example in examples]
    data = Dataset.from_dict(
        {
            "input_ids": [example.token_ids for example in examples],
            "labels": [example.labels for example in examples],
            "length": lengths,
        }
    )
    # The same batches as bergson's own allocate_batches, which refuses an example longer than the budget.
    batches = make_batches(lengths, config.token_batch_size)
    # The base model has no output embedding, so the collector never sees it.
    collector = InMemoryCollector(model=model.base_model, data=data, cfg=config, processor=processor)
    CollectorComputer(model, data, collector=collector, batches=batches, cfg=config).run_with_collector_hooks()
    assert collector.builder is not None
    return collector.builder.grad_buffer, batches


def main() -> None:
    """Measures one pass over the pairs."""
    arguments = parse_arguments(__doc__, projection_dimension=16)
    examples = read_examples(arguments)
    model = load_model(arguments.model)
    # The processor keeps the projection matrices, so the warm-up makes them for the measured pass.
    processor = GradientProcessor(projection_dim=arguments.projection_dimension or None)
    with tempfile.TemporaryDirectory() as folder:
        config = IndexConfig(
            run_path=f"{folder}/run",
            model=str(arguments.model),
            precision="fp32",
            projection_dim=arguments.projection_dimension,
            token_batch_size=arguments.token_budget,
            loss_reduction="sum",
        )
        config.partial_run_path.mkdir()
        _, warm_up, _ = measure(lambda: collect(model, processor, [shortest(examples)], config))
        (gradients, batches), seconds, before = measure(lambda: collect(model, processor, examples, config))
    gradients *= -1

    def project(weights: list[Tensor]) -> Tensor:
        if not arguments.projection_dimension:
            return torch.cat([weight.flatten() for weight in weights])
        matrices = {(name, side): matrix for (name, side, _), matrix in processor._projection_matrices.items()}
        names = [name.removeprefix(f"{model.base_model_prefix}.") for name in linear_layers(model)]
        return torch.cat(
            [
                (matrices[name, "left"] @ weight @ matrices[name, "right"].T).flatten()
                for name, weight in zip(names, weights, strict=True)
            ]
        )

    measured = Measured(
        seconds,
        before,
        len(examples),
        padded_tokens([len(example.token_ids) for example in examples], batches),
        [f"projection matrices and warm-up on one example took {warm_up:.2f} s more", f"{len(batches)} batches"],
    )
    write_report(arguments, "bergson", examples, gradients, measured, model, project)


if __name__ == "__main__":
    main()
