import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from congrad_ray.stages.judge.scores import expected_score, read_score, score_token_ids

CASES = Path(__file__).resolve().parents[3].parent / "shared" / "cases" / "05-judge-second-label" / "outputs.jsonl"
LANGUAGES = ("en", "de", "fr", "es", "pt", "it", "ru", "zh", "ja", "ko", "hi", "ar", "sw")


@pytest.mark.parametrize(
    ("language", "text", "score"),
    [
        ("en", "Good answer.\nScore: 4", 4.0),
        ("en", "Good answer. Score: 4", 4.0),
        ("en", "**Score:** 3", 3.0),
        ("en", "Score: **2**.", 2.0),
        ("en", "score = 3.5", 3.5),
        ("en", "My final score (0-5): 3", 3.0),
        ("en", "- Overall score: 4/5, well done", 4.0),
        ("fr", "Note : 3,5", 3.5),
        ("de", "Punktzahl: 5/5", 5.0),
        ("de", "Bewertung: 4 von 5 Punkten", 4.0),
        ("es", "Puntuación: 1", 1.0),
        ("pt-BR", "Pontuação: 0", 0.0),
        ("ru", "Оценка: 2 балла", 2.0),
        ("zh-Hant", "評分：４分", 4.0),
        ("ja", "得点：３", 3.0),
        ("hi", "अंक: ४", 4.0),
        ("ar", "الدرجة: ٣٫٥", 3.5),
        ("sw", "Score: 3", 3.0),  # the English rubric
        ("de", "Score: 3", 3.0),
        ("en", "4", 4.0),
        ("en", " 4/5.\n", 4.0),
        # Not one number of the right range.
        ("en", "Score: 7/5", None),
        ("en", "Score: 4/10", None),
        ("en", "Score: 4 (out of 10)", None),
        ("en", "Score: 7", None),
        ("en", "Score: -1", None),
        ("en", "Score: .5", None),
        ("en", "Score: 4,000", None),
        ("en", "Score: 4 or 5", None),
        ("en", "Score: 3 or four", None),
        ("en", "Score: 3-4", None),
        ("en", "Score: NaN", None),
        ("en", "Score: <0-5>", None),
        ("en", "Score:\n4", None),
        ("en", "I would give it a 4", None),
        ("en", "4 5", None),
        ("en", "44", None),
        ("en", "", None),
        # Another label beside the score's.
        ("en", "Score: 2\nNote: 5 words are misspelt", 2.0),
        ("en", "Score: 4\nNote: it makes 2 mistakes", 4.0),
        ("de", "Score: 4\nNote: 2", 4.0),
        ("fr", "Score: 4\nNote : 2", None),
        ("fr", "Note : 4\nPoints : 1 pour la clarté", 4.0),
        ("fr", "Note : 4\nNote : 2 fautes", None),
        ("es", "Puntuación: 4\nNota: 1", 4.0),
        ("es", "Nota: 3", 3.0),
        ("es", "Nota: 3 errores", None),
        ("ru", "Балл: 1\nОценка: 5", 5.0),
        ("en", "Points: 1 for clarity\nPoints: 1 for depth", None),
        ("en", "Points: 1\nPoints: 1", None),
        ("en", "Points: 3/5", 3.0),
        ("en", "Relevance score: 1\nClarity score: 1\nFinal score: 2", 2.0),
        ("en", "Relevance score: 1", None),
        ("en", "Score: 1 for relevance", None),
        # Statements that disagree, and one that is repeated.
        ("en", "Score: 1\nOn second thought.\nScore: 2", None),
        ("en", "Score: 3\nScore: 4 or 5", None),
        ("en", "Rating: 4\nScore: 2", None),
        ("en", "Rating: 4/5\nScore: 4", 4.0),
        # Marks and JSON.
        ("en", "I settle on [[3]].", 3.0),
        ("en", "Rating: [[3]]", 3.0),
        ("en", "[[3]] or [[4]]", None),
        ("en", "Score: <2>", 2.0),
        ("en", "Score: (5)", 5.0),
        ("en", '{"Score": 3, "remarks": "2 slips"}', 3.0),
        ("en", '```json\n{"final_score": "4/5"}\n```', 4.0),
        ("de", '{"bewertung": 4.5}', 4.5),
        ("en", '{"clarity": 1, "depth": 1}', None),
        ("en", '{"score": true}', None),
        ("en", '{"score": 3} Score: 4', None),
        ("en", '{"score": 3, "rating": 4}', None),
    ],
)
def test_read_score(language: str, text: str, score: float | None) -> None:
    assert read_score(text, language) == score


@pytest.mark.skipif(not CASES.exists(), reason="no cases beside the repository")
def test_reported_judgements_are_read_right_or_not_at_all() -> None:
    for line in CASES.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        found = {read_score(case["text"], language) for language in LANGUAGES}
        assert found <= {case["want"], None}, case
        assert case["want"] in found, case


@given(st.text(), st.sampled_from(LANGUAGES))
def test_read_score_is_none_or_in_range_for_any_text(text: str, language: str) -> None:
    for candidate in (text, f"Score: {text}", f'{{"score": {text}}}', f"[[{text}]]"):
        score = read_score(candidate, language)
        assert score is None or 0 <= score <= 5


def test_long_texts_are_read_in_no_time_and_deep_json_is_no_score() -> None:
    before = time.monotonic()
    for part in ("{", "[[1", "Score: 4\n", "-" * 50 + "\n", '"', ". ", "(", "1,"):
        read_score(part * 20_000, "en")
    assert read_score('{"score":' * 100_000 + "1" + "}" * 100_000, "en") is None
    assert time.monotonic() - before < 5


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


def test_expected_score_does_not_depend_on_the_mass() -> None:
    tokens = [[k] for k in range(6)]
    for shift in (0.0, -5.0, -2000.0):
        score, mass = expected_score({3: math.log(0.3) + shift, 4: math.log(0.7) + shift}, tokens)
        assert score == pytest.approx(3.7)
        assert mass == pytest.approx(math.exp(shift))


def test_score_token_ids_finds_all_spellings_and_nothing_longer() -> None:
    vocabulary = {str(k): k for k in range(10)} | {f"Ġ{k}": 20 + k for k in range(6)} | {"40": 40, "Ġ40": 41}
    assert score_token_ids(vocabulary) == [[k, 20 + k] for k in range(6)]
    other_scripts = {"▁4": 50, "٤": 51, "४": 52, "４": 53, "④": 54}
    assert score_token_ids(vocabulary | other_scripts)[4] == [4, 24, 50, 51, 52, 53]


def test_score_token_ids_names_the_missing_digit_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"no token for 4, 5.*judge.method: sampled"):
        score_token_ids({str(k): k for k in range(4)})
