"""One direction from the gradients of several languages, computed from their Gram matrix alone.

A direction is a vector w of coefficients: it stands for sum_l w[l] * g_l over the languages' original
gradients g_l. Signs follow the pair gradients u: g_l points where the loss of language l goes down.

A gradient shorter than 1e-10 of the longest one counts as zero: dividing by its length would turn rounding into
a direction. No method projects onto such a gradient, and the methods that solve for weights leave it out (weight
0). Its language then has no say, where taken to the letter it would end the search: zero is a point of the hull
of the gradients, so that MGDA's direction would be zero, and Nash-MTL's equation would have no solution.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from congrad_ray.config.names import DirectionMethod

Float64Array = NDArray[np.float64]

# Length of a gradient, relative to the longest one, up to which it counts as zero.
_NEGLIGIBLE = 1e-10
# Length of a combination of gradients, relative to the parts that it is the sum of, up to which only rounding is
# left. The Gram matrix holds squares, so its rounding of 1e-16 is one of 1e-8 in lengths.
_CANCELLED = 1e-6
# Highest target cosine of GradVac: its formula divides by sqrt(1 - target^2).
_HIGHEST_TARGET = 0.99
# Nash-MTL has a solution only where the unit gradients' hull keeps away from zero. Squared distance up to which
# it counts as touching zero, and what is then added to each unit gradient's square.
_NASH_TOUCHES = 1e-10
_NASH_RIDGE = 1e-6
# Newton's method for Nash-MTL takes 5 to 40 steps; the bound only ends the loop for a broken matrix.
_NASH_STEPS = 500


def check_gram(gram: Float64Array) -> Float64Array:
    """`gram` as float64 (L, L). Raises ValueError if it is not square, finite and symmetric."""
    gram = np.asarray(gram, dtype=np.float64)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"the Gram matrix has shape {gram.shape}; it must be (languages, languages)")
    if not np.isfinite(gram).all():
        rows = np.flatnonzero(~np.isfinite(gram).all(axis=1)).tolist()
        raise ValueError(f"the Gram matrix is not finite in rows {rows}; look for NaN in those sketches")
    if not np.allclose(gram, gram.T, rtol=1e-6, atol=1e-9 * float(np.abs(gram).max())):
        raise ValueError("the Gram matrix is not symmetric; entry (i, j) must be <g_i, g_j>")
    return gram


def direction_weights(gram: Float64Array, method: DirectionMethod, seed: int = 0, orders: int = 1) -> Float64Array:
    """Coefficients (L,) of the direction that `method` makes of the gradients with the Gram matrix `gram`.

    PCGrad and GradVac go through the languages in a random order; their weights are the mean over `orders` draws,
    with the seeds `seed`, `seed` + 1, ... The other methods draw nothing and ignore both. The mean and
    the sum are 1/L and 1 for every language. Raises ValueError for a bad Gram matrix, an unknown method and
    `orders` below 1.
    """
    gram = check_gram(gram)
    if orders < 1:
        raise ValueError(f"orders is {orders}; draw at least one order")
    match method:
        case "pcgrad" | "gradvac":
            draws = [projected_coefficients(gram, method, seed + draw).sum(axis=0) for draw in range(orders)]
            return np.mean(draws, axis=0)
        case "mean":
            return mean_direction(gram)
        case "sum":
            return np.ones(len(gram))
        case "cagrad":
            return cagrad(gram)
        case "mgda":
            return mgda(gram)
        case "nash_mtl":
            return nash_mtl(gram)
        case "equal_norm_mean":
            return equal_norm_mean(gram)
        case "consensus":
            return consensus(gram)
    raise ValueError(f"no such direction method: {method!r}")


def projected_coefficients(gram: Float64Array, method: DirectionMethod, seed: int = 0) -> Float64Array:
    """The languages' gradients after the surgery of `method`, as rows of coefficients over the original ones,
    (L, L).

    Only PCGrad and GradVac change the single gradients. The other methods weigh them, which turns none of them:
    the identity. Raises ValueError for a bad Gram matrix.
    """
    if method == "pcgrad":
        return pcgrad_coefficients(gram, seed)
    if method == "gradvac":
        return gradvac_coefficients(gram, seed)
    return np.eye(len(check_gram(gram)))


def pcgrad_coefficients(gram: Float64Array, seed: int) -> Float64Array:
    """PCGrad's projected gradients as rows of coefficients over the original ones, (L, L).

    For each i, over the others k in an order drawn from `seed`:
    g_i <- g_i - min(<g_i, g_k> / |g_k|^2, 0) * g_k, with g_k the original gradient (Yu et al. 2020,
    arXiv 2001.06782, algorithm 1). A g_k that counts as zero conflicts with nothing and is skipped. Row i times
    the original gradients is the projected g_i.

    The result depends on the order of the languages in `gram` through the draw: sort them before.
    """
    gram = check_gram(gram)
    languages = len(gram)
    counted = _counted(gram)
    generator = np.random.default_rng(seed)
    coefficients = np.eye(languages)
    for i in range(languages):
        for k in generator.permutation(languages):
            if k == i or not counted[k]:
                continue
            # <current g_i, g_k> through the coefficients of the current g_i.
            inner = coefficients[i] @ gram[:, k]
            coefficients[i, k] -= min(inner / gram[k, k], 0.0)
    return coefficients


def mean_direction(gram: Float64Array) -> Float64Array:
    """Coefficients (L,) of the plain mean of the languages' gradients, without surgery: 1/L each."""
    languages = len(check_gram(gram))
    return np.full(languages, 1.0 / languages)


