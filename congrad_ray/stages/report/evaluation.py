"""What was measured of a model: true scores, win rates, answers, benchmarks and held-out preferences.

Every number may be missing: of an older run, of a run without a judge, of prompts without a true score.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from congrad_ray.rundir.directory import Folder
from congrad_ray.stages.evaluate.statistics import EVERY_LANGUAGE

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """A language, or all ('*') of those trained on (`seen`) or of the others."""

    language: str
    seen: bool

    @property
    def name(self) -> str:
        """The language's tag, or 'all seen'."""
        if self.language != EVERY_LANGUAGE:
            return self.language
        return f"all {'seen' if self.seen else 'unseen'}"

    @property
    def total(self) -> bool:
        return self.language == EVERY_LANGUAGE


@dataclass(frozen=True)
class Interval:
    """A number between its 95 % bounds, which are None where they are not known."""

    value: float
    low: float | None
    high: float | None

    def verdict(self, no_change: float) -> str:
        """'up' or 'down' only where the interval leaves out `no_change`; else 'soft'."""
        if self.low is not None and self.low > no_change:
            return "up"
        return "down" if self.high is not None and self.high < no_change else "soft"


@dataclass(frozen=True)
class ScoreRow:
    """Mean true scores, 0..1, of the same prompts before and after, and their change."""

    place: Place
    count: int
    before: float
    after: float
    change: Interval


@dataclass(frozen=True)
class RateRow:
    """Win rates against one baseline, a tie counting half; None of too few prompts.

    `asked` comparisons, of which `readable` have a verdict, `ties` of them a tie; the others are counted by reason
    in `unreadable` (or there is their number, in older runs).
    """

    place: Place
    prompts: int
    asked: int
    readable: int
    unreadable: Mapping[str, int] | int
    raw: Interval | None
    length_controlled: Interval | None
    ties: int | None
    consistent: float | None


_Row = TypeVar("_Row", ScoreRow, RateRow)


@dataclass(frozen=True)
class AnswerRow:
    """Means over the answers of a model before and after; shares in 0..1, None where not measured."""

    place: Place
    count: int
    before: Mapping[str, float | None]
    after: Mapping[str, float | None]


ANSWER_MEASURES = {
    "mean_tokens": "tokens",
    "truncated_share": "truncated",
    "wrong_language_share": "wrong language",
    "repeated_share": "repeated text",
}


@dataclass(frozen=True)
class EvaluationFacts:
    """evaluation/summary.json."""

    model: str
    baseline: str
    scores: Mapping[str, list[ScoreRow]] = field(default_factory=dict)  # by decoding, sampled answers first
    rates: Mapping[str, list[RateRow]] = field(default_factory=dict)  # by baseline
    answers: Mapping[str, list[AnswerRow]] = field(default_factory=dict)  # by decoding
    warnings: Sequence[str] = ()

    def total(self, seen: bool) -> ScoreRow | None:
        """The change of sampled answers, or of greedy ones, over all seen or unseen languages."""
        totals = [total_of(rows, seen) for rows in self.scores.values()]
        return next((found for found in totals if found is not None), None)


@dataclass(frozen=True)
class TaskRow:
    """A benchmark task in one language: before, after, and the change of its metric."""

    task: str
    metric: str
    language: str
    """'*': over all; '' for a task of no language."""
    count: int | None
    before: float
    after: float
    change: Interval | None
    """None of what is no number."""

    @property
    def name(self) -> str:
        """The language's tag, 'all', or the task's own name where it is of no language."""
        return "all" if self.language == EVERY_LANGUAGE else self.language or self.task


@dataclass(frozen=True)
class PreferenceRow:
    """Held-out preference pairs: share where the model is for the chosen response, and the implicit margin."""

    model: str
    place: Place
    pairs: int
    accuracy: Interval | None
    """None for the model that the reward is against."""
    logp_accuracy: float | None
    """By log-probabilities alone."""
    margin: Interval | None


@dataclass(frozen=True)
class BenchmarkFacts:
    """benchmarks/summary.json."""

    model: str
    baseline: str
    tasks: Sequence[TaskRow] = ()
    preferences: Sequence[PreferenceRow] = ()
    warnings: Sequence[str] = ()


