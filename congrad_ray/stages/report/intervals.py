"""How far two groups lie apart in a measure, with an interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054  # of 95 % confidence


@dataclass(frozen=True)
class Separation:
    """The chance that a member of the first group has the greater value, a tie counting half.

    0.5 is no difference. `low` and `high` bound it with 95 % confidence.
    """

    chance: float
    low: float
    high: float


def separation(
    values: NDArray[np.float64], first: NDArray[np.bool_], strata: NDArray[np.str_]
) -> Separation | None:
    """Of N values, those where `first` (N,) is true against the others of the same stratum (N,).

    The area under the ROC curve (Mann-Whitney) of each stratum, weighted by its number of comparisons, with
    DeLong's variance (DeLong et al. 1988). Strata where a group has fewer than two members are left out; None
    where none is left.
    """
    from scipy.stats import rankdata

    weighted, variance, comparisons = 0.0, 0.0, 0
    for stratum in np.unique(strata):
        here = strata == stratum
        ones, others = values[here & first], values[here & ~first]
        m, n = len(ones), len(others)
        if m < 2 or n < 2:
            continue
        ranks = rankdata(np.concatenate([ones, others]))
        # The share of the other group that each member exceeds.
        of_ones = (ranks[:m] - rankdata(ones)) / n
        of_others = 1.0 - (ranks[m:] - rankdata(others)) / m
        weighted += m * n * float(of_ones.mean())
        variance += (m * n) ** 2 * float(of_ones.var(ddof=1) / m + of_others.var(ddof=1) / n)
        comparisons += m * n
    if not comparisons:
        return None
    chance, half = weighted / comparisons, _Z * variance**0.5 / comparisons
    return Separation(chance, max(0.0, chance - half), min(1.0, chance + half))