def gradvac_coefficients(gram: Float64Array, seed: int) -> Float64Array:
    """GradVac's turned gradients as rows of coefficients over the original ones, (L, L).

    For each i, over the others k in an order drawn from `seed`, with p the cosine of the current g_i and the
    original g_k and t the cosine aimed at: where p < t,
    g_i <- g_i + |g_i| (t sqrt(1 - p^2) - p sqrt(1 - t^2)) / (|g_k| sqrt(1 - t^2)) * g_k, which makes their cosine
    t (Wang et al. 2021, arXiv 2010.05874, algorithm 1). With t = 0 it is PCGrad.

    The paper keeps a target for each pair, a moving average of its cosine over the training steps. Here there is
    one set of gradients, so ours is one number: the mean cosine over all pairs of languages, and no less than 0
    and no more than 0.99. Gradients that count as zero are left out of that mean, stay as they are, and turn no
    other. A g_i that earlier turns have cancelled (one exactly opposite to g_k becomes zero, whatever the target)
    has no cosine left and stays zero.

    The result depends on the order of the languages in `gram` through the draw: sort them before.
    """
    gram = check_gram(gram)
    languages = len(gram)
    counted = _counted(gram)
    lengths = _lengths(gram)
    target = _target_cosine(_cosines(gram)[1])
    generator = np.random.default_rng(seed)
    coefficients = np.eye(languages)
    for i in range(languages):
        for k in generator.permutation(languages):
            if k == i or not counted[k] or not counted[i]:
                continue
            current = coefficients[i]
            products = current @ gram
            length = math.sqrt(max(float(products @ current), 0.0))
            if length <= _CANCELLED * float(np.abs(current) @ lengths):
                break
            cosine = min(max(float(products[k]) / (length * lengths[k]), -1.0), 1.0)
            if cosine < target:
                across = math.sqrt(1.0 - target**2)
                turn = target * math.sqrt(1.0 - cosine**2) - cosine * across
                coefficients[i, k] += length * turn / (lengths[k] * across)
    return coefficients


def cagrad(gram: Float64Array, c: float = 0.5) -> Float64Array:
    """Coefficients (L,) of CAGrad's direction d, the one that is best for the language that gains least.

    d maximises min_l <g_l, d> over |d - g_0| <= c |g_0|, g_0 being the mean gradient. Its dual, over weights w
    that are not negative and have sum 1, with g_w = sum_l w[l] g_l, is to minimise
    F(w) = <g_w, g_0> + c |g_0| |g_w|, and then d = g_0 + c |g_0| / |g_w| * g_w (Liu et al. 2021, arXiv 2110.14048,
    algorithm 1; the paper writes g_w with a factor of 1/L, which changes neither w nor d). Where g_0 or g_w is
    zero, d = g_0. Gradients that count as zero have no part in g_0 either; with them in it, d would only be
    shorter. Raises ValueError for c outside [0, 1).
    """
    gram = check_gram(gram)
    if not 0.0 <= c < 1.0:
        raise ValueError(f"c is {c}; it must be at least 0 and below 1")
    rows, cosines = _cosines(gram)
    weights = np.zeros(len(gram))
    if not len(rows):
        return weights
    lengths = _lengths(gram)[rows]
    gradients = (lengths / lengths.max())[:, None] * _vectors(cosines)
    lengths = lengths / lengths.max()
    mean = gradients.mean(axis=0)
    weights[rows] = 1.0 / len(rows)
    radius = c * float(np.linalg.norm(mean))
    if radius <= c * _CANCELLED * lengths.mean():
        return weights

    # |x| is the minimum of (|x|^2 / t + t) / 2 over t > 0, found at t = |x|. For a fixed t the search for w is
    # then, with the square completed, that for the point nearest to zero in the hull of g_l + t / radius * g_0.
    # What remains is to find t = |g_w|. F is convex in (w, t) together, so |g_w| - t changes sign only once.
    def nearest(length: float) -> Float64Array:
        return _nearest_to_zero(gradients + length / radius * mean)

    def excess(length: float) -> float:
        return float(np.linalg.norm(nearest(length) @ gradients)) - length

    shortest = _CANCELLED * float(lengths.min())
    if excess(shortest) <= 0.0:
        return weights
    from scipy.optimize import brentq

    # No g_w is longer than the longest gradient; the margin is for rounding.
    found = nearest(brentq(excess, shortest, 1.0 + 1e-9, xtol=1e-16, rtol=1e-15))
    weights[rows] += radius / float(np.linalg.norm(found @ gradients)) * found
    return weights


