"""Directions that solve an optimisation problem over the gradients' Gram matrix, as `directions` has them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from congrad_ray.stages.select.gram import (
    CANCELLED,
    Float64Array,
    check_gram,
    counted_cosines,
    counted_vectors,
    lengths_of,
    unit_vectors,
)

# Nash-MTL has a solution only where the unit gradients' hull keeps away from zero. Squared distance up to which
# it counts as touching zero, and what is then added to each unit gradient's square.
_NASH_TOUCHES = 1e-10
_NASH_RIDGE = 1e-6
# Newton's method for Nash-MTL takes 5 to 40 steps; the bound only ends the loop for a broken matrix.
_NASH_STEPS = 500

# How much more what must hold counts than what is as small as it then can be, in a least squares problem.
_FIRM = 1e6


def cagrad(gram: Float64Array, c: float = 0.5) -> Float64Array:
    """Coefficients (L,) of CAGrad's direction d, the one that is best for the language that gains least.

    d maximises min_l <g_l, d> over |d - g_0| <= c |g_0|, g_0 being the mean gradient. Its dual, over weights w
    that are not negative and have sum 1, with g_w = sum_l w[l] g_l, is to minimise
    F(w) = <g_w, g_0> + c |g_0| |g_w|, and then d = g_0 + c |g_0| / |g_w| * g_w (Liu et al. 2021, arXiv 2110.14048,
    algorithm 1; the paper writes g_w with a factor of 1/L, which changes neither w nor d). Where g_0 or g_w is
    zero, d = g_0. Gradients that count as zero have no part in g_0 either; with them in it, d would only be
    shorter. Raises ValueError for c outside [0, 1).
    """
    rows, gradients = _in_ball(gram, c)
    weights = np.zeros(len(gram))
    if not len(rows):
        return weights
    mean = np.full(len(rows), 1.0 / len(rows))
    weights[rows] = mean
    found = _worst_mixture(gradients, mean, c)
    if found is not None:
        radius = c * float(np.linalg.norm(mean @ gradients))
        weights[rows] += radius / float(np.linalg.norm(found @ gradients)) * found
    return weights


def raco(gram: Float64Array, preference: Float64Array | None = None, c: float = 0.5) -> Float64Array:
    """Coefficients (L,) of RACO's direction: CAGrad around a weighted mean, its correction clipped to the weights.

    With `preference` w (L,) > 0, taken as shares of sum 1 (None: equal ones), g_0 = sum_l w[l] g_l, and p the
    minimum of CAGrad's dual <g_p, g_0> + c |g_0| |g_p| over the simplex, the correction is made of
    q[l] = min(p[l], w[l]): d = g_0 + c |g_0| / |g_q| * g_q, so that no language gets more of it than its weight
    (Chen et al. 2026, arXiv 2602.02495, CAGrad-Clip). Where g_0, g_p or g_q is zero, d = g_0. Of several minima p,
    which there may be where gradients depend on each other, it is the evenest, of least |p|. Gradients that count
    as zero are left out of the shares too. c is CAGrad's default; the paper's experiments vary it.
    Raises ValueError for c outside [0, 1) and weights that do not fit.
    """
    rows, gradients = _in_ball(gram, c)
    shares = np.ones(len(gram)) if preference is None else np.asarray(preference, dtype=np.float64)
    if shares.shape != (len(gram),) or not (np.isfinite(shares) & (shares > 0)).all():
        raise ValueError(f"the preference is {shares.tolist()}; give one weight above 0 for each of {len(gram)}")
    weights = np.zeros(len(gram))
    if not len(rows):
        return weights
    wanted = shares[rows] / shares[rows].sum()
    weights[rows] = wanted
    found = _worst_mixture(gradients, wanted, c)
    if found is None:
        return weights
    clipped = np.minimum(_evenest(gradients, found), wanted)
    length = float(np.linalg.norm(clipped @ gradients))
    if length > CANCELLED * float(clipped @ np.linalg.norm(gradients, axis=1)):
        weights[rows] += c * float(np.linalg.norm(wanted @ gradients)) / length * clipped
    return weights


def mgda(gram: Float64Array) -> Float64Array:
    """Coefficients (L,) of MGDA's direction: the shortest vector of the gradients' convex hull.

    The weights are not negative, have sum 1 and minimise |sum_l w[l] g_l|^2 (Désidéri 2012; Sener & Koltun 2018,
    arXiv 1810.04650). The direction d has <d, g_l> >= |d|^2 for every l; it is zero where the hull contains zero,
    as with two opposite gradients. Gradients that count as zero are left out; all weights are 0 if all do.
    """
    gram = check_gram(gram)
    rows, gradients = counted_vectors(gram)
    weights = np.zeros(len(gram))
    if len(rows):
        weights[rows] = _nearest_to_zero(gradients)
    return weights


def upgrad(gram: Float64Array) -> Float64Array:
    """Coefficients (L,) of UPGrad's direction: the mean of the gradients, each without what hurts any language.

    Each g_l is projected onto the dual cone {d: <d, g_k> >= 0 for every k}: the nearest vector there is
    g_l + sum_k v[k] g_k with the v >= 0 that make it shortest, a non-negative least squares problem (Quinton & Rey
    2024, arXiv 2406.16232, equation 3 and proposition 1). Where PCGrad looks at one other language after the
    other, in some order, this looks at all at once, so that neither the projections nor their mean hurt any.
    It is zero where no direction is without harm but zero itself. Gradients that count as zero are left out
    (weight 0).
    """
    from scipy.optimize import nnls

    gram = check_gram(gram)
    rows, cosines = counted_cosines(gram)
    weights = np.zeros(len(gram))
    if not len(rows):
        return weights
    lengths = lengths_of(gram)[rows]
    units = unit_vectors(cosines)  # the cone is the same, and the problems are well scaled
    added = [nnls(units.T, -unit, maxiter=100 * len(rows))[0] for unit in units]
    weights[rows] = lengths @ (np.eye(len(rows)) + np.stack(added)) / lengths / len(rows)
    return weights


def nash_mtl(gram: Float64Array) -> Float64Array:
    """Coefficients (L,) of the direction that the languages agree on when they bargain for it.

    With G the Gram matrix they solve G w = 1 / w (for each language) with w > 0: the minimum of
    1/2 w^T G w - sum_l log w[l] (Navon et al. 2022, arXiv 2202.01017, claim 3.1). The direction makes the product
    of the languages' gains as great as it can be, so it does not depend on how long the single gradients are.
    Gradients that count as zero are left out (weight 0).

    There is no solution where no direction helps all languages, that is, where the hull of the unit gradients
    reaches zero (to 1e-5), as with two opposite gradients. In that case, which the paper rules out, we add 1e-6
    to the square of each unit gradient, |g_l|^2 <- (1 + 1e-6) |g_l|^2 on the diagonal of G: gradients that
    cancel then get great but finite weights, and those of the other languages make the direction.
    """
    gram = check_gram(gram)
    rows, cosines = counted_cosines(gram)
    weights = np.zeros(len(gram))
    if not len(rows):
        return weights
    # For unit gradients the equation is the same, with w[l] |g_l| in the place of w[l].
    vectors = unit_vectors(cosines)
    squares = vectors @ vectors.T
    if np.linalg.norm(_nearest_to_zero(vectors) @ vectors) ** 2 <= _NASH_TOUCHES:
        squares += _NASH_RIDGE * np.eye(len(rows))
    weights[rows] = _solve_nash(squares) / lengths_of(gram)[rows]
    return weights


def _in_ball(gram: Float64Array, c: float) -> tuple[NDArray[np.intp], Float64Array]:
    """What CAGrad and RACO start from: `counted_vectors`, with gram and c checked."""
    gram = check_gram(gram)
    if not 0.0 <= c < 1.0:
        raise ValueError(f"c is {c}; it must be at least 0 and below 1")
    return counted_vectors(gram)


def _worst_mixture(gradients: Float64Array, shares: Float64Array, c: float) -> Float64Array | None:
    """The w (n,) of the simplex that minimises F(w) = <g_w, g_0> + c |g_0| |g_w|, with g_0 = shares @ gradients.

    The gradients (n, d) are no longer than 1. None where g_0 or the g_w found is zero.
    """
    from scipy.optimize import brentq

    anchor, lengths = shares @ gradients, np.linalg.norm(gradients, axis=1)
    radius = c * float(np.linalg.norm(anchor))
    if radius <= c * CANCELLED * float(shares @ lengths):
        return None

    # |x| is the minimum of (|x|^2 / t + t) / 2 over t > 0, found at t = |x|. For a fixed t the search for w is
    # then, with the square completed, that for the point nearest to zero in the hull of g_l + t / radius * g_0.
    # What remains is to find t = |g_w|. F is convex in (w, t) together, so |g_w| - t changes sign only once.
    def nearest(length: float) -> Float64Array:
        return _nearest_to_zero(gradients + length / radius * anchor)

    def excess(length: float) -> float:
        return float(np.linalg.norm(nearest(length) @ gradients)) - length

    shortest = CANCELLED * float(lengths.min())
    if excess(shortest) <= 0.0:
        return None
    # No g_w is longer than the longest gradient; the margin is for rounding.
    return nearest(brentq(excess, shortest, 1.0 + 1e-9, xtol=1e-16, rtol=1e-15))


def _evenest(points: Float64Array, weights: Float64Array) -> Float64Array:
    """Of all weights (n,), none negative, with the sum and the combination of `points` (n, d) that `weights` has,
    those of least length."""
    from scipy.optimize import nnls

    fixed = _FIRM * np.vstack([points.T, np.ones(len(points))])
    target = np.concatenate([fixed @ weights, np.zeros(len(points))])
    return nnls(np.vstack([fixed, np.eye(len(points))]), target, maxiter=100 * len(points))[0]


def _nearest_to_zero(points: Float64Array) -> Float64Array:
    """Weights (n,), none negative and of sum 1, of the point nearest to zero in the convex hull of `points`
    (n, d).

    The minimum of |sum_l v[l] points[l]|^2 + s^2 (sum_l v[l] - 1)^2 over v >= 0 is a multiple of them for every
    s > 0: v = t w has the value t^2 |w points|^2 + s^2 (t - 1)^2, which grows with |w points| whatever t is. An
    active-set solver of non-negative least squares finds it exactly, for points that depend on each other too.
    """
    from scipy.optimize import nnls

    lengths = np.linalg.norm(points, axis=1)
    shortest = float(lengths.min())
    if shortest == 0.0:
        weights = np.zeros(len(points))
        weights[lengths.argmin()] = 1.0
        return weights
    # s is the shortest length, which the nearest point does not exceed, and columns have length 1 to 1.4: neither
    # part of the sum is lost beside the other.
    columns = np.vstack([points.T, np.full(len(points), shortest)]) / lengths
    target = np.zeros(len(columns))
    target[-1] = 1.0
    solution, _ = nnls(columns, target, maxiter=100 * len(points))
    weights = solution / lengths
    return weights / weights.sum()


def _solve_nash(squares: Float64Array) -> Float64Array:
    """The a > 0 with squares @ a = 1 / a, for a positive semidefinite (n, n) matrix for which there is one.

    Newton's method on 1/2 a^T squares a - sum log a, which is self-concordant: with steps shortened by 1 + the
    decrement it cannot leave a > 0 and comes down from everywhere.
    """
    solution = np.ones(len(squares))
    last = math.inf
    for _ in range(_NASH_STEPS):
        # Everything relative to the current solution: the matrix is then 1 at least in every direction.
        scaled = solution[:, None] * squares * solution
        slope = scaled.sum(axis=1) - 1.0
        step = -np.linalg.solve(scaled + np.eye(len(squares)), slope)
        decrement = math.sqrt(max(float(-slope @ step), 0.0))
        # A full step more than halves the decrement, until only rounding is left.
        if last < 0.25 and decrement >= 0.5 * last:
            break
        last = decrement
        solution = solution * (1.0 + step / (1.0 + decrement if decrement >= 0.25 else 1.0))
        if decrement < 1e-12:
            break
    return solution
