"""Which pairs each optimiser step sees, which worker computes them, and at which learning rate."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from congrad_ray.config.training import Train
from congrad_ray.stages.select.schema import TOKENS


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
    epochs: int
    seed: int
    max_steps: int | None = None

    @property
    def largest_batch(self) -> int:
        """Pairs of the largest batch; of more workers than that the others have nothing to do."""
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


def make_schedule(train: Train, pairs: int) -> Schedule:
    """The schedule of a run. Raises TrainingError for no pairs."""
    if pairs < 1:
        raise TrainingError(
            "no pairs to train on: the selection is empty. Look at the counters of the pair, sketch and select "
            "stages (`congrad status`) for where the pairs were lost, or raise select.keep."
        )
    return Schedule(pairs, train.batch_size, train.num_train_epochs, train.seed, train.max_steps)


def pair_tokens(selected: pa.Table, shared: bool = True) -> list[int]:
    """Tokens that each pair of selected.parquet is computed with: the prompt's, once, and both responses'.

    Where prompts are not `shared` they are those of two rows as long as the longer. Raises TrainingError.
    """
    missing = [name for name in TOKENS if name not in selected.column_names]
    if missing:
        raise TrainingError(
            f"selected.parquet has no column {', '.join(missing)}: an older version of congrad_ray wrote it. Run "
            "the select stage again with --redo."
        )
    prompt, chosen, rejected = (selected[name] for name in TOKENS)
    if shared:
        found = pc.add(pc.add(prompt, chosen), rejected)
    else:
        found = pc.multiply(pc.add(prompt, pc.max_element_wise(chosen, rejected)), 2)
    tokens: list[int] = found.to_pylist()
    return tokens


def passes_of(batch: Sequence[int], tokens: Sequence[int], budget: int, workers: int) -> list[list[list[int]]]:
    """A batch dealt out: [pass][worker] -> the indexes of the pairs in that worker's share of the pass.

    `tokens` holds the tokens of every pair of the run, prompt, chosen and rejected together. A share has at most
    `budget` of them, or is a single larger pair. There are as few passes as a simple rule finds: the largest pair
    goes to the least loaded share, and where one does not fit, all are dealt out again over one more pass. So all
    workers have the same number of passes, and a share is empty only where there are fewer pairs than shares.
    Shares of similar size make a pass, so that workers wait little for each other; the largest come first, where a
    lack of memory shows at once.

    Raises ValueError for no workers and for a budget or a pair without tokens.
    """
    if workers < 1 or budget < 1:
        raise ValueError(f"workers are {workers} and the budget is {budget} tokens; each must be at least 1")
    for index in batch:
        if tokens[index] < 1:
            raise ValueError(f"tokens[{index}] is {tokens[index]}; every pair must have at least 1 token")
    ordered = sorted(batch, key=lambda index: (-tokens[index], index))
    # A pair above the budget fills a share as one of exactly the budget does.
    loads = [min(tokens[index], budget) for index in ordered]
    passes = max(1, math.ceil(sum(loads) / (budget * workers)))
    while (shares := _dealt(ordered, loads, budget, passes * workers)) is None:
        passes += 1
    shares.sort(key=lambda share: (-sum(tokens[index] for index in share), share))
    return [shares[start : start + workers] for start in range(0, len(shares), workers)]


def _dealt(ordered: Sequence[int], loads: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """Each index in turn in the least loaded of `count` shares; None where one does not fit."""
    shares: list[list[int]] = [[] for _ in range(count)]
    least = [(0, number) for number in range(count)]  # a heap of (load, share)
    for index, load in zip(ordered, loads, strict=True):
        total, number = least[0]
        if total + load > budget:
            return None
        shares[number].append(index)
        heapq.heapreplace(least, (total + load, number))
    return shares


def learning_rate(train: Train, step: int, total_steps: int) -> float:
    """The learning rate of an optimiser step counted from 0.

    Linear warm-up over ceil(warmup_ratio * total_steps) steps, the last of which has the full rate; then constant,
    or decay by a line or half a cosine that would reach train.min_lr_rate of it at `total_steps`. Unlike in
    transformers' schedulers the first warm-up step has a rate above 0: in runs of a few dozen steps none should be
    wasted.
    """
    warmup_steps = math.ceil(train.warmup_ratio * total_steps)
    if step < warmup_steps:
        return train.learning_rate * (step + 1) / warmup_steps
    if train.lr_scheduler_type == "constant":
        return train.learning_rate
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    left = 1 - progress if train.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return train.learning_rate * (train.min_lr_rate + (1 - train.min_lr_rate) * left)
