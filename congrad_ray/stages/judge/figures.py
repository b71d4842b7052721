"""What a person sees of judging."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow.compute as pc

from congrad_ray.rundir.directory import Folder, StageFolder
from congrad_ray.stages.judge.unreadable import by_reason
from congrad_ray.stages.view import Figures, Step


def figures(folder: StageFolder) -> list[Figures]:
    """The judgements by language; none before the stage is done."""
    manifest = folder.manifest()
    if manifest is None or "judgements" not in manifest.counters:
        return []
    found = [judgements(manifest.counters)]
    if manifest.counters.get("judges"):
        found.append(judges(manifest.counters))
    if manifest.counters.get("agreement"):
        found.append(agreement(manifest.counters["agreement"]))
    return found


def judgements(counters: Mapping[str, Any]) -> Figures:
    """Judgements asked, readable and unreadable by language; `counters` are of the stage's manifest."""
    masses = counters.get("mean_mass") is not None
    heads = ("language", "asked", "readable", "unreadable", "score")
    rows = []
    for language, row in counters["judgements"].items():
        unreadable = sum(row["unreadable"].values())
        cells = [language, f"{row['asked']:,}", f"{row['readable']:,}", f"{unreadable:,}"]
        cells.append("" if row["mean_score"] is None else f"{row['mean_score']:.2f}")
        if masses:
            cells.append("" if row["mean_mass"] is None else f"{row['mean_mass']:.2g}")
        rows.append(cells)
    return Figures(
        "judgements",
        (*heads, "mass") if masses else heads,
        rows,
        caption="score: the mean; mass: mean probability of the score tokens" if masses else "score: the mean",
        notes=[
            *unreadable_note({language: row["unreadable"] for language, row in counters["judgements"].items()}),
            *([f"cost: ${counters['cost_usd']:.2f}"] if counters.get("cost_usd") is not None else []),
        ],
    )


def judges(counters: Mapping[str, Any]) -> Figures:
    """Several judges beside each other, each in its own units."""
    rows = [
        [
            name,
            f"{row['asked']:,}",
            f"{row['readable']:,}",
            "" if row["mean_score"] is None else f"{row['mean_score']:.2f}",
            f"{row['prompt_tokens'] + row['output_tokens']:,}",
            "" if row["cost_usd"] is None else f"${row['cost_usd']:.2f}",
        ]
        for name, row in counters["judges"].items()
    ]
    return Figures("judges", ("judge", "asked", "readable", "score", "tokens", "cost"), rows, brief=False)


def agreement(counts: Mapping[str, Any]) -> Figures:
    """How far the judges agree, by language."""
    rows = [
        [
            language,
            "" if row["tau"] is None else f"{row['tau']:.2f}",
            f"{row['prompts']:,}",
            f"{row['left_out']:,}",
        ]
        for language, row in counts.items()
    ]
    return Figures(
        "agreement of the judges",
        ("language", "tau", "prompts", "left out"),
        rows,
        caption="tau: mean Kendall's tau-b over prompts; left out: prompts with ties everywhere, or one response",
    )


def unreadable_note(counts: Mapping[str, Any]) -> list[str]:
    """What could not be read, by language and reason, in one line; older runs know only how many."""
    found = [
        f"{language} {by_reason(row)}" for language, row in counts.items() if row and not isinstance(row, int)
    ]
    return [f"unreadable by reason: {'; '.join(found)}"] if found else []


def _readable(folder: Folder) -> Counter[str] | None:
    if not folder.files(".parquet"):
        return None
    table = folder.read_table(["language", "score"])
    return Counter(table.filter(pc.is_valid(table["score"]))["language"].to_pylist())


STEP = Step("readable", "readable judgements", "of responses", _readable, "responses")
