"""Length-controlled win rates: alpaca_eval's own numbers, another optimiser's, and planted models."""

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from congrad_ray.stages.evaluate import length_control
from congrad_ray.stages.evaluate.bootstrap import bootstrap_interval_of
from congrad_ray.stages.evaluate.length_control import (
    in_deviations,
    length_controlled_interval,
    length_controlled_rate,
)
from congrad_ray.stages.evaluate.statistics import WinRate, win_rates

# From alpaca_eval 0.6.6 with scikit-learn 1.9.1 and pandas 3.1.1: get_length_controlled_winrate on outputs of
# these lengths, with the formula of length_controlled_minimal and {"n_splits": 0}, its C of 100. Seed and the like
# are those of `_made`. It stops at liblinear's tolerance, so the last digits are its own. `chosen`: the same with
# {"n_splits": 5}, where cross-validation chooses C.
ALPACA_EVAL = [
    {"made": (805, 0, 0.0, 1.5, 1.4), "raw": 73.7888198757764, "lc": 51.60043023, "chosen": 51.61542405},
    {"made": (100, 1, 0.5, 0.8, 1.1), "raw": 67.0, "lc": 61.45657568, "chosen": 61.46290356},
    {"made": (20, 2, 0.3, 1.0, 1.3), "raw": 65.0, "lc": 61.31390731, "chosen": 50.0},
    {"made": (12, 3, 0.0, 0.0, 0.7), "raw": 45.83333333, "lc": 33.15125026, "chosen": 50.0},
    {"made": (40, 4, 3.0, 0.0, 1.0), "raw": 97.5, "lc": 97.89269678, "chosen": 96.60141542},
]


def _made(count: int, seed: int, shift: float, push: float, scale: float) -> tuple[Any, Any, Any]:
    """Characters of baseline and model, and wins over two verdicts that like longer answers by `push`."""
    generator = np.random.default_rng(seed)
    baseline = generator.integers(50, 2000, count)
    model = np.maximum(1, (baseline * scale + generator.normal(0, 200, count)).astype(int))
    likely = 1 / (1 + np.exp(-(shift + push * np.tanh((model - baseline) / 300))))
    return baseline, model, (generator.random((count, 2)) < likely[:, None]).mean(1)


@pytest.mark.parametrize("recorded", ALPACA_EVAL, ids=lambda recorded: str(recorded["made"][0]))
def test_rates_are_those_of_alpaca_eval(recorded: dict[str, Any]) -> None:
    baseline, model, wins = _made(*recorded["made"])
    assert 100 * wins.mean() == pytest.approx(recorded["raw"])
    rate = 100 * length_controlled_rate(wins, in_deviations(model - baseline))
    assert rate == pytest.approx(recorded["lc"], abs=0.01)
    if len(wins) >= 100:  # on fewer, cross-validation takes the constant away
        assert rate == pytest.approx(recorded["chosen"], abs=0.05)


@pytest.mark.parametrize("seed", range(6))
def test_the_coefficients_are_where_another_optimiser_finds_them(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count = int(generator.integers(2, 60))
    lengths = np.tanh(generator.normal(size=count))
    wins = generator.choice([0.0, 0.25, 0.5, 1.0], size=count)

    def loss(b: Any) -> float:
        margins = b[0] + b[1] * lengths
        return float(100 * np.sum(np.logaddexp(0, margins) - wins * margins) + np.abs(b).sum())

    found = length_control._coefficients(wins, lengths)
    best = min(
        minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}).fun
        for start in ([0.0, 0.0], [1.0, -1.0])
    )
    assert loss(found) <= best + 1e-3  # corners are rounded by a thousandth


def test_many_samples_at_once_are_each_on_its_own() -> None:
    generator = np.random.default_rng(0)
    wins, lengths = generator.random((7, 25)).round(), generator.normal(size=(7, 25))
    together = length_control._rate(wins, lengths)
    assert together == pytest.approx([length_controlled_rate(*one) for one in zip(wins, lengths, strict=True)])


def test_all_won_none_won_and_no_difference_of_length() -> None:
    lengths = np.linspace(-2, 2, 30)
    assert length_controlled_rate([1.0] * 30, lengths.tolist()) > 0.99
    assert length_controlled_rate([0.0] * 30, lengths.tolist()) < 0.01
    wins = [1.0] * 7 + [0.0] * 3
    assert length_controlled_rate(wins, in_deviations([5] * 10)) == pytest.approx(0.7, abs=1e-3)
    assert in_deviations([5] * 10) == [0.0] * 10 and in_deviations([5]) == [0.0]
    assert in_deviations([0, 2, 4]) == [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="0 wins and 0 differences"):
        length_controlled_rate([], [])


def test_the_interval_draws_wins_and_lengths_together() -> None:
    generator = np.random.default_rng(1)
    lengths = generator.normal(size=120)
    wins = (generator.random(120) < expit(2 * np.tanh(lengths))).astype(float)
    low, high = length_controlled_interval(wins.tolist(), lengths.tolist(), 3)
    assert low < length_controlled_rate(wins.tolist(), lengths.tolist()) < high
    generator = np.random.default_rng(5)  # the same by hand: percentiles of rates of prompts drawn again
    drawn = [generator.integers(0, 120, 120) for _ in range(1000)]
    rates = [length_controlled_rate(wins[places], lengths[places]) for places in drawn]
    assert (low, high) == pytest.approx(np.quantile(rates, [0.025, 0.975]), abs=0.015)
    assert bootstrap_interval_of(np.mean, ([2.0],)) == (2.0, 2.0)


def _compared(seed: int, better: float, padding: float, likes_length: float, count: int = 150) -> WinRate:
    """A model that writes `padding` times as much and is `better` in logits, by a judge that likes length."""
    generator = np.random.default_rng(seed)
    rows, lengths = [], {}
    for number in range(count):
        prompt, language = f"p{number}", ("de", "zh")[number % 2]
        unit = 1000 if language == "de" else 300  # Chinese has fewer characters
        baseline = int(unit * generator.lognormal(0, 0.4))
        model = int(baseline * padding * generator.lognormal(0, 0.3))
        lengths["M_0", prompt], lengths["M_1", prompt] = baseline, model
        likely = expit(better + likes_length * np.tanh((model - baseline) / unit))
        rows += [
            {
                "prompt_id": prompt,
                "language": language,
                "seen": True,
                "model": "M_1",
                "baseline": "M_0",
                "win": float(generator.random() < likely),
                "unreadable": None,
            }
            for _ in range(2)
        ]
    rates = win_rates(rows, lengths, 0, 10)
    assert [rate.language for rate in rates] == ["*", "de", "zh"]
    return rates[0]


@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_only_writes_more_wins_until_length_is_controlled(seed: int) -> None:
    rate = _compared(seed, better=0.0, padding=1.5, likes_length=2.0)
    assert rate.low is not None and rate.lc_low is not None and rate.lc_high is not None
    assert rate.low > 0.5
    assert rate.lc_low < 0.5 < rate.lc_high


@pytest.mark.parametrize("padding", [1.0, 1.5])
def test_a_better_model_wins_at_equal_length_too(padding: float) -> None:
    rate = _compared(0, better=1.0, padding=padding, likes_length=2.0)
    assert rate.lc_low is not None and rate.lc_low > 0.5
