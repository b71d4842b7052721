"""Cosines between languages and of pairs with a direction, from inner products alone.

All inner products and norms are of *sketches*. Inner products of sketches estimate those of the gradients;
dividing them by the exact norms |u| would mix two geometries, and the ratio could leave [-1, 1]. With the
sketches' own norms every cosine is the true cosine between two sketch vectors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from congrad_ray.surgery.directions import Float64Array, check_gram, pcgrad_coefficients

# Squared length of a direction, relative to the parts that it is the sum of, below which only rounding is
# left.
_CANCELLED = 1e-12


def _cosines_of_gram(gram: Float64Array) -> Float64Array:
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    scale = np.outer(norms, norms)
    return np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0.0)


def cosine_matrix(gram: Float64Array) -> Float64Array:
    """Cosines (L, L) between the languages' gradients; a gradient of norm zero has cosine 0 with all."""
    return _cosines_of_gram(check_gram(gram))


def projected_cosine_matrix(gram: Float64Array, seed: int) -> Float64Array:
    """Cosines (L, L) between the gradients after PCGrad with the same `seed`."""
    gram = check_gram(gram)
    coefficients = pcgrad_coefficients(gram, seed)
    projected = coefficients @ gram @ coefficients.T
    # A gradient projected away entirely leaves rounding, whose cosines would be noise.
    parts = np.einsum("ik,kl,il->i", np.abs(coefficients), np.abs(gram), np.abs(coefficients))
    gone = np.diag(projected) <= _CANCELLED * parts
    projected[gone, :] = 0.0
    projected[:, gone] = 0.0
    return _cosines_of_gram(projected)


def _cosine(dots: Float64Array, norms: Float64Array, direction_norms: Float64Array | float) -> Float64Array:
    scale = norms * direction_norms
    cosine = np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0.0)
    worst = int(np.argmax(np.abs(cosine))) if len(cosine) else 0
    if len(cosine) and abs(cosine[worst]) > 1.01:
        raise ValueError(
            f"row {worst} has cosine {cosine[worst]:.4g}; norms must be those of the sketches, not |u|"
        )
    return cosine


def _check_pairs(dots: Float64Array, norms: Float64Array, languages: int) -> tuple[Float64Array, Float64Array]:
    dots = np.asarray(dots, dtype=np.float64)
    norms = np.asarray(norms, dtype=np.float64)
    if dots.ndim != 2 or dots.shape[1] != languages or norms.shape != (dots.shape[0],):
        raise ValueError(
            f"dots has shape {dots.shape} and norms {norms.shape}; with {languages} languages they must be "
            f"(pairs, {languages}) and (pairs,)"
        )
    return dots, norms


def pair_scores(
    dots: Float64Array, norms: Float64Array, gram: Float64Array, weights: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Cosine and inner product of each pair's sketch s_n with the direction sum_l weights[l] * g_l, (N,)
    each.

    `dots` (N, L) holds <s_n, g_l>, `norms` (N,) the norms |s_n| of the sketches, `gram` (L, L) <g_k, g_l>;
    the direction itself is never formed. A pair or a direction of norm zero gives cosine 0.
    """
    gram = check_gram(gram)
    weights = np.asarray(weights, dtype=np.float64)
    dots, norms = _check_pairs(dots, norms, len(gram))
    if weights.shape != (len(gram),):
        raise ValueError(f"weights has shape {weights.shape}; it must be ({len(gram)},)")
    products = dots @ weights
    squared = float(weights @ gram @ weights)
    parts = float(np.abs(weights) @ np.abs(gram) @ np.abs(weights))
    direction_norm = float(np.sqrt(squared)) if squared > _CANCELLED * parts else 0.0
    return _cosine(products, norms, direction_norm), products


def own_language_cosine(
    dots: Float64Array, norms: Float64Array, gram: Float64Array, language_index: NDArray[np.integer]
) -> Float64Array:
    """Cosine (N,) of each pair's sketch with the original gradient of its own language.

    `language_index` (N,) gives each pair's row of `gram`; the rest as in `pair_scores`.
    """
    gram = check_gram(gram)
    dots, norms = _check_pairs(dots, norms, len(gram))
    own = dots[np.arange(len(dots)), language_index]
    return _cosine(own, norms, np.sqrt(np.maximum(np.diag(gram), 0.0))[language_index])
