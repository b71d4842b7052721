"""How much each pair counts in the gradient of its language."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from congrad_ray.config.recipe import Select
from congrad_ray.stages.select.gram import Float64Array


def pair_shares(settings: Select, index: NDArray[np.int64]) -> Float64Array:
    """Each pair's share in its language's gradient, (N,); `index` (N,) has the language of each, by pair_id."""
    shares = np.empty(len(index))
    for language, count in enumerate(np.bincount(index).tolist()):
        shares[index == language] = (
            mean_shares(count)
            if settings.language_gradient == "mean"
            else moving_average_shares(count, settings.ema_decay, settings.ema_batch_size, settings.seed)
        )
    return shares


def mean_shares(pairs: int) -> Float64Array:
    """The shares (pairs,) of a plain mean: 1 / pairs each."""
    return np.full(pairs, 1.0 / pairs)


def moving_average_shares(pairs: int, decay: float, batch_size: int, seed: int) -> Float64Array:
    """The shares (pairs,) in an exponential moving average over mini-batches of a language's pairs, of sum 1.

    The pairs, in the order given (by id), are shuffled with `seed` and cut into mini-batches of up to `batch_size`
    whose sizes differ by no more than one. The average g starts with the first batch's mean; each further batch
    makes it decay * g + (1 - decay) * mean of the batch, as in the paper (arXiv 2503.23777), which does not give
    its decay. Raises ValueError for a decay outside [0, 1) or a batch size below 1.
    """
    if not 0.0 <= decay < 1.0 or batch_size < 1:
        raise ValueError(
            f"the decay is {decay} and the batch size {batch_size}; give 0 <= decay < 1 and 1 or more"
        )
    batches = np.array_split(np.random.default_rng(seed).permutation(pairs), -(-pairs // batch_size))
    shares = np.zeros(pairs)
    for number, members in enumerate(batches):
        weight = decay ** (len(batches) - 1 - number) * (1.0 if number == 0 else 1.0 - decay)
        shares[members] = weight / len(members)
    return shares