def evaluation_facts(folder: Folder) -> EvaluationFacts | None:
    """What the evaluation's summary holds; None where nothing was evaluated."""
    summary = folder.read_json("summary.json")
    if not summary:
        return None
    model, baseline = summary["model"], summary.get("baseline", "M_0")
    answers, changes, rates = (summary.get(name) or [] for name in ("answers", "score_changes", "win_rates"))
    baselines = dict.fromkeys(row.get("baseline", baseline) for row in rates)
    decodings = sorted({row["decoding"] for row in changes}, reverse=True)
    return EvaluationFacts(
        model,
        baseline,
        {name: _ordered([_score(row) for row in changes if row["decoding"] == name]) for name in decodings},
        {
            name: _ordered([_rate(row) for row in rates if row.get("baseline", baseline) == name])
            for name in baselines
        },
        {name: _answers(answers, model, baseline, name) for name in sorted({row["decoding"] for row in answers})},
        summary.get("warnings") or [],
    )


def benchmark_facts(folder: Folder) -> BenchmarkFacts | None:
    """What the benchmarks' summary holds; None where none was run."""
    summary = folder.read_json("summary.json")
    if not summary:
        return None
    return BenchmarkFacts(
        summary["model"],
        summary.get("baseline", "M_0"),
        [_task(row) for row in summary.get("changes") or []],
        sorted(
            (_preference(row) for row in summary.get("preferences") or []),
            key=lambda row: (*_order(row.place), row.model),
        ),
        summary.get("warnings") or [],
    )


def _order(place: Place) -> tuple[bool, bool, str]:
    return not place.seen, place.total, place.language


def _ordered(rows: list[Any]) -> list[Any]:
    """Seen languages and their total, then unseen ones; a total of one language would say nothing new."""
    single = Counter(row.place.seen for row in rows if not row.place.total)
    kept = [row for row in rows if not row.place.total or single[row.place.seen] > 1]
    return sorted(kept, key=lambda row: _order(row.place))


def total_of(rows: Sequence[_Row], seen: bool) -> _Row | None:
    """The row over all seen or unseen languages, or that of the only one."""
    found = [row for row in rows if row.place.seen == seen]
    return found[-1] if found else None


def _place(row: Row) -> Place:
    return Place(row["language"], bool(row.get("seen", True)))


def _interval(row: Row, value: str, low: str, high: str) -> Interval | None:
    """None where the value is not known: missing, null or not a number."""
    numbers = [row.get(name) for name in (value, low, high)]
    known = [number if number is not None and math.isfinite(number) else None for number in numbers]
    return None if known[0] is None else Interval(known[0], known[1], known[2])


def _score(row: Row) -> ScoreRow:
    change = Interval(row["change"], row.get("low"), row.get("high"))
    return ScoreRow(_place(row), row["count"], row["before"], row["after"], change)


def _rate(row: Row) -> RateRow:
    return RateRow(
        _place(row),
        row["prompts"],
        row["asked"],
        row["readable"],
        row["unreadable"],
        _interval(row, "win_rate", "low", "high"),
        _interval(row, "lc_win_rate", "lc_low", "lc_high"),
        row.get("ties"),
        row.get("consistent"),
    )


def _answers(answers: Sequence[Row], model: str, baseline: str, decoding: str) -> list[AnswerRow]:
    rows = [row for row in answers if row["decoding"] == decoding]
    found = []
    for seen in (True, False):
        languages = sorted({row["language"] for row in rows if bool(row["seen"]) == seen})
        for language in [*languages, EVERY_LANGUAGE]:
            place = Place(language, seen)
            here = [row for row in rows if row["seen"] == seen and language in (row["language"], EVERY_LANGUAGE)]
            before, after = ([row for row in here if row["model"] == name] for name in (baseline, model))
            if after:
                count = sum(row["count"] for row in after)
                found.append(AnswerRow(place, count, _means(before), _means(after)))
    return _ordered(found)


def _means(rows: Sequence[Row]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in ANSWER_MEASURES:
        known = [row for row in rows if row.get(name) is not None and row["count"]]
        count = sum(row["count"] for row in known)
        found[name] = sum(row[name] * row["count"] for row in known) / count if count else None
    return found


def _task(row: Row) -> TaskRow:
    change = _interval(row, "change", "low", "high")
    return TaskRow(
        row["task"], row["metric"], row["language"] or "", row.get("count"), row["before"], row["after"], change
    )


def _preference(row: Row) -> PreferenceRow:
    return PreferenceRow(
        row["model"],
        _place(row),
        row["pairs"],
        _interval(row, "accuracy", "accuracy_low", "accuracy_high"),
        row.get("logp_accuracy"),
        _interval(row, "margin", "margin_low", "margin_high"),
    )
