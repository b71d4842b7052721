"""Gradients of pairs with TRAK: per-example gradients of all weights, then one projection of them together.

--projection-dimension is that of an example's whole row. The projector for CPUs makes the normal projection matrix
anew, some columns at a time, for every call; so the gradients of several examples wait for one call. They are
computed one example at a time, without padding: --token-budget has no meaning here. The gradients of all
parameters are computed, those outside the linear layers are then dropped. TRAK divides by the root of the number
of weights, which is undone here. The rows are gradients of log p: u of a pair is row 2n minus row 2n+1. The
weighting of examples by the loss, TRAK's Q, would take another forward pass and is left out.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import numpy as np
import torch
from common import (
    NO_LOSS,
    Example,
    Gradients,
    Measured,
    linear_layers,
    load_model,
    measure,
    parse_arguments,
    read_examples,
    shortest,
    stack,
    write_report,
)
from torch import Tensor, nn
from trak import TRAKer
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import BasicProjector, ProjectionType

# A column of the projection matrix is as long as there are weights; the library's 100 at a time take gigabytes.
COLUMNS = 8
# Whole gradients of this many examples are in memory at once.
EXAMPLES_PER_PROJECTION = 8


class CompletionLogProbability(AbstractModelOutput):
    """The sum of log p over an example's labelled tokens as TRAK's model output."""

    def __init__(self) -> None:
        """Nothing to set up."""

    @staticmethod
    def get_output(
        model: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor], token_ids: Tensor, labels: Tensor
    ) -> Tensor:
        """The output of one example, at all its positions, since `vmap` cannot pick some."""
        arguments = {"input_ids": token_ids[None]}
        logits = torch.func.functional_call(model, (weights, buffers), kwargs=arguments).logits[0, :-1]
        return -nn.functional.cross_entropy(logits, labels[1:], ignore_index=NO_LOSS, reduction="sum")

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor], batch: list[Example]
    ) -> Tensor:
        """Ones, as every example counts the same."""
        return torch.ones(len(batch), 1)


class OneByOne(FunctionalGradientComputer):
    """The library's gradient computer, given one example at a time."""

    def compute_per_sample_grad(self, batch: list[Example]) -> Tensor:
        """One row per example, over the weights of the linear layers."""
        rows = torch.empty(len(batch), self.grad_dim)
        for row, example in zip(rows, batch, strict=True):
            gradients = super().compute_per_sample_grad(stack([example]))
            torch.cat([gradient.flatten() for gradient in gradients.values()], out=row)
        return rows


class TimedProjector(BasicProjector):
    """The library's projector, which also adds up its seconds."""

    seconds = 0.0

    def project(self, grads: Any, model_id: int) -> Tensor:
        """Projects as the library does."""
        start = time.perf_counter()
        projected = super().project(grads, model_id)
        self.seconds += time.perf_counter() - start
        return projected


def main() -> None:
    """Measures one pass over the pairs."""
    arguments = parse_arguments(__doc__, projection_dimension=512)
    examples = read_examples(arguments)
    # What requires a gradient makes the functional gradients keep a second graph, for gradients of gradients.
    model = load_model(arguments.model).requires_grad_(False)
    names = [f"{layer}.weight" for layer in linear_layers(model)]
    weights = sum(model.get_parameter(name).numel() for name in names)
    projector = TimedProjector(
        weights, arguments.projection_dimension, 0, ProjectionType.normal, torch.device("cpu"), block_size=COLUMNS
    )
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model,
            CompletionLogProbability(),
            train_set_size=len(examples),
            save_dir=folder,
            device="cpu",
            gradient_computer=OneByOne,
            projector=projector,
            use_half_precision=False,
            grad_wrt=names,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        traker.gradient_computer.compute_per_sample_grad([shortest(examples)])

        def work() -> Gradients:
            for start in range(0, len(examples), EXAMPLES_PER_PROJECTION):
                batch = examples[start : start + EXAMPLES_PER_PROJECTION]
                traker.featurize(batch, num_samples=len(batch))
            return np.array(traker.saver.current_store["grads"])

        gradients, seconds, before = measure(work)
    gradients *= weights**0.5
    measured = Measured(
        seconds,
        before,
        len(examples),
        sum(len(example.token_ids) for example in examples),
        [
            f"projection took {projector.seconds:.2f} s of the seconds",
            f"{EXAMPLES_PER_PROJECTION} examples in a projection",
        ],
    )

    def project(parts: list[Tensor]) -> Tensor:
        return projector.project(torch.cat([part.flatten() for part in parts])[None], 0)[0]

    write_report(arguments, "traker", examples, gradients, measured, model, project)


if __name__ == "__main__":
    main()
