"""What a person sees of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from congrad_ray.rundir.directory import StageFolder
from congrad_ray.stages.evaluate.statistics import EVERY_LANGUAGE
from congrad_ray.stages.view import Figures


def figures(folder: StageFolder) -> list[Figures]:
    """Those of the benchmarks; none before the stage is done."""
    summary = folder.read_json("summary.json")
    return benchmark_figures(summary) if summary else []


def benchmark_figures(summary: Mapping[str, Any]) -> list[Figures]:
    """Changes of the tasks and scores of held-out pairs; `summary` is the stage's summary.json."""
    found = []
    if summary["changes"]:
        found.append(_changes(summary))
    if summary["preferences"]:
        found.append(_preferences(summary))
    if summary["warnings"]:
        found.append(Figures("", (), (), warnings=summary["warnings"]))
    return found


def _changes(summary: Mapping[str, Any]) -> Figures:
    rows = [
        (
            row["task"],
            row["language"] or "",
            row["metric"],
            f"{row['count']:,}",
            f"{row['before']:.3f}",
            f"{row['after']:.3f}",
            f"{row['change']:+.3f}",
            "" if row["low"] is None else f"{row['low']:+.3f}..{row['high']:+.3f}",
        )
        for row in summary["changes"]
    ]
    before, after = summary["baseline"], summary["model"]
    heads = ("task", "language", "metric", "documents", before, after, "change", "95% interval")
    return Figures(f"{after} against {before} on public tasks", heads, rows, texts=3)


def _preferences(summary: Mapping[str, Any]) -> Figures:
    rows = []
    plain = {
        (row["language"], row["seen"]): row["logp_accuracy"]
        for row in summary["preferences"]
        if row["model"] == summary["baseline"]
    }
    for row in summary["preferences"]:
        if row["accuracy"] is None:
            continue
        language = "all" if row["language"] == EVERY_LANGUAGE else row["language"]
        rows.append(
            (
                language if row["seen"] else f"{language} (unseen)",
                f"{row['pairs']:,}",
                f"{plain[row['language'], row['seen']]:.1%}",
                f"{row['logp_accuracy']:.1%}",
                f"{row['accuracy']:.1%}",
                f"{row['accuracy_low']:.1%}..{row['accuracy_high']:.1%}",
                f"{row['margin']:+.3f}",
                f"{row['margin_low']:+.3f}..{row['margin_high']:+.3f}",
            )
        )
    before, after = summary["baseline"], summary["model"]
    heads = ("language", "pairs", before, after, "accuracy", "95% interval", "margin", "95% interval")
    return Figures(
        f"pairs held out: {after} against {before}",
        heads,
        rows,
        caption=f"{before}, {after}: share with log p(chosen) > log p(rejected); accuracy: share with a margin of "
        "the implicit reward above 0",
    )
