from typing import Any

import numpy as np
import pytest

from congrad_ray.stages.evaluate.bootstrap import bootstrap_interval
from congrad_ray.stages.evaluate.statistics import WinRate, score_changes, summarise_answers
from congrad_ray.stages.evaluate.statistics import win_rates as win_rates_of


def _answer(
    prompt: str, language: str, seen: bool, model: str, score: float | None, **more: Any
) -> dict[str, Any]:
    row = {"prompt_id": prompt, "language": language, "seen": seen, "model": model, "true_score": score}
    checks = {"truncated": False, "wrong_language": False, "repeated": False}
    return {**row, "decoding": "greedy", "response_tokens": 10, **checks} | more


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(generator.normal(1.0, 2.0, 60).tolist(), trial, 0.9, 300)
        covered += low <= 1.0 <= high
    assert 0.83 <= covered / 200 <= 0.95


def test_bootstrap_interval_is_seeded_and_refuses_nothing() -> None:
    values = np.random.default_rng(0).normal(size=20).tolist()
    assert bootstrap_interval(values, 3) == bootstrap_interval(values, 3)
    assert bootstrap_interval(values, 3) != bootstrap_interval(values, 4)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([])


def test_score_changes_are_paired_by_prompt() -> None:
    answers = [
        _answer("p1", "de", True, "M_0", 0.2),
        _answer("p1", "de", True, "M_1", 0.6),
        _answer("p2", "fr", True, "M_0", 0.4),
        _answer("p2", "fr", True, "M_1", 0.4),
        _answer("p3", "fr", True, "M_0", 1.0),  # M_1's answer is missing: the prompt does not count
        _answer("p4", "hi", False, "M_0", 0.5),
        _answer("p4", "hi", False, "M_1", 0.25),
        _answer("p5", "hi", False, "M_0", None),
        _answer("p5", "hi", False, "M_1", 0.9),
    ]
    changes = {(change.language, change.seen): change for change in score_changes(answers, "M_0", "M_1")}
    assert set(changes) == {("*", True), ("*", False), ("de", True), ("fr", True), ("hi", False)}
    seen = changes["*", True]
    assert (seen.count, seen.before, seen.after, seen.change) == (2, *map(pytest.approx, (0.3, 0.5, 0.2)))
    assert seen.low <= seen.change <= seen.high
    assert changes["hi", False].change == pytest.approx(-0.25)


def test_summaries_keep_models_and_decodings_apart() -> None:
    answers = [
        _answer("p1", "de", True, "M_0", 0.2, truncated=True),
        _answer("p2", "de", True, "M_0", 0.4, response_tokens=20, wrong_language=True),
        _answer("p1", "de", True, "M_0", 0.9, decoding="sampled"),
        _answer("p1", "de", True, "M_1", None),
    ]
    found = {(row.model, row.decoding): row for row in summarise_answers(answers)}
    greedy = found["M_0", "greedy"]
    assert (greedy.count, greedy.mean_tokens, greedy.truncated_share) == (2, 15, 0.5)
    assert (greedy.wrong_language_share, greedy.repeated_share) == (0.5, 0.0)
    assert greedy.true_score == pytest.approx(0.3)
    assert found["M_1", "greedy"].true_score is None


def _comparison(
    prompt: str, order: str, win: float | None, language: str = "de", seen: bool = True
) -> dict[str, Any]:
    row = {"prompt_id": prompt, "order": order, "win": win, "language": language, "seen": seen}
    row |= {"model": "M_1", "baseline": "M_0"}
    return {**row, "unreadable": "truncated" if win is None else None}


def win_rates(rows: list[dict[str, Any]], min_prompts: int = 1) -> list[WinRate]:
    lengths = {(row[who], row["prompt_id"]): 10 for row in rows for who in ("model", "baseline")}
    return win_rates_of(rows, lengths, 0, min_prompts)


def test_win_rate_averages_orders_first_and_counts_what_was_unreadable() -> None:
    rows = [
        _comparison("p1", "model_first", 1.0),
        _comparison("p1", "baseline_first", 0.0),  # the judge prefers the first place: half a win
        _comparison("p2", "model_first", 1.0),
        _comparison("p2", "baseline_first", None),
        _comparison("p3", "model_first", None),
        _comparison("p3", "baseline_first", None),
        _comparison("p4", "model_first", 1.0),
        _comparison("p4", "baseline_first", 1.0),
        _comparison("p5", "model_first", 0.0, "hi", False),
    ]
    rates = {(rate.language, rate.seen): rate for rate in win_rates(rows)}
    german = rates["de", True]
    assert german.prompts == 3
    assert (german.asked, german.readable, german.unreadable) == (8, 5, {"truncated": 3})
    assert german.win_rate == pytest.approx((0.5 + 1 + 1) / 3)
    assert german.consistent == 0.5
    assert german == rates["*", True].__class__(**{**rates["*", True].__dict__, "language": "de"})
    assert rates["hi", False].win_rate == 0.0
    assert rates["hi", False].consistent is None


def test_win_rate_of_nothing_readable_is_none() -> None:
    (rate, _) = win_rates([_comparison("p", "model_first", None)])
    assert (rate.win_rate, rate.low, rate.high, rate.unreadable) == (None, None, None, {"truncated": 1})


def test_there_is_no_win_rate_of_too_few_prompts_only_their_number() -> None:
    rows = [_comparison(f"p{number}", "model_first", 1.0 if number < 3 else None) for number in range(16)]
    everything, german = win_rates(rows, min_prompts=4)
    assert (everything.win_rate, everything.low, everything.high) == (None, None, None)
    assert (german.prompts, german.asked, german.readable, german.unreadable) == (3, 16, 3, {"truncated": 13})
    assert win_rates(rows, min_prompts=3)[0].win_rate == 1.0
