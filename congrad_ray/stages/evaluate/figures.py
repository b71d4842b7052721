"""What a person sees of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from congrad_ray.rundir.directory import StageFolder
from congrad_ray.stages.evaluate.statistics import EVERY_LANGUAGE
from congrad_ray.stages.judge.figures import unreadable_note
from congrad_ray.stages.view import Figures


def figures(folder: StageFolder) -> list[Figures]:
    """Those of the evaluation; none before the stage is done."""
    summary = folder.read_json("summary.json")
    return evaluation(summary) if summary else []


def evaluation(summary: Mapping[str, Any], trained: bool = True) -> list[Figures]:
    """Changes of true scores, win rates and what answers are like, by language; `summary` is its summary.json.

    `trained`: whether it says which languages were trained on.
    """
    if not trained:
        known = ("answers", "score_changes", "win_rates")
        summary = {**summary, **{name: [{**row, "seen": None} for row in summary[name]] for name in known}}
    found = [_score_changes(summary)] if summary["score_changes"] else []
    for baseline in dict.fromkeys(_baseline(row, summary) for row in summary["win_rates"]):
        rates = [row for row in summary["win_rates"] if _baseline(row, summary) == baseline]
        found += [_win_rates(summary["model"], baseline, rates), _comparisons(summary["model"], baseline, rates)]
    if any("repeated_share" in row for row in summary.get("answers", ())):
        found.append(_answers(summary))
    if summary.get("warnings"):
        found.append(Figures("", (), (), warnings=summary["warnings"]))
    return found


def _baseline(row: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """What a rate is against; older runs have one baseline, and do not say so in each row."""
    return str(row.get("baseline", summary["baseline"]))


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


def _win_rates(model: str, baseline: str, rates: Sequence[Mapping[str, Any]]) -> Figures:
    rows = []
    for row in rates:
        known = row["win_rate"] is not None
        rows.append(
            (
                *_language_cells(row),
                str(row["prompts"]),
                f"{row['win_rate']:.1%}" if known else "too few",
                _between(row["low"], row["high"]),
                "" if row.get("lc_win_rate") is None else f"{row['lc_win_rate']:.1%}",
                _between(row.get("lc_low"), row.get("lc_high")),
            )
        )
    return Figures(
        f"win rate of {model} against {baseline}, judged in both orders",
        ("language", "", "prompts", "win rate", "95% interval", "equal length", "95% interval"),
        rows,
        texts=2,
        caption="equal length: controlled for the difference of the answers' lengths, as in AlpacaEval 2",
    )


def _comparisons(model: str, baseline: str, rates: Sequence[Mapping[str, Any]]) -> Figures:
    rows = [
        (
            *_language_cells(row),
            *_readings(row),
            str(row.get("ties", "")),
            "" if row["consistent"] is None else f"{row['consistent']:.0%}",
        )
        for row in rates
    ]
    return Figures(
        f"comparisons of {model} with {baseline}",
        ("language", "", "asked", "readable", "unreadable", "ties", "consistent"),
        rows,
        texts=2,
        caption="consistent: prompts with the same verdict in both orders",
        notes=unreadable_note({_language_cells(row)[0]: row["unreadable"] for row in rates}),
    )


def _answers(summary: Mapping[str, Any]) -> Figures:
    names = ("truncated_share", "wrong_language_share", "repeated_share")
    rows = [
        (
            row["model"],
            *_language_cells(row),
            row["decoding"],
            str(row["count"]),
            f"{row['mean_tokens']:.0f}",
            *(f"{row[name]:.0%}" for name in names),
        )
        for row in summary["answers"]
    ]
    heads = ("model", "language", "", "decoding", "count", "tokens", "cut off", "wrong", "repeats")
    caption = "wrong: in another language than the prompt; repeats: more of the text is said twice than not"
    return Figures("answers", heads, rows, texts=4, brief=False, caption=caption)


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.1%}..{high:.1%}"


def _readings(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """How many comparisons were asked for, could be read and could not; older runs know the last alone."""
    unreadable = row["unreadable"]
    if isinstance(unreadable, int):
        return "", "", str(unreadable)
    return str(row["asked"]), str(row["readable"]), str(sum(unreadable.values()))


def _language_cells(row: Mapping[str, Any]) -> tuple[str, str]:
    """The first two cells of an evaluation's row: which language, and whether it is trained on."""
    language = "all" if row["language"] == EVERY_LANGUAGE else row["language"]
    return language, {True: "seen", False: "unseen", None: ""}[row["seen"]]
