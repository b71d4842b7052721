"""Gradients as their Gram matrix tells of them: lengths, cosines, vectors with the same inner products."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]

# Length of a gradient, relative to the longest one, up to which it counts as zero.
NEGLIGIBLE = 1e-10
# Length of a combination of gradients, relative to the parts that it is the sum of, up to which only rounding is
# left. The Gram matrix holds squares, so its rounding of 1e-16 is one of 1e-8 in lengths.
CANCELLED = 1e-6


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


def lengths_of(gram: Float64Array) -> Float64Array:
    """Lengths (L,) of the gradients."""
    return np.sqrt(np.maximum(np.diag(gram), 0.0))


def counted(gram: Float64Array) -> NDArray[np.bool_]:
    """Mask (L,) of the gradients that do not count as zero."""
    lengths = lengths_of(gram)
    return lengths > NEGLIGIBLE * lengths.max()


def counted_cosines(gram: Float64Array) -> tuple[NDArray[np.intp], Float64Array]:
    """The n gradients that do not count as zero, as rows of the Gram matrix, and their cosines (n, n)."""
    rows = np.flatnonzero(counted(gram))
    lengths = lengths_of(gram)[rows]
    return rows, gram[np.ix_(rows, rows)] / np.outer(lengths, lengths)


def unit_vectors(cosines: Float64Array) -> Float64Array:
    """Unit vectors (n, n), one a row, that have the given cosines (n, n).

    Gradients are taken as their lengths times these. The same from the Gram matrix itself would lose short
    gradients beside long ones to rounding. A dimension in which they have no more than rounding is left empty: a
    solver could blow it up to a solution.
    """
    values, vectors = np.linalg.eigh(cosines)
    return vectors * np.sqrt(np.where(values > CANCELLED**2 * values.max(initial=0.0), values, 0.0))


def counted_vectors(gram: Float64Array) -> tuple[NDArray[np.intp], Float64Array]:
    """The n gradients that do not count as zero, and vectors (n, n) with their inner products, the longest of
    length 1."""
    rows, cosines = counted_cosines(gram)
    lengths = lengths_of(gram)[rows]
    return rows, (lengths / lengths.max(initial=0.0))[:, None] * unit_vectors(cosines)
