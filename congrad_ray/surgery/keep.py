"""Rules that turn scores into a selection."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from congrad_ray.surgery.directions import Float64Array


def keep_top_fraction(
    scores: Float64Array, languages: Sequence[str], ids: Sequence[str], fraction: float
) -> NDArray[np.bool_]:
    """Keep the ceil(fraction * n) pairs with the highest scores of each language, n being its number of
    pairs.

    Returns a mask (N,) in the order of the arguments. Equal scores go by id in ascending order, so the
    selection does not depend on the order of the rows. Raises ValueError for a fraction outside (0, 1],
    lengths that differ, an id that occurs twice, and scores that are not finite (naming the ids).
    """
    scores = np.asarray(scores, dtype=np.float64)
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"the fraction to keep is {fraction}; it must be above 0 and at most 1")
    if not scores.shape == (len(languages),) == (len(ids),):
        raise ValueError(
            f"{scores.shape} scores, {len(languages)} languages and {len(ids)} ids; give one of each a pair"
        )
    if len(set(ids)) != len(ids):
        repeated, _ = Counter(ids).most_common(1)[0]
        raise ValueError(f"the id {repeated!r} occurs more than once; ids must name one pair each")
    bad = np.flatnonzero(~np.isfinite(scores)).tolist()
    if bad:
        named = ", ".join(f"{ids[row]} ({scores[row]})" for row in bad[:10])
        raise ValueError(f"{len(bad)} scores are not finite: {named}; look for NaN in these pairs' sketches")
    kept = np.zeros(len(ids), dtype=np.bool_)
    rows_of: dict[str, list[int]] = {}
    for row, language in enumerate(languages):
        rows_of.setdefault(language, []).append(row)
    for rows in rows_of.values():
        # 0.07 * 100 is 7.000000000000001 in floating point; that must not make it 8.
        count = math.ceil(fraction * len(rows) - 1e-9)
        kept[sorted(rows, key=lambda row: (-scores[row], ids[row]))[:count]] = True
    return kept