def mgda(gram: Float64Array) -> Float64Array:
    """Coefficients (L,) of MGDA's direction: the shortest vector of the gradients' convex hull.

    The weights are not negative, have sum 1 and minimise |sum_l w[l] g_l|^2 (Désidéri 2012; Sener & Koltun 2018,
    arXiv 1810.04650). The direction d has <d, g_l> >= |d|^2 for every l; it is zero where the hull contains zero,
    as with two opposite gradients. Gradients that count as zero are left out; all weights are 0 if all do.
    """
    gram = check_gram(gram)
    rows, cosines = _cosines(gram)
    weights = np.zeros(len(gram))
    if len(rows):
        lengths = _lengths(gram)[rows]
        weights[rows] = _nearest_to_zero((lengths / lengths.max())[:, None] * _vectors(cosines))
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
    rows, cosines = _cosines(gram)
    weights = np.zeros(len(gram))
    if not len(rows):
        return weights
    # For unit gradients the equation is the same, with w[l] |g_l| in the place of w[l].
    vectors = _vectors(cosines)
    squares = vectors @ vectors.T
    if np.linalg.norm(_nearest_to_zero(vectors) @ vectors) ** 2 <= _NASH_TOUCHES:
        squares += _NASH_RIDGE * np.eye(len(rows))
    weights[rows] = _solve_nash(squares) / _lengths(gram)[rows]
    return weights


def equal_norm_mean(gram: Float64Array) -> Float64Array:
    """Coefficients (L,) of the mean of the unit gradients g_l / |g_l|, over those that do not count as zero."""
    gram = check_gram(gram)
    counted = _counted(gram)
    weights = np.zeros(len(gram))
    weights[counted] = 1.0 / (counted.sum() * _lengths(gram)[counted])
    return weights


def consensus(gram: Float64Array) -> Float64Array:
    """Coefficients (L,) of a direction in which each language counts as much as the others agree with it.

    Of this project; made for judges that are wrong in some languages. There the methods above take a corrupt
    language for one to be reconciled: PCGrad turns the healthy gradients away from the corrupt ones. Here, with
    unit gradients h_l = g_l / |g_l|, the direction is the mean of max(0, cos(h_l, sum of the others' h_k)) * h_l,
    so that a language which the others contradict has no say. Where none agrees with the others, it is
    `equal_norm_mean`. Gradients that count as zero are left out (weight 0).
    """
    gram = check_gram(gram)
    rows, cosines = _cosines(gram)
    others = len(rows) - 1
    if others < 1:
        return equal_norm_mean(gram)
    sums = cosines.sum(axis=1)
    products = sums - np.diag(cosines)
    lengths = np.sqrt(np.maximum(cosines.sum() - 2 * sums + np.diag(cosines), 0.0))
    agree = (products > 0.0) & (lengths > _CANCELLED * others)
    if not agree.any():
        return equal_norm_mean(gram)
    weights = np.zeros(len(gram))
    weights[rows[agree]] = products[agree] / lengths[agree] / (len(rows) * _lengths(gram)[rows[agree]])
    return weights


def _lengths(gram: Float64Array) -> Float64Array:
    return np.sqrt(np.maximum(np.diag(gram), 0.0))


def _counted(gram: Float64Array) -> NDArray[np.bool_]:
    """Mask (L,) of the languages whose gradient does not count as zero."""
    lengths = _lengths(gram)
    return lengths > _NEGLIGIBLE * lengths.max()


def _cosines(gram: Float64Array) -> tuple[NDArray[np.intp], Float64Array]:
    """The n languages whose gradient does not count as zero, and their cosines (n, n)."""
    counted = np.flatnonzero(_counted(gram))
    lengths = _lengths(gram)[counted]
    return counted, gram[np.ix_(counted, counted)] / np.outer(lengths, lengths)


def _target_cosine(cosines: Float64Array) -> float:
    """GradVac's target: the mean of the cosines (n, n) over pairs of languages, within [0, 0.99]."""
    if len(cosines) < 2:
        return 0.0
    mean = float(cosines[np.triu_indices(len(cosines), k=1)].mean())
    return min(max(mean, 0.0), _HIGHEST_TARGET)


def _vectors(cosines: Float64Array) -> Float64Array:
    """Unit vectors (n, n), one a row, that have the given cosines (n, n).

    Gradients are taken as their lengths times these. The same from the Gram matrix itself would lose short
    gradients beside long ones to rounding.
    """
    values, vectors = np.linalg.eigh(cosines)
    return vectors * np.sqrt(np.maximum(values, 0.0))


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
