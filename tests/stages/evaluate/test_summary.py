"""What an evaluation's summary.json has: its keys are read by the report, and by others."""

import json
from typing import Any

import pytest

from congrad_ray.config.recipe import Recipe
from congrad_ray.stages.evaluate.comparing import Baseline, wanted_comparisons
from congrad_ray.stages.evaluate.summary import evaluated, with_checks

GERMAN = "Das ist eine lange Antwort auf eine gute Frage. Sie sagt noch etwas mehr, als gefragt war."
ENGLISH = "This is a long answer to a good question. It says somewhat more than it was asked to say."


def _answer(prompt: str, model: str, text: str, **more: Any) -> dict[str, Any]:
    row = {"prompt_id": prompt, "model": model, "response": text, "answer_id": f"{model} {prompt}", "seen": True}
    row |= {"language": "de", "decoding": "greedy", "true_score": None, "response_tokens": 9, "truncated": False}
    return row | {"prompt": [{"role": "user", "content": "?"}]} | more


def test_the_wrong_language_and_loops_are_found() -> None:
    rows = [
        _answer("p1", "M_0", GERMAN),
        _answer("p2", "M_0", ENGLISH),
        _answer("p3", "M_0", ENGLISH, language="en"),
        _answer("p4", "M_0", "Ja."),  # too short to tell
        _answer("p5", "M_0", "Das ist gut so. " * 12),
    ]
    found = with_checks(rows)
    assert [row["wrong_language"] for row in found] == [False, True, False, False, False]
    assert [row["repeated"] for row in found] == [False, False, False, False, True]


@pytest.mark.parametrize("names", [["M_0"], ["M_0", "M_1", "references"]])
def test_the_summary_has_these_keys_and_a_rate_for_each_baseline(names: list[str]) -> None:
    recipe = Recipe.model_validate(
        {"name": "t", "prompts": {"languages": ["de"]}, "evaluate": {"min_prompts": 10}}
    )
    prompts = [f"p{number}" for number in range(12)]
    own = [_answer(prompt, "M_2", GERMAN) for prompt in prompts]
    others = [_answer(prompt, name, GERMAN[:40]) for name in ("M_0", "M_1") for prompt in prompts]
    baselines = [
        Baseline(name, {row["prompt_id"]: row for row in others if row["model"] == name})
        for name in names
        if name != "references"
    ]
    if "references" in names:  # to too few of the prompts
        few = {prompt: {"answer_id": prompt, "response": "Ja, gern."} for prompt in prompts[:3]}
        baselines.append(Baseline("references", few))
    comparisons = [
        {**row, "win": 1.0 if row["order"] == "model_first" else 0.5, "unreadable": None, "output": ""}
        for row in wanted_comparisons(own, baselines)
    ]
    found = evaluated(recipe, "M_2", "M_0", [*own, *others], baselines, comparisons, ["a note"])
    summary = json.loads(json.dumps(found.summary))
    assert list(summary) == [
        *("model", "baseline", "baselines", "answers", "score_changes", "win_rates", "warnings")
    ]
    assert (summary["model"], summary["baseline"], summary["baselines"]) == ("M_2", "M_0", names)
    assert list(summary["answers"][0]) == [
        *("model", "language", "seen", "decoding", "count", "true_score", "mean_tokens", "truncated_share"),
        *("wrong_language_share", "repeated_share"),
    ]
    assert {row["model"] for row in summary["answers"]} == {"M_0", "M_1", "M_2"}
    assert [(row["baseline"], row["language"]) for row in summary["win_rates"]] == [
        (name, language) for language in ("*", "de") for name in names
    ]
    assert list(summary["win_rates"][0]) == [
        *("baseline", "language", "seen", "prompts", "asked", "readable", "unreadable", "ties"),
        *("win_rate", "low", "high", "lc_win_rate", "lc_low", "lc_high", "consistent"),
    ]
    rate = summary["win_rates"][0]
    assert (rate["prompts"], rate["asked"], rate["ties"], rate["consistent"]) == (12, 24, 12, 0.0)
    assert rate["win_rate"] == 0.75 and rate["lc_win_rate"] == pytest.approx(0.75, abs=0.001)
    assert found.counters["win_rate_seen"] == 0.75 and found.counters["comparisons"] == len(comparisons)
    assert found.warnings[0] == "a note"
    if "references" in names:
        last = summary["win_rates"][-1]
        assert (last["prompts"], last["win_rate"], last["lc_win_rate"], last["lc_low"]) == (3, None, None, None)
        assert "de against references (3)" in found.warnings[1]
    else:
        assert len(found.warnings) == 1
