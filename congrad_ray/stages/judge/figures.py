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
    return [judgements(manifest.counters)] if manifest and "judgements" in manifest.counters else []


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
        notes=unreadable_note({language: row["unreadable"] for language, row in counters["judgements"].items()}),
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
