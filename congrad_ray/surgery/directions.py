"""One direction from the gradients of several languages, worked out from their Gram matrix alone.

A direction is a vector w of coefficients: it stands for sum_l w[l] * g_l over the languages' original
gradients g_l. Signs follow the pair gradients u: g_l points where the loss of language l goes down.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]


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


def pcgrad_coefficients(gram: Float64Array, seed: int) -> Float64Array:
    """PCGrad's projected gradients as rows of coefficients over the original ones, (L, L).

    For each i, over the others k in an order drawn from `seed`:
    g_i <- g_i - min(<g_i, g_k> / |g_k|^2, 0) * g_k, with g_k the original gradient (Yu et al. 2020,
    arXiv 2001.06782, algorithm 1). A g_k of norm zero conflicts with nothing and is skipped. Row i times the
    original gradients is the projected g_i.

    The result depends on the order of the languages in `gram` through the draw: sort them before.
    """
    gram = check_gram(gram)
    languages = len(gram)
    generator = np.random.default_rng(seed)
    coefficients = np.eye(languages)
    for i in range(languages):
        for k in generator.permutation(languages):
            if k == i or gram[k, k] <= 0.0:
                continue
            # <current g_i, g_k> through the coefficients of the current g_i.
            inner = coefficients[i] @ gram[:, k]
            coefficients[i, k] -= min(inner / gram[k, k], 0.0)
    return coefficients


def pcgrad(gram: Float64Array, seed: int) -> Float64Array:
    """Coefficients (L,) of PCGrad's direction: the sum of the projected gradients of
    `pcgrad_coefficients`."""
    return pcgrad_coefficients(gram, seed).sum(axis=0)


def mean_direction(gram: Float64Array) -> Float64Array:
    """Coefficients (L,) of the plain mean of the languages' gradients, without surgery: 1/L each."""
    languages = len(check_gram(gram))
    return np.full(languages, 1.0 / languages)
