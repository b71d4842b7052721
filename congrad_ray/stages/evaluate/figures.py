"""What a person sees of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from congrad_ray.rundir.directory import StageFolder
from congrad_ray.stages.evaluate.statistics import EVERY_LANGUAGE
from congrad_ray.stages.judge.figures import unreadable_note
from congrad_ray.stages.view import Figures


def figures(folder: StageFolder) -> list[Figures]:
    """Those of the evaluation; none before the stage is done."""
    summary = folder.read_json("summary.json")
    return evaluation(summary) if summary else []


def evaluation(summary: Mapping[str, Any]) -> list[Figures]:
    """Changes of true scores and win rates by language; `summary` is the evaluation's summary.json."""
    found = [
        table(summary)
        for key, table in (("score_changes", _score_changes), ("win_rates", _win_rates))
        if summary[key]
    ]
    if summary.get("warnings"):
        found.append(Figures("", (), (), warnings=summary["warnings"]))
    return found


def _score_changes(summary: Mapping[str, Any]) -> Figures:
    model, baseline = summary["model"], summary["baseline"]
    rows = [
        (
            *_language_cells(row),
            row["decoding"],
            str(row["count"]),
            f"{row['before']:.3f}",
            f"{row['after']:.3f}",
            f"{row['change']:+.3f}",
            f"{row['low']:+.3f}..{row['high']:+.3f}",
        )
        for row in summary["score_changes"]
    ]
    heads = ("language", "", "decoding", "prompts", baseline, model, "change", "95% interval")
    return Figures(f"true score of {model} against {baseline}", heads, rows, texts=3)


def _win_rates(summary: Mapping[str, Any]) -> Figures:
    rows = []
    for row in summary["win_rates"]:
        known = row["win_rate"] is not None
        rows.append(
            (
                *_language_cells(row),
                str(row["prompts"]),
                f"{row['win_rate']:.1%}" if known else "too few",
                f"{row['low']:.1%}..{row['high']:.1%}" if known else "",
                *_readings(row),
            )
        )
    return Figures(
        f"{summary['model']} against {summary['baseline']}, judged in both orders",
        ("language", "", "prompts", "win rate", "95% interval", "asked", "readable", "unreadable"),
        rows,
        texts=2,
        notes=unreadable_note({_language_cells(row)[0]: row["unreadable"] for row in summary["win_rates"]}),
    )


def _readings(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """How many comparisons were asked for, could be read and could not; older runs know the last alone."""
    unreadable = row["unreadable"]
    if isinstance(unreadable, int):
        return "", "", str(unreadable)
    return str(row["asked"]), str(row["readable"]), str(sum(unreadable.values()))


def _language_cells(row: Mapping[str, Any]) -> tuple[str, str]:
    """The first two cells of an evaluation's row: which language, and whether it is trained on."""
    language = "all" if row["language"] == EVERY_LANGUAGE else row["language"]
    return language, "seen" if row["seen"] else "unseen"
