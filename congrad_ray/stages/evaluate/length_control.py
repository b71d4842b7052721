"""The win rate as it would be if both answers had the same length: the regression of AlpacaEval 2.

Dubois, Galambosi, Liang and Hashimoto 2024 (2404.04475) explain each preference by a logistic regression on a
constant, the difference of the answers' lengths and the difficulty of the instruction, and predict all of them
with no difference of length. Difficulties are fitted over the many models of AlpacaEval's leaderboard; a user's
own prompts have none, so that term is left out, as in `length_controlled_minimal` of the package alpaca_eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from congrad_ray.stages.evaluate.bootstrap import Interval, bootstrap_interval_of

Vector = NDArray[np.float64]

# alpaca_eval's, where it does not choose one by cross-validation: on a few prompts that would often choose to
# shrink the constant to 0, which is a win rate of 50 % whatever was measured.
_C = 100.0
_CORNER = 1e-6
_PRECISION = 1e-7
_MOST_STEPS = 100
_MOST_HALVINGS = 30


def length_controlled_rate(wins: Sequence[float], differences: Sequence[float]) -> float:
    """The mean preference predicted for answers of equal length, 0..1.

    `wins`: of each prompt, 0..1, a tie or two contradicting verdicts 0.5. `differences`: of the answers' lengths,
    the model's less the baseline's, in standard deviations (`in_deviations`). Raises ValueError without a prompt.
    """
    if not len(wins) or len(wins) != len(differences):
        raise ValueError(f"{len(wins)} wins and {len(differences)} differences: there must be as many, and one")
    return float(_rate(np.asarray(wins, np.float64), np.asarray(differences, np.float64)))


def length_controlled_interval(wins: Sequence[float], differences: Sequence[float], seed: int = 0) -> Interval:
    """Percentile bootstrap interval of `length_controlled_rate` over prompts. Raises ValueError without one."""
    return bootstrap_interval_of(_rate, (wins, differences), seed)


def in_deviations(differences: Sequence[float]) -> list[float]:
    """Differences divided by their standard deviation (n - 1); all 0 where they do not differ."""
    deviation = float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    return [float(difference) / deviation if deviation else 0.0 for difference in differences]


def _rate(wins: Vector, differences: Vector, axis: int = -1) -> Any:
    """The rate of the prompts along the last axis; those before it are samples of a bootstrap."""
    assert axis == -1
    return _logistic(_coefficients(wins, np.tanh(differences))[0])


def _coefficients(wins: Vector, lengths: Vector) -> tuple[Vector, Vector]:
    """Constant and coefficient of `lengths` that minimise |b|_1 + C * (the log loss, summed over the prompts).

    Preferences between 0 and 1 count as a win and a loss with these weights, as in alpaca_eval. By Newton's
    method, for many samples at once: scipy.optimize.minimize, sample by sample, takes a hundred times as long.
    """
    constant, slope = np.zeros((2, *wins.shape[:-1]))
    before = _loss(constant, slope, wins, lengths)
    for _ in range(_MOST_STEPS):
        likely = _logistic(_margins(constant, slope, lengths))
        error, weight = _C * (likely - wins), _C * likely * (1 - likely)
        g1 = error.sum(-1) + constant / _size(constant)
        g2 = (error * lengths).sum(-1) + slope / _size(slope)
        h11 = weight.sum(-1) + _CORNER / _size(constant) ** 3
        h12 = (weight * lengths).sum(-1)
        h22 = (weight * lengths**2).sum(-1) + _CORNER / _size(slope) ** 3
        determinant = h11 * h22 - h12**2
        step1, step2 = (h22 * g1 - h12 * g2) / determinant, (h11 * g2 - h12 * g1) / determinant
        factor = np.ones_like(before)
        for _ in range(_MOST_HALVINGS):  # the loss is convex: a step that is short enough lowers it
            after = _loss(constant - factor * step1, slope - factor * step2, wins, lengths)
            worse = after > before
            if not worse.any():
                break
            factor = np.where(worse, factor / 2, factor)
        factor = np.where(after > before, 0.0, factor)
        constant, slope = constant - factor * step1, slope - factor * step2
        before = np.minimum(after, before)
        if max(np.abs(factor * step1).max(), np.abs(factor * step2).max()) < _PRECISION:
            break
    return constant, slope


def _loss(constant: Vector, slope: Vector, wins: Vector, lengths: Vector) -> Vector:
    margins = _margins(constant, slope, lengths)
    losses = np.logaddexp(0, margins) - wins * margins
    return np.asarray(_C * losses.sum(-1) + _size(constant) + _size(slope))


def _logistic(value: Vector) -> Vector:
    """1 / (1 + exp(-value)), without overflow; scipy's would be imported by every command."""
    return np.asarray(np.exp(-np.logaddexp(0, -value)))


def _margins(constant: Vector, slope: Vector, lengths: Vector) -> Vector:
    return np.asarray(constant[..., None] + slope[..., None] * lengths)


def _size(value: Vector) -> Vector:
    """|value|, round at 0 so that it has a slope there."""
    return np.sqrt(value**2 + _CORNER)
