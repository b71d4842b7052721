"""Scores of several judges and their agreement, against SciPy and by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import kendalltau, zscore

from congrad_ray.config.judging import compared
from congrad_ray.stages.judge.combine import (
    Scores,
    agreement_of,
    agreement_weights,
    disagreeing,
    scores_of,
)
from congrad_ray.stages.judge.schema import JUDGEMENT_SAMPLES


def _samples(rows: list[dict[str, Any]]) -> pa.Table:
    empty = dict.fromkeys(JUDGEMENT_SAMPLES.names)
    return pa.Table.from_pylist(
        [{**empty, "language": "en", "prompt_id": "p", "judgement_id": "", **row} for row in rows],
        JUDGEMENT_SAMPLES,
    )


def _many(judges: int, seed: int) -> tuple[Scores, dict[tuple[str, int], np.ndarray[Any, Any]]]:
    """Random scores of 40 prompts' 4 responses in two languages, some unread."""
    random = np.random.default_rng(seed)
    rows, values = [], {}
    for prompt in range(40):
        language = ("de", "sw")[prompt % 2]
        matrix = random.integers(0, 4, (4, judges)).astype(float)
        matrix[random.random(matrix.shape) < 0.1] = np.nan
        values[language, prompt] = matrix
        for response, judge in itertools.product(range(4), range(judges)):
            score = matrix[response, judge]
            about = {"prompt_id": f"p{prompt}", "response_id": f"r{prompt}.{response}", "language": language}
            rows.append({**about, "judge": f"j{judge}", "score": None if math.isnan(score) else score})
    random.shuffle(rows)  # type: ignore[arg-type]
    return scores_of(_samples(rows), [f"j{judge}" for judge in range(judges)]), values


@pytest.mark.parametrize("judges", [2, 3])
def test_agreement_is_the_mean_of_scipys_tau_b(judges: int) -> None:
    scores, values = _many(judges, judges)
    for language, found in scores.agreement().items():
        taus = []
        for (tag, _), matrix in values.items():
            pairs = []
            for one, two in itertools.combinations(range(judges), 2):
                known = ~np.isnan(matrix[:, [one, two]]).any(axis=1)
                if known.sum() > 1:
                    pairs.append(kendalltau(matrix[known, one], matrix[known, two]).statistic)
            pairs = [tau for tau in pairs if not math.isnan(tau)]
            if tag == language and pairs:
                taus.append(np.mean(pairs))
        assert found == {
            "tau": pytest.approx(np.mean(taus), abs=1e-4),
            "prompts": len(taus),
            "left_out": 20 - len(taus),
        }


@pytest.mark.parametrize(
    ("values", "tau"),
    [
        ([[1, 10], [2, 20], [3, 30]], 1.0),
        ([[1, 3], [2, 2], [3, 1]], -1.0),
        ([[1, 1], [1, 2], [2, 3]], 2 / math.sqrt(2 * 3)),
        ([[1, 1], [1, 2], [1, 3]], None),  # ties everywhere with one of them
        ([[1, 1]], None),
        ([[1, math.nan], [2, 1], [3, math.nan]], None),
        ([[1, 1, 1], [2, 2, 1]], 1.0),  # of the pairs that have one
    ],
)
def test_tau_of_a_prompt(values: list[list[float]], tau: float | None) -> None:
    found = agreement_of(np.array(values, float))
    assert found == (None if tau is None else pytest.approx(tau))


def test_scores_of_several_are_means_of_standard_scores() -> None:
    scores, values = _many(2, 5)
    matrix = np.concatenate([values[key] for key in sorted(values, key=lambda key: key[1])])
    ids = [f"r{prompt}.{response}" for prompt in range(40) for response in range(4)]
    with np.errstate(all="ignore"), pytest.warns(RuntimeWarning, match="empty slice"):
        expected = dict(zip(ids, np.nanmean(zscore(matrix, axis=0, nan_policy="omit"), axis=1), strict=True))
    found = dict(zip(scores.response_ids, scores.combined(), strict=True))
    assert found.keys() == expected.keys()
    for identifier, value in expected.items():
        assert found[identifier] == pytest.approx(value, nan_ok=True)
    assert scores.asked.tolist() == [2] * 160
    assert scores.readable.sum() == (~np.isnan(matrix)).sum()


def test_a_judge_that_says_always_the_same_adds_nothing_and_one_alone_keeps_its_units() -> None:
    rows = [
        {"response_id": name, "judge": judge, "score": score}
        for name, one in (("a", 1.0), ("b", 3.0))
        for judge, score in (("x", one), ("y", 4.0))
    ]
    scores = scores_of(_samples(rows), ["x", "y"])
    assert scores.combined().tolist() == [-0.5, 0.5]
    alone = scores_of(_samples([row for row in rows if row["judge"] == "x"]), ["x"])
    assert alone.combined().tolist() == [1.0, 3.0]
    assert scores.agreement() == {"en": {"tau": None, "prompts": 0, "left_out": 1}}


def test_a_comparison_counts_for_both_and_both_orders_are_averaged() -> None:
    def row(one: str, two: str, score: float | None) -> dict[str, Any]:
        return {"response_id": one, "compared_with": two, "judge": "x", "score": score}

    # a beats b in both orders; a and c in one order each; b and c: a tie, and unreadable.
    samples = _samples(
        [
            row("a", "b", 5.0),
            row("a", "b", 5.0),
            row("a", "c", 5.0),
            row("a", "c", 0.0),
            row("b", "c", 2.5),
            row("b", "c", None),
        ]
    )
    scores = scores_of(samples, ["x"])
    assert scores.response_ids == ["a", "b", "c"]
    assert scores.combined().tolist() == [5 * 3 / 4, 5 * 0.5 / 3, 5 * 1.5 / 3]
    assert scores.readable.tolist() == [4, 3, 3] and scores.asked.tolist() == [4, 4, 4]


def test_languages_that_disagree_and_what_their_gradients_count() -> None:
    agreement = {
        "de": {"tau": 0.5, "prompts": 3, "left_out": 0},
        "fr": {"tau": 0.2, "prompts": 3, "left_out": 0},
        "sw": {"tau": -0.4, "prompts": 3, "left_out": 0},
        "th": {"tau": None, "prompts": 0, "left_out": 3},
    }
    assert disagreeing(agreement, 0.5) == {"fr": 0.2, "sw": -0.4, "th": None}
    assert agreement_weights(agreement, 0.5) == {"fr": 0.2, "sw": 0.05, "th": 0.05}
    assert disagreeing(agreement, None) == agreement_weights(agreement, None) == {}


@pytest.mark.parametrize("responses", range(1, 9))
def test_which_responses_are_compared(responses: int) -> None:
    every = compared(responses, None)
    assert sorted(every) == list(itertools.combinations(range(responses), 2))
    for comparisons in range(max(1, responses - 1), len(every) + 1):
        some = compared(responses, comparisons)
        assert list(some) == list(every)[:comparisons]
        times = [sum(place in pair for pair in some) for place in range(responses)]
        assert min(times) >= 1 and max(times) - min(times) <= 2
