"""What a person sees of a selection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from congrad_ray.rundir.directory import Folder, StageFolder
from congrad_ray.stages.view import Figures, Step


def figures(folder: StageFolder) -> list[Figures]:
    """Those of the selection; none before the stage is done."""
    summary = folder.read_json("summary.json")
    return selection(summary) if summary else []


def selection(summary: Mapping[str, Any]) -> list[Figures]:
    """What was kept by language, the languages' cosines, and advice; `summary` is the selection's summary.json."""
    rows = [
        (
            language,
            f"{row['pairs']:,}",
            f"{row['kept']:,}",
            f"{row['mean_cosine']:.3f}",
            f"{row['conflicting']:.1%}",
            f"{row['cosine_with_direction']:.2f}" if row["in_direction"] else "not in it",
        )
        for language, row in summary["per_language"].items()
    ]
    kept = Figures(
        "selection",
        ("language", "pairs", "kept", "cosine", "conflicting", "language's cosine"),
        rows,
        caption="cosine: mean of the pairs with the direction; language's cosine: of its gradient with it",
        brief=False,
    )
    notes = [f"advice: {line}" for line in summary.get("advice", [])]  # none in an older version's
    return [kept, _matrix(summary, "before", []), _matrix(summary, "after", notes)]


def _matrix(summary: Mapping[str, Any], when: str, notes: Sequence[str]) -> Figures:
    languages = summary["languages"]
    rows = [
        (language, *(f"{value:.2f}" for value in row))
        for language, row in zip(languages, summary[f"cosine_{when}"], strict=True)
    ]
    title = f"cosines between languages {when} surgery"
    return Figures(title, ("language", *languages), rows, notes=notes, brief=False, fold=True)


def _kept(folder: Folder) -> Counter[str] | None:
    if not folder.exists("scores.parquet"):
        return None
    scores = folder.read_table(["language", "kept"], name="scores.parquet")
    return Counter(scores.filter(scores["kept"])["language"].to_pylist())


STEP = Step("kept", "kept", "of sketched", _kept, "sketched")
