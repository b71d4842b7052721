from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from congrad_ray.surgery.keep import keep_top_fraction


def kept_ids(scores: list[float], languages: list[str], ids: list[str], fraction: float) -> set[str]:
    mask = keep_top_fraction(np.array(scores), languages, ids, fraction)
    assert mask.dtype == np.bool_
    return {identifier for identifier, kept in zip(ids, mask, strict=True) if kept}


def test_the_best_of_each_language_stay() -> None:
    scores = [0.9, 0.1, -0.5, -0.2, 0.8]
    languages = ["de", "de", "hi", "hi", "de"]
    assert kept_ids(scores, languages, list("abcde"), 0.5) == {"a", "e", "d"}


def test_ties_go_by_id_whatever_the_order_of_the_rows() -> None:
    ids = ["p3", "p1", "p4", "p2"]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        assert kept_ids([1.0] * 4, ["de"] * 4, [ids[row] for row in order], 0.5) == {"p1", "p2"}


@given(
    st.lists(st.tuples(st.sampled_from(["de", "hi", "sw"]), st.integers(-3, 3)), max_size=40),
    st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7, 1.0]),
)
def test_counts_and_order_within_each_language(rows: list[tuple[str, int]], fraction: float) -> None:
    languages = [language for language, _ in rows]
    scores = np.array([score for _, score in rows], dtype=np.float64)
    mask = keep_top_fraction(scores, languages, [f"pair-{row}" for row in range(len(rows))], fraction)
    for language in set(languages):
        inside = np.array([other == language for other in languages])
        assert mask[inside].sum() == math.ceil(round(fraction * inside.sum(), 6))
        if (~mask & inside).any():
            assert scores[mask & inside].min() >= scores[~mask & inside].max()


def test_rounding_of_the_fraction_keeps_no_extra_pair() -> None:
    assert 0.07 * 100 > 7  # what floating point makes of it
    ids = [str(row) for row in range(100)]
    assert keep_top_fraction(np.arange(100.0), ["de"] * 100, ids, 0.07).sum() == 7


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, math.nan])
def test_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction to keep is"):
        keep_top_fraction(np.zeros(2), ["de", "de"], ["a", "b"], fraction)


def test_scores_that_are_not_finite_are_named() -> None:
    scores = np.array([0.1, np.nan, 0.3, np.inf])
    with pytest.raises(ValueError, match=r"2 scores are not finite: pair-b \(nan\), pair-d \(inf\)"):
        keep_top_fraction(scores, ["de"] * 4, ["pair-a", "pair-b", "pair-c", "pair-d"], 0.5)


def test_lengths_and_repeated_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="2 languages and 1 ids"):
        keep_top_fraction(np.zeros(2), ["de", "de"], ["a"], 0.5)
    with pytest.raises(ValueError, match="'a' occurs more than once"):
        keep_top_fraction(np.zeros(2), ["de", "de"], ["a", "a"], 0.5)
