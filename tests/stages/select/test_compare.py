from __future__ import annotations

import numpy as np
import pytest

from congrad_ray.stages.select.compare import overlaps


def test_overlaps_are_counted_by_language_and_over_all() -> None:
    languages = ["de", "de", "de", "de", "hi", "hi"]
    first = np.array([True, True, False, False, True, False])
    second = np.array([True, False, True, False, False, False])
    scores = np.array([4.0, 3.0, 2.0, 1.0, 1.0, 0.0]), np.array([4.0, 1.0, 3.0, 0.0, 0.5, 0.5])
    everyone, german, hindi = overlaps(languages, (first, second), scores)
    assert (everyone.language, everyone.pairs) == ("*", 6)
    assert (everyone.kept_first, everyone.kept_second, everyone.kept_both) == (3, 2, 1)
    assert everyone.by_chance == pytest.approx(6 * (3 / 6) * (2 / 6))
    assert everyone.share == pytest.approx(1 / 4)
    assert (german.kept_first, german.kept_second, german.kept_both, german.share) == (
        2,
        2,
        1,
        pytest.approx(1 / 3),
    )
    # Ranks 4 3 2 1 against 4 2 3 1: 1 - 6 * 2 / (4 * 15).
    assert german.rank_correlation == pytest.approx(0.8)
    assert hindi.rank_correlation is None, "constant scores have no ranks"
    assert hindi.share == 0.0


def test_selections_that_keep_nothing_agree() -> None:
    nothing = np.zeros(2, dtype=bool)
    (everyone, _) = overlaps(["de", "de"], (nothing, nothing), (np.arange(2.0), np.arange(2.0)))
    assert everyone.share == 1.0 and everyone.by_chance == 0.0
