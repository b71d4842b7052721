"""How near sketched cosines come to exact ones, on some pairs of every run."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Audit:
    """Sketched against exact cosines of `pairs` pairs, each with the mean of the others in its micro-batch."""

    pairs: int
    error: float  # root mean square of the differences
    largest_error: float
    rank_correlation: float  # Spearman's


def cosines_with_others(gram: Float64Array) -> Float64Array:
    """Cosine (B,) of every vector with the mean of the B - 1 others, from the Gram matrix (B, B) alone.

    The mean of all would hold a share of the vector itself, which any sketch gets right. Zero where a norm is.
    """
    own = np.diag(gram)
    dots = gram.sum(axis=1) - own
    squared = gram.sum() - 2 * gram.sum(axis=1) + own  # |sum of the others|^2
    scale = np.sqrt(np.maximum(own * squared, 0.0))
    return np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)


def audit(exact: Float64Array, sketched: Float64Array) -> Audit | None:
    """The comparison of two arrays (N,) of cosines; None for fewer than two."""
    if len(exact) < 2:
        return None
    differences = np.abs(exact - sketched)
    return Audit(
        len(exact),
        float(np.sqrt(np.mean(differences**2))),
        float(differences.max()),
        rank_correlation(exact, sketched),
    )


def expected_overlap(error: float, spread: float, keep: float) -> float:
    """Share of the best fraction `keep` by sketched scores that the best by exact scores would hold as well.

    `error` is the root mean square error of the sketched scores and `spread` their standard deviation. Exact score
    and error are taken for normal and independent, so that exact and sketched scores correlate with
    rho = sqrt(1 - error^2 / spread^2); for one half that makes 1 - arccos(rho) / pi. Measured overlaps are as near
    to it as their number of pairs lets them (docs/results/engine.md).
    """
    from scipy.stats import multivariate_normal, norm

    if not spread > error:
        return keep  # no better than chance
    rho = float(np.sqrt(1 - (error / spread) ** 2))
    edge = norm.ppf(keep)
    both = multivariate_normal.cdf([edge, edge], cov=[[1.0, rho], [rho, 1.0]], allow_singular=True)
    return float(both / keep)


def rank_correlation(one: Float64Array, other: Float64Array) -> float:
    """Spearman's rank correlation of two arrays (N,): equal values share a rank, NaN if one array is constant."""
    from scipy.stats import ConstantInputWarning, spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(spearmanr(one, other).statistic)
