"""Which pairs each optimiser step sees, which worker computes them, and at which learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from congrad_ray.config.recipe import Train


class TrainingError(ValueError):
    """Training cannot start or continue; the text names the numbers and the way out."""


@dataclass(frozen=True)
class Schedule:
    """The order of a whole training run over `pairs` pairs, in optimiser steps counted from 0.

    An epoch is a permutation of all pairs that depends on the seed and the epoch alone, cut into
    ceil(pairs / batch_size) batches whose sizes differ by one at most. So no batch exceeds the batch size, no pair
    is dropped, no step is taken on a few left-over pairs, and fewer pairs than one batch make one smaller batch.
    Neither the number of workers nor where a run was interrupted changes what a step sees.
    """

    pairs: int
    batch_size: int
    micro_batch_size: int
    workers: int
    epochs: int
    seed: int
    max_steps: int | None = None

    @property
    def accumulation(self) -> int:
        """Forward and backward passes of each worker in one optimiser step."""
        return math.ceil(self._largest_batch / (self.micro_batch_size * self.workers))

    @property
    def pairs_per_pass(self) -> int:
        """Pairs of the largest pass over all workers; of more workers the others have nothing to do."""
        return math.ceil(self._largest_batch / self.accumulation)

    @property
    def _largest_batch(self) -> int:
        return math.ceil(self.pairs / self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.pairs / self.batch_size)

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch if self.max_steps is None else self.max_steps

    def batch(self, step: int) -> list[int]:
        """The indexes of the pairs of an optimiser step, in the epoch's order."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.pairs)
        part: list[int] = np.array_split(order, self.steps_per_epoch)[position].tolist()
        return part

    def epoch_after(self, step: int) -> float:
        """Epochs done after an optimiser step, as TRL logs them."""
        return (step + 1) / self.steps_per_epoch


def make_schedule(train: Train, pairs: int, workers: int) -> Schedule:
    """The schedule of a run. Raises TrainingError for no pairs."""
    if pairs < 1:
        raise TrainingError(
            "no pairs to train on: the selection is empty. Look at the counters of the pair, sketch and select "
            "stages (`congrad status`) for where the pairs were lost, or raise select.keep."
        )
    return Schedule(
        pairs,
        train.batch_size,
        train.micro_batch_size,
        workers,
        train.num_train_epochs,
        train.seed,
        train.max_steps,
    )


def micro_batches(batch: list[int], lengths: list[int], accumulation: int, workers: int) -> list[list[list[int]]]:
    """A batch dealt out: [pass][worker] -> the pairs' indexes, at most micro_batch_size of them, perhaps none.

    `lengths` holds a length for every pair of the run; pairs of similar length share a pass, the longest first, so
    that little is padded, workers wait little for each other and a lack of memory shows in the first pass.
    """
    ordered = sorted(batch, key=lambda index: (-lengths[index], index))
    passes = [part.tolist() for part in np.array_split(np.array(ordered, dtype=np.int64), accumulation)]
    return [[part[worker::workers] for worker in range(workers)] for part in passes]


def learning_rate(train: Train, step: int, total_steps: int) -> float:
    """The learning rate of an optimiser step counted from 0.

    Linear warm-up over ceil(warmup_ratio * total_steps) steps, the last of which has the full rate; then constant,
    or decay by a line or half a cosine that would reach 0 at `total_steps`. Unlike in transformers' schedulers the
    first warm-up step has a rate above 0: in runs of a few dozen steps none should be wasted.
    """
    warmup_steps = math.ceil(train.warmup_ratio * total_steps)
    if step < warmup_steps:
        return train.learning_rate * (step + 1) / warmup_steps
    if train.lr_scheduler_type == "constant":
        return train.learning_rate
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    if train.lr_scheduler_type == "linear":
        return train.learning_rate * (1 - progress)
    return train.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
