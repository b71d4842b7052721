"""Intervals by drawing again from what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Interval = tuple[float, float]

# Numbers that a bootstrap holds at once; how many does not change the draws.
_NUMBERS_AT_A_TIME = 2**20


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, confidence: float = 0.95, resamples: int = 1000
) -> Interval:
    """Percentile bootstrap interval of the mean (Efron 1979). Raises ValueError where there is no value."""
    return bootstrap_interval_of(np.mean, (values,), seed, confidence, resamples)


def bootstrap_interval_of(
    statistic: Callable[..., Any],
    samples: Sequence[Sequence[float]],
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 1000,
) -> Interval:
    """Percentile bootstrap interval of a statistic of one or several samples, which are drawn together.

    A statistic with the parameter `axis`, as `np.mean` has it, is faster. Raises ValueError where there is no
    value.
    """
    size = len(samples[0])
    if not size:
        raise ValueError("a bootstrap interval needs at least one value")
    arrays = tuple(np.asarray(sample, dtype=np.float64) for sample in samples)
    if size == 1:  # which scipy refuses
        value = float(statistic(*arrays))
        return value, value
    from scipy.stats import bootstrap

    interval = bootstrap(
        arrays,
        statistic,
        n_resamples=resamples,
        batch=max(1, _NUMBERS_AT_A_TIME // size),
        paired=len(arrays) > 1,
        confidence_level=confidence,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return float(interval.low), float(interval.high)
