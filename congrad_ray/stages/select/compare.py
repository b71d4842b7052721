"""How far two selections of the same pairs agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from congrad_ray.stages.evaluate.statistics import EVERY_LANGUAGE
from congrad_ray.stages.select.gram import Float64Array
from congrad_ray.stages.sketch.audit import rank_correlation


@dataclass(frozen=True)
class Overlap:
    """Of the pairs of one language, or of all, that both selections scored."""

    language: str
    pairs: int
    kept_first: int
    kept_second: int
    kept_both: int
    by_chance: float  # what two selections of these sizes would have in common if they were independent
    rank_correlation: float | None  # Spearman's, of the scores; None where one of them is constant

    @property
    def share(self) -> float:
        """Kept by both, of what either keeps (Jaccard index); 1 where neither keeps anything."""
        either = self.kept_first + self.kept_second - self.kept_both
        return self.kept_both / either if either else 1.0


def overlaps(
    languages: list[str],
    kept: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    scores: tuple[Float64Array, Float64Array],
) -> list[Overlap]:
    """Two selections of the same N pairs, of all (language '*') and by language; `kept` and `scores` (N,) each."""
    of = np.asarray(languages, dtype=np.str_)
    groups = {EVERY_LANGUAGE: np.ones(len(of), dtype=np.bool_)}
    groups.update({str(language): of == language for language in np.unique(of)})
    found = []
    for language, members in groups.items():
        first, second = (mask[members] for mask in kept)
        one, two = (values[members] for values in scores)
        correlation = rank_correlation(one, two)
        found.append(
            Overlap(
                language,
                len(first),
                int(first.sum()),
                int(second.sum()),
                int((first & second).sum()),
                float(first.sum()) * float(second.sum()) / max(1, len(first)),
                correlation if np.isfinite(correlation) else None,
            )
        )
    return found
