from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from congrad_ray.config.names import Band
from congrad_ray.stages.select.keep import in_band, keep_above, keep_top_fraction, keep_within_tokens


def kept_ids(scores: list[float], languages: list[str], ids: list[str], fraction: float) -> set[str]:
    mask = keep_top_fraction(np.array(scores), ids, fraction, languages)
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
    mask = keep_top_fraction(scores, [f"pair-{row}" for row in range(len(rows))], fraction, languages)
    for language in set(languages):
        inside = np.array([other == language for other in languages])
        assert mask[inside].sum() == math.ceil(round(fraction * inside.sum(), 6))
        if (~mask & inside).any():
            assert scores[mask & inside].min() >= scores[~mask & inside].max()


def test_rounding_of_the_fraction_keeps_no_extra_pair() -> None:
    assert 0.07 * 100 > 7  # what floating point makes of it
    ids = [str(row) for row in range(100)]
    assert keep_top_fraction(np.arange(100.0), ids, 0.07).sum() == 7


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, math.nan])
def test_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction to keep is"):
        keep_top_fraction(np.zeros(2), ["a", "b"], fraction)


def test_without_groups_the_best_of_all_stay() -> None:
    mask = keep_top_fraction(np.array([0.1, 0.9, 0.8, 0.7]), list("abcd"), 0.5)
    assert mask.tolist() == [False, True, True, False]


def test_a_threshold_keeps_what_is_above_it() -> None:
    assert keep_above(np.array([0.1, 0.0, -0.2]), list("abc"), 0.0).tolist() == [True, False, False]


def test_a_token_budget_is_filled_from_the_best_and_ends_at_the_first_that_does_not_fit() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.8])
    ids = ["a", "c", "d", "e", "b"]
    # By score and id: a (5), b (1), c (6), d (9), e (2).
    tokens = [5, 6, 9, 2, 1]
    for budget, expected in ((4, ""), (5, "a"), (11, "ab"), (12, "abc"), (20, "abc"), (23, "abcde")):
        mask = keep_within_tokens(scores, ids, tokens, budget)
        assert {identifier for identifier, kept in zip(ids, mask, strict=True) if kept} == set(expected)


def test_bands_are_ends_and_middle_of_each_group() -> None:
    ids = list("abcdefgh")
    groups = ["de"] * 5 + ["hi"] * 3
    scores = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.1, 0.2, 0.3])

    def kept(band: Band, fraction: float, groups: list[str] | None) -> str:
        mask = keep_top_fraction(in_band(scores, ids, band, groups), ids, fraction, groups)
        return "".join(identifier for identifier, inside in zip(ids, mask, strict=True) if inside)

    assert kept("highest", 0.4, groups) == "abgh"
    assert kept("lowest", 0.4, groups) == "defg"
    assert kept("middle", 0.6, groups) == "bcdfg"  # of f and h, as near, the first id
    assert kept("middle", 0.25, None) == "de"
    tokens = [4] * 8
    mask = keep_within_tokens(in_band(scores, ids, "lowest"), ids, tokens, 9)
    assert mask.tolist() == [False] * 5 + [True, True, False]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.sampled_from([0.2, 0.5, 0.9]))
def test_the_middle_leaves_out_as_many_on_both_sides(values: list[int], fraction: float) -> None:
    scores, ids = np.array(values, dtype=np.float64), [f"{row:02}" for row in range(len(values))]
    mask = keep_top_fraction(in_band(scores, ids, "middle"), ids, fraction)
    ranked = np.lexsort((ids, -scores))
    inside = np.flatnonzero(mask[ranked])
    assert (np.diff(inside) == 1).all()
    assert abs(inside[0] - (len(ids) - 1 - inside[-1])) <= 1
    # Whatever makes the same ranking is the same.
    np.testing.assert_array_equal(mask, keep_top_fraction(in_band(np.exp(scores), ids, "middle"), ids, fraction))


def test_scores_that_are_not_finite_are_named() -> None:
    scores = np.array([0.1, np.nan, 0.3, np.inf])
    ids = ["pair-a", "pair-b", "pair-c", "pair-d"]
    for rule in (
        lambda: keep_top_fraction(scores, ids, 0.5),
        lambda: keep_above(scores, ids, 0.0),
        lambda: keep_within_tokens(scores, ids, [1] * 4, 2),
        lambda: in_band(scores, ids, "lowest"),
    ):
        with pytest.raises(ValueError, match=r"2 scores are not finite: pair-b \(nan\), pair-d \(inf\)"):
            rule()


def test_lengths_and_repeated_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores of shape \(2,\) but 1 ids"):
        keep_top_fraction(np.zeros(2), ["a"], 0.5)
    with pytest.raises(ValueError, match="1 groups but 2 ids"):
        keep_top_fraction(np.zeros(2), ["a", "b"], 0.5, ["de"])
    with pytest.raises(ValueError, match="3 numbers of tokens but 2 ids"):
        keep_within_tokens(np.zeros(2), ["a", "b"], [1, 2, 3], 5)
    with pytest.raises(ValueError, match="'a' occurs more than once"):
        keep_above(np.zeros(2), ["a", "a"], 0.5)
