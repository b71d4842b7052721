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

from congrad_ray.config.names import DirectionMethod
from congrad_ray.stages.select.gram import (
    CANCELLED,
    Float64Array,
    check_gram,
    counted,
    counted_cosines,
    counted_vectors,
    lengths_of,
)
from congrad_ray.stages.select.optimal import cagrad, mgda, nash_mtl, raco, upgrad

# Highest target cosine of GradVac: its formula divides by sqrt(1 - target^2).
_HIGHEST_TARGET = 0.99
# Krum's scores that differ by less than this, relative to the squares that they are made of, are equal.
_KRUM_TIE = 1e-9


def direction_weights(
    gram: Float64Array,
    method: DirectionMethod,
    seed: int = 0,
    orders: int = 1,
    preference: Float64Array | None = None,
) -> Float64Array:
    """Coefficients (L,) of the direction that `method` makes of the gradients with the Gram matrix `gram`.

    PCGrad and GradVac go through the languages in a random order; their weights are the mean over `orders` draws,
    with the seeds `seed`, `seed` + 1, ... The other methods draw nothing and ignore both. `preference` (L,) has
    the languages' weights for RACO, which clips by them; for the others weights scale the gradients themselves.
    The mean and the sum are 1/L and 1 for every language. Raises ValueError for a bad Gram matrix, an unknown
    method and `orders` below 1.
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
        case "upgrad":
            return upgrad(gram)
        case "raco":
            return raco(gram, preference)
        case "aligned_mtl":
            return aligned_mtl(gram)
        case "imtl_g":
            return imtl_g(gram)
        case "config":
            return config(gram)
        case "krum":
            return krum(gram)
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
    nonzero = counted(gram)
    generator = np.random.default_rng(seed)
    coefficients = np.eye(languages)
    for i in range(languages):
        for k in generator.permutation(languages):
            if k == i or not nonzero[k]:
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
    nonzero = counted(gram)
    lengths = lengths_of(gram)
    target = _target_cosine(counted_cosines(gram)[1])
    generator = np.random.default_rng(seed)
    coefficients = np.eye(languages)
    for i in range(languages):
        for k in generator.permutation(languages):
            if k == i or not nonzero[k] or not nonzero[i]:
                continue
            current = coefficients[i]
            products = current @ gram
            length = math.sqrt(max(float(products @ current), 0.0))
            if length <= CANCELLED * float(np.abs(current) @ lengths):
                break
            cosine = min(max(float(products[k]) / (length * lengths[k]), -1.0), 1.0)
            if cosine < target:
                across = math.sqrt(1.0 - target**2)
                turn = target * math.sqrt(1.0 - cosine**2) - cosine * across
                coefficients[i, k] += length * turn / (lengths[k] * across)
    return coefficients


def equal_norm_mean(gram: Float64Array) -> Float64Array:
    """Coefficients (L,) of the mean of the unit gradients g_l / |g_l|, over those that do not count as zero."""
    gram = check_gram(gram)
    nonzero = counted(gram)
    weights = np.zeros(len(gram))
    weights[nonzero] = 1.0 / (nonzero.sum() * lengths_of(gram)[nonzero])
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
    rows, cosines = counted_cosines(gram)
    others = len(rows) - 1
    if others < 1:
        return equal_norm_mean(gram)
    sums = cosines.sum(axis=1)
    products = sums - np.diag(cosines)
    lengths = np.sqrt(np.maximum(cosines.sum() - 2 * sums + np.diag(cosines), 0.0))
    agree = (products > 0.0) & (lengths > CANCELLED * others)
    if not agree.any():
        return equal_norm_mean(gram)
    weights = np.zeros(len(gram))
    weights[rows[agree]] = products[agree] / lengths[agree] / (len(rows) * lengths_of(gram)[rows[agree]])
    return weights


def aligned_mtl(gram: Float64Array) -> Float64Array:
    """Coefficients (L,) of Aligned-MTL's direction: the mean of the gradients made orthogonal and equally long.

    With the singular value decomposition U S V^T of the matrix of the gradients, it is the mean of the rows of
    s U V^T: what is nearest to the gradients among matrices whose singular values are all s, the smallest one; in
    weights, s U S^-1 U^T 1/L (Senushkin et al. 2023, arXiv 2305.19000, algorithm 1, equal preferences). So no
    part that the languages share counts more than one that they do not. Singular values below 1e-6 of the largest
    are rounding and left out, as are gradients that count as zero.
    """
    gram = check_gram(gram)
    rows, gradients = counted_vectors(gram)
    weights = np.zeros(len(gram))
    if len(rows):
        left, values, _ = np.linalg.svd(gradients)
        whole = values > CANCELLED * values[0]
        left, values = left[:, whole], values[whole]
        mean = left.mean(axis=0)
        if np.linalg.norm(mean) > CANCELLED / math.sqrt(len(rows)):  # else the gradients cancel
            weights[rows] = left @ (mean / values) * values[-1]
    return weights


def imtl_g(gram: Float64Array) -> Float64Array:
    """Coefficients (L,) of IMTL-G's direction, whose projections onto the unit gradients are all equal.

    With C the cosines of the gradients, it is sum_l a[l] g_l / |g_l| for C a = 1, scaled so that the coefficients
    have sum 1 (Liu et al. 2021, "Towards Impartial Multi-task Learning", ICLR). Where the gradients
    depend on each other, a is the pseudoinverse's: equal projections as far as there can be, and no direction
    where opposite gradients leave none. Where the sum is negative, the paper's direction would go against every
    language; ours keeps its sign, and a sum that cancels is not divided by. Gradients that count as zero are
    left out (weight 0).
    """
    gram = check_gram(gram)
    rows, cosines = counted_cosines(gram)
    weights = np.zeros(len(gram))
    weights[rows] = _equal_projections(cosines) / lengths_of(gram)[rows]
    total, parts = abs(float(weights.sum())), float(np.abs(weights).sum())
    if parts:
        weights /= total if total > CANCELLED * parts else parts
    return weights


def config(gram: Float64Array) -> Float64Array:
    """Coefficients (L,) of ConFIG's direction: equal cosines with all gradients, as long as they make it.

    The unit vector is that of `imtl_g`, U^+ 1 with U the unit gradients; the length is the sum of all gradients'
    projections onto it (Liu et al. 2024, arXiv 2408.11104, equation 2), which is below zero, so that the vector is
    turned round, only for gradients that depend on each other and cannot all have the same cosine. Otherwise
    cosines with it are IMTL-G's; its length, which counts in dot products and between blocks of layers, is not.
    Gradients that count as zero are left out (weight 0).
    """
    gram = check_gram(gram)
    rows, cosines = counted_cosines(gram)
    weights = np.zeros(len(gram))
    equal, lengths = _equal_projections(cosines), lengths_of(gram)[rows]
    projections = cosines @ equal
    square = float(equal @ projections)
    if square > (CANCELLED * np.abs(equal).sum()) ** 2:
        weights[rows] = float(lengths @ projections) / square * equal / lengths
    return weights


def krum(gram: Float64Array, byzantine: int | None = None) -> Float64Array:
    """Coefficients (L,) of Krum's direction: the one gradient that has the others nearest to it.

    Each gradient's score is the sum of its squared distances to its L - f - 2 nearest others; the one with the
    lowest score is the direction, however wrong `byzantine` = f of the languages are (Blanchard et al. 2017,
    "Machine Learning with Adversaries", NeurIPS, section 4). f is by default the most that its theorem allows,
    2 f + 2 < L. Of equal scores the first language's wins. Distances are of the gradients as they are, so a short
    one is near to many. Gradients that count as zero are left out; of two that are left, which have no majority,
    it is the mean. Raises ValueError for an f that leaves no neighbour.
    """
    gram = check_gram(gram)
    rows = np.flatnonzero(counted(gram))
    count, weights = len(rows), np.zeros(len(gram))
    if byzantine is None:
        byzantine = max(0, (count - 3) // 2)
    elif not 0 <= byzantine <= len(gram) - 3:
        raise ValueError(f"byzantine is {byzantine}; with {len(gram)} languages it must be 0 to {len(gram) - 3}")
    if count < 3:
        weights[rows] = 1.0 / max(count, 1)
        return weights
    inner = gram[np.ix_(rows, rows)]
    squares = np.diag(inner)
    distances = np.maximum(squares[:, None] + squares - 2.0 * inner, 0.0)
    np.fill_diagonal(distances, 0.0)
    nearest = np.sort(distances, axis=1)[:, 1 : 1 + max(1, count - byzantine - 2)]
    scores = nearest.sum(axis=1)
    least = scores.min()
    weights[rows[np.flatnonzero(scores <= least + _KRUM_TIE * (least + squares))[0]]] = 1.0
    return weights


def _equal_projections(cosines: Float64Array) -> Float64Array:
    """The a (n,) of the least squares solution of cosines @ a = 1; zero where only rounding is left of it."""
    values, vectors = np.linalg.eigh(cosines)
    whole = values > CANCELLED**2 * values.max(initial=0.0)
    found: Float64Array = vectors[:, whole] @ (vectors[:, whole].sum(axis=0) / values[whole])
    return found if np.abs(found).sum() > CANCELLED else np.zeros(len(found))


def _target_cosine(cosines: Float64Array) -> float:
    """GradVac's target: the mean of the cosines (n, n) over pairs of languages, within [0, 0.99]."""
    if len(cosines) < 2:
        return 0.0
    mean = float(cosines[np.triu_indices(len(cosines), k=1)].mean())
    return min(max(mean, 0.0), _HIGHEST_TARGET)
