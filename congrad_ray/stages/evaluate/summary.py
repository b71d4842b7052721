"""All that an evaluation found, as its summary.json and the counters of its manifest have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from congrad_ray.config.recipe import Pair, Recipe
from congrad_ray.stages.evaluate.comparing import Baseline, cost_of, warnings_of
from congrad_ray.stages.evaluate.repetition import REPEATED, repeated_grams
from congrad_ray.stages.evaluate.statistics import (
    EVERY_LANGUAGE,
    ScoreChange,
    WinRate,
    score_changes,
    summarise_answers,
    win_rates,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """`summary` is JSON; `counters` are flat numbers for the screen."""

    summary: dict[str, Any]
    counters: dict[str, Any]

    @property
    def warnings(self) -> list[str]:
        """What a reader of the numbers has to know."""
        found: list[str] = self.summary["warnings"]
        return found


def evaluated(
    recipe: Recipe,
    model: str,
    start: str,
    answers: Sequence[Row],
    baselines: Sequence[Baseline],
    comparisons: Sequence[Row],
    notes: Sequence[str] = (),
) -> Evaluated:
    """What `answers` (ANSWERS of `model` and others) and COMPARISONS of `model` show.

    True scores are compared with those of `start`. `notes` are put before the warnings.
    """
    changes = score_changes(answers, start, model, recipe.seed)
    lengths = {(model, row["prompt_id"]): len(row["response"]) for row in answers if _compared(row, model)}
    for baseline in baselines:
        lengths |= {(baseline.name, prompt): len(row["response"]) for prompt, row in baseline.answers.items()}
    rates = win_rates(comparisons, lengths, recipe.seed, recipe.evaluate.min_prompts)
    names = [baseline.name for baseline in baselines]
    summary = {
        "model": model,
        "baseline": start,
        "baselines": names,
        "answers": [asdict(found) for found in summarise_answers(with_checks(answers))],
        "score_changes": [asdict(change) for change in changes],
        "win_rates": [asdict(rate) for rate in rates],
        "warnings": [*notes, *warnings_of(recipe, comparisons, rates)],
    }
    cost = cost_of(recipe.evaluate, comparisons)
    counters = {**_counters(changes, rates, names), **({} if cost is None else {"cost_usd": round(cost, 6)})}
    return Evaluated(summary, counters)


def _compared(row: Row, model: str) -> bool:
    return bool(row["model"] == model and row["decoding"] == "greedy")


def with_checks(answers: Sequence[Row]) -> list[Row]:
    """The answers with `wrong_language` and `repeated`.

    Languages are looked for as the stage `pair` does by default, whatever the recipe says of that, so that runs
    can be compared; what cannot be told is not wrong.
    """
    from congrad_ray.stages.pair.language_check import LanguageCheck

    settings = Pair()
    languages = sorted({row["language"] for row in answers})
    check = LanguageCheck(languages, settings.language_confidence, settings.language_min_characters)
    verdicts = check.verdicts([row["response"] for row in answers], [row["language"] for row in answers])
    return [
        {**row, "wrong_language": said == "wrong", "repeated": repeated_grams(row["response"]) > REPEATED}
        for row, said in zip(answers, verdicts, strict=True)
    ]


def _counters(changes: Sequence[ScoreChange], rates: Sequence[WinRate], names: Sequence[str]) -> dict[str, Any]:
    """The means over languages; win rates are those against the first baseline."""
    counters: dict[str, Any] = {}
    for change in changes:
        if change.language == EVERY_LANGUAGE:
            name = f"{change.decoding}_{'seen' if change.seen else 'unseen'}"
            counters[f"{name}_before"] = round(change.before, 4)
            counters[f"{name}_after"] = round(change.after, 4)
    everything = [rate for rate in rates if rate.language == EVERY_LANGUAGE]
    for rate in everything:
        if rate.baseline == names[0] and rate.win_rate is not None and rate.lc_win_rate is not None:
            kind = "seen" if rate.seen else "unseen"
            counters[f"win_rate_{kind}"] = round(rate.win_rate, 4)
            counters[f"lc_win_rate_{kind}"] = round(rate.lc_win_rate, 4)
    counters["comparisons"] = sum(rate.asked for rate in everything)
    counters["unreadable_comparisons"] = sum(rate.asked - rate.readable for rate in everything)
    return counters
