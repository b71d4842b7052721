"""The evaluation's tables as one row per language: before and after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from congrad_ray.rundir import Folder


@dataclass(frozen=True)
class EvaluationRow:
    """One language (or all seen or unseen ones), a model against its starting point; None where not measured."""

    language: str
    seen: bool
    model: str
    baseline: str
    prompts: int
    score_before: float | None  # mean true score of greedy answers, 0..1 (built-in world)
    score_after: float | None
    tokens_before: float | None  # mean length of greedy answers
    tokens_after: float | None
    win_rate: float | None  # of the model, ties half; both orders
    judged: int  # comparisons that could be read
    unreadable: int


def evaluation_rows(folder: Folder) -> list[EvaluationRow]:
    """Per language and then for all seen and all unseen ones; none where nothing was evaluated."""
    answers = _rows_with(
        folder, "answer_id", ["language", "seen", "model", "decoding", "response_tokens", "true_score"]
    )
    comparisons = _rows_with(folder, "comparison_id", ["language", "seen", "model", "baseline", "win"])
    models = sorted({row["model"] for row in answers}, key=_iteration)
    if len(models) < 2:
        return []
    baseline, model = models[0], models[-1]
    greedy = [row for row in answers if row["decoding"] == "greedy"]
    against = [row for row in comparisons if row["model"] == model and row["baseline"] == baseline]
    groups: dict[tuple[bool, str], list[dict[str, Any]]] = defaultdict(list)
    judged: dict[tuple[bool, str], list[dict[str, Any]]] = defaultdict(list)
    for source, target in ((greedy, groups), (against, judged)):
        for row in source:
            target[(row["seen"], row["language"])].append(row)
            target[(row["seen"], "")].append(row)
    keys = sorted(groups, key=lambda key: (not key[0], key[1] == "", key[1]))
    sizes = {seen: len({key for key in keys if key[0] == seen}) for seen in (True, False)}
    return [
        _row(key, model, baseline, groups[key], judged[key])
        for key in keys
        if key[1] or sizes[key[0]] > 2  # a total of one language says nothing new
    ]


def _row(
    key: tuple[bool, str],
    model: str,
    baseline: str,
    answers: list[dict[str, Any]],
    comparisons: list[dict[str, Any]],
) -> EvaluationRow:
    seen, language = key
    before = [row for row in answers if row["model"] == baseline]
    after = [row for row in answers if row["model"] == model]
    wins = [row["win"] for row in comparisons if row["win"] is not None]
    return EvaluationRow(
        language=language or ("all seen" if seen else "all unseen"),
        seen=seen,
        model=model,
        baseline=baseline,
        prompts=len(after),
        score_before=_mean(row["true_score"] for row in before),
        score_after=_mean(row["true_score"] for row in after),
        tokens_before=_mean(row["response_tokens"] for row in before),
        tokens_after=_mean(row["response_tokens"] for row in after),
        win_rate=_mean(wins),
        judged=len(wins),
        unreadable=len(comparisons) - len(wins),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _iteration(model: str) -> int:
    digits = model.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1


def _rows_with(folder: Folder, id_column: str, columns: list[str]) -> list[dict[str, Any]]:
    """The rows of all Parquet files below `folder` that have the id column, whatever they are called."""
    found: list[dict[str, Any]] = []
    for path in folder.files(".parquet", recursive=True):
        if id_column in pq.read_schema(path, filesystem=folder.filesystem).names:
            found += pq.read_table(path, columns=columns, filesystem=folder.filesystem).to_pylist()
    return found
