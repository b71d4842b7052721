import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from congrad_ray.judging.scores import expected_score, read_score, score_token_ids


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Good answer.\nScore: 4", 4.0),
        ("**Score:** 3", 3.0),
        ("Score: **2**.", 2.0),
        ("score = 3.5", 3.5),
        ("Note : 3,5", 3.5),
        ("Punktzahl: 5/5", 5.0),
        ("Bewertung: 4 von 5 Punkten", 4.0),
        ("Puntuación: 1", 1.0),
        ("Pontuação: 0", 0.0),
        ("Оценка: 2", 2.0),
        ("评分：４", 4.0),
        ("得点：３", 3.0),
        ("अंक: ४", 4.0),
        ("الدرجة: ٣", 3.0),
        ("Score: 1\nOn second thought.\nScore: 2", 2.0),
        ("4", 4.0),
        (" 4/5.\n", 4.0),
        ("Score: 7/5", None),
        ("Score: 4/10", None),
        ("Score: 7", None),
        ("Score: -1", None),
        ("Score: 4 or 5", None),
        ("Score: 3-4", None),
        ("Score: NaN", None),
        ("Score: <0-5>", None),
        ("Score: 4\nNote: it makes 2 mistakes", 4.0),
        ("Score: 3\nScore: 4 or 5", None),
        ("Score:\n4", None),
        ("I would give it a 4", None),
        ("4 5", None),
        ("44", None),
        ("", None),
    ],
)
def test_read_score(text: str, score: float | None) -> None:
    assert read_score(text) == score


@given(st.text())
def test_read_score_is_none_or_in_range_for_any_text(text: str) -> None:
    for candidate in (text, f"Score: {text}"):
        score = read_score(candidate)
        assert score is None or 0 <= score <= 5


def test_expected_score_is_the_normalised_mean_over_all_spellings() -> None:
    tokens = [[0], [1], [2], [3], [4], [5, 50]]
    logprobs = {3: math.log(0.2), 5: math.log(0.1), 50: math.log(0.1), 99: math.log(0.6)}
    score, mass = expected_score(logprobs, tokens)
    assert mass == pytest.approx(0.4)
    assert score == pytest.approx((3 * 0.2 + 5 * 0.2) / 0.4)


def test_expected_score_without_mass_is_none_and_not_zero() -> None:
    assert expected_score({99: 0.0}, [[k] for k in range(6)]) == (None, 0.0)
    assert expected_score({0: -math.inf}, [[k] for k in range(6)]) == (None, 0.0)
    assert expected_score({0: math.nan}, [[k] for k in range(6)])[0] is None


def test_score_token_ids_finds_both_spellings_and_nothing_longer() -> None:
    vocabulary = {str(k): k for k in range(10)} | {f"Ġ{k}": 20 + k for k in range(6)} | {"40": 40, "Ġ40": 41}
    assert score_token_ids(vocabulary) == [[k, 20 + k] for k in range(6)]


def test_score_token_ids_names_the_missing_digit_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"no token for 4, 5.*judge.method: sampled"):
        score_token_ids({str(k): k for k in range(4)})
