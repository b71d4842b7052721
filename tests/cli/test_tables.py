"""Tables of twelve languages on a narrow screen: a line for each row, and nothing cut off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from congrad_ray.cli import display
from congrad_ray.cli.plan_tables import memory_table, plan_table
from congrad_ray.config.profile import load_profile
from congrad_ray.config.recipe import load_recipe, recipe_of_run
from congrad_ray.pipeline.plan import known_lengths, make_plan, where_it_runs
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.estimate import Planned
from congrad_ray.planning.shapes import read_shapes
from congrad_ray.stages.evaluate.figures import evaluation
from congrad_ray.stages.judge.figures import judgements
from congrad_ray.stages.select.figures import selection
from congrad_ray.stages.view import Figures

from .test_cli import DEMO, OLD

LANGUAGES = ["ar", "de", "el", "en", "es", "fr", "hi", "pt-BR", "ru", "tr", "uk", "zh-Hant"]

Shown = Callable[[Callable[[], None]], list[str]]


@pytest.fixture(params=[80, 120])
def shown(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shown:
    monkeypatch.setattr(display.console, "_width", request.param)

    def lines(show: Callable[[], None]) -> list[str]:
        show()
        text = capsys.readouterr().out
        assert "…" not in text
        found = text.splitlines()
        assert max(map(len, found)) <= request.param
        return found

    return lines


def show_all(figures: list[Figures]) -> None:
    for one in figures:
        display.show_figures(one)


def rows_of(lines: list[str]) -> list[str]:
    """The languages that rows begin with: one that went on on a second line would be missing or twice."""
    return [line.split()[0] for line in lines if line.split() and line.split()[0] in ("all", *LANGUAGES)]


def test_a_selection(shown: Shown) -> None:
    row = {
        "pairs": 12_345,
        "kept": 6_172,
        "mean_cosine": -0.123,
        "conflicting": 0.4567,
        "cosine_with_direction": 0.87,
        "in_direction": True,
    }
    matrix = [[1.0 if i == j else -0.25 for j in range(12)] for i in range(12)]
    summary: dict[str, Any] = {
        "per_language": {language: row for language in LANGUAGES},
        "languages": LANGUAGES,
        "cosine_before": matrix,
        "cosine_after": matrix,
    }
    lines = shown(lambda: show_all(selection(summary)))
    languages = rows_of(lines)
    assert len(languages) % 12 == 0 and languages[:12] == LANGUAGES


def test_judgements(shown: Shown) -> None:
    row = {
        "asked": 24_000,
        "readable": 23_456,
        "unreadable": {"truncated": 500, "no_score": 44},
        "mean_score": 3.21,
        "mean_mass": 0.0123,
    }
    lines = shown(lambda: show_all([judgements({"mean_mass": 0.1, "judgements": dict.fromkeys(LANGUAGES, row)})]))
    assert rows_of(lines)[:12] == LANGUAGES


def test_an_evaluation(shown: Shown) -> None:
    change = {"decoding": "sampled", "count": 100, "before": 2.345, "after": 2.567, "change": 0.222}
    rate = {"prompts": 100, "win_rate": 0.5678, "asked": 200, "readable": 190, "unreadable": {"no_verdict": 10}}
    rate |= {"low": 0.45, "high": 0.65, "lc_win_rate": 0.5432, "lc_low": 0.41, "lc_high": 0.66, "ties": 7}
    answer = {"model": "M_1", "decoding": "sampled", "count": 100, "mean_tokens": 123.4, "truncated_share": 0.05}
    answer |= {"seen": False, "wrong_language_share": 0.1, "repeated_share": 0.02}
    summary = {
        "model": "M_1",
        "baseline": "M_0",
        "score_changes": [
            {"language": name, "seen": False, **change, "low": 0.123, "high": 0.345} for name in LANGUAGES
        ],
        "win_rates": [
            {"baseline": "M_0", "language": name, "seen": False, "consistent": 0.8, **rate} for name in LANGUAGES
        ],
        "answers": [{"language": name, **answer} for name in LANGUAGES],
    }
    lines = shown(lambda: show_all(evaluation(summary)))
    assert rows_of(lines)[:36] == LANGUAGES * 3
    older = {**rate, "unreadable": 10}  # one baseline, and nothing but the raw rate
    for name in ("lc_win_rate", "lc_low", "lc_high", "ties", "asked", "readable"):
        del older[name]
    summary["win_rates"] = [{"language": name, "seen": False, "consistent": None, **older} for name in LANGUAGES]
    del summary["answers"]
    assert rows_of(shown(lambda: show_all(evaluation(summary))))[:36] == LANGUAGES * 3


def test_a_plan(shown: Shown) -> None:
    recipe, profile, assumptions = load_recipe(DEMO), load_profile("aws-spot"), Assumptions()
    there_is = where_it_runs(recipe, profile, assumptions)
    lengths = known_lengths(recipe, assumptions, None)
    plan = make_plan(Planned(recipe, profile, read_shapes(recipe), lengths, assumptions), there_is)

    def show() -> None:
        display.show(plan_table(plan, "a plan"))
        display.show(memory_table(plan))

    lines = shown(show)
    assert sum(line.startswith("generate ") for line in lines) == 2


def test_a_status(shown: Shown) -> None:
    from congrad_ray.rundir.directory import RunDirectory

    recipe = recipe_of_run((OLD / "run" / "recipe.yaml").read_bytes(), "recipe.yaml")
    lines = shown(lambda: display.show_run(RunDirectory.open(OLD / "run"), recipe))
    assert sum(" done " in line for line in lines) == 10
