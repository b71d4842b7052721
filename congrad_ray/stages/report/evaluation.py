"""The evaluation's summary as one row per language: before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from congrad_ray.rundir.directory import Folder
from congrad_ray.stages.evaluate.statistics import EVERY_LANGUAGE
from congrad_ray.stages.judge.unreadable import by_reason


@dataclass(frozen=True)
class EvaluationRow:
    """One language (or all seen or unseen ones), a model against its starting point; None where not measured.

    `decoding`: 'greedy' or 'sampled' answers. `score_*`: their mean true score, 0..1 (built-in world); `change_*`
    bound the mean change with 95 % confidence. `tokens_*`: their mean length. The win rate is that of greedy
    answers; it counts ties half and both orders. It is of `judged` prompts; of `asked` comparisons some were
    `readable`, and `unreadable` says why the others were not.
    """

    decoding: str
    language: str
    seen: bool
    model: str
    baseline: str
    prompts: int
    score_before: float | None
    score_after: float | None
    change_low: float | None
    change_high: float | None
    tokens_before: float | None
    tokens_after: float | None
    win_rate: float | None
    win_low: float | None
    win_high: float | None
    judged: int
    asked: int
    readable: int
    unreadable: str


def evaluation_rows(folder: Folder) -> list[EvaluationRow]:
    """By decoding: seen languages and their total, then unseen ones; none where nothing was evaluated."""
    summary = folder.read_json("summary.json")
    if not summary:
        return []
    decodings = sorted({row["decoding"] for row in summary["answers"]})
    return [row for decoding in decodings for row in _rows(summary, decoding)]


def _rows(summary: dict[str, Any], decoding: str) -> list[EvaluationRow]:
    answers = [row for row in summary["answers"] if row["decoding"] == decoding]
    changes = {(r["seen"], r["language"]): r for r in summary["score_changes"] if r["decoding"] == decoding}
    rates = {(row["seen"], row["language"]): row for row in summary["win_rates"]} if decoding == "greedy" else {}
    rows = []
    for seen in (True, False):
        languages = sorted({row["language"] for row in answers if row["seen"] == seen})
        # A total of one language would say nothing new.
        for language in languages + ([EVERY_LANGUAGE] if len(languages) > 1 else []):
            change = changes.get((seen, language), {})
            rate = rates.get((seen, language), {})
            before = _answers(answers, summary["baseline"], seen, language)
            after = _answers(answers, summary["model"], seen, language)
            rows.append(
                EvaluationRow(
                    decoding=decoding,
                    language=language if language != EVERY_LANGUAGE else f"all {'seen' if seen else 'unseen'}",
                    seen=seen,
                    model=summary["model"],
                    baseline=summary["baseline"],
                    prompts=sum(row["count"] for row in after),
                    score_before=change.get("before"),
                    score_after=change.get("after"),
                    change_low=change.get("low"),
                    change_high=change.get("high"),
                    tokens_before=_mean_tokens(before),
                    tokens_after=_mean_tokens(after),
                    win_rate=rate.get("win_rate"),
                    win_low=rate.get("low"),
                    win_high=rate.get("high"),
                    judged=rate.get("prompts", 0),
                    asked=rate.get("asked", 0),
                    readable=rate.get("readable", 0),
                    unreadable=_unreadable(rate.get("unreadable", {})),
                )
            )
    return rows


def _unreadable(counts: dict[str, int] | int) -> str:
    """By reason; older runs know their number alone."""
    return str(counts) if isinstance(counts, int) else by_reason(counts)


def _answers(summaries: list[dict[str, Any]], model: str, seen: bool, language: str) -> list[dict[str, Any]]:
    return [
        row
        for row in summaries
        if row["model"] == model and row["seen"] == seen and language in (row["language"], EVERY_LANGUAGE)
    ]


def _mean_tokens(summaries: list[dict[str, Any]]) -> float | None:
    count = sum(row["count"] for row in summaries)
    return sum(row["mean_tokens"] * row["count"] for row in summaries) / count if count else None
