"""What the harness' results say: values by language, and changes between two models with their intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from congrad_ray.stages.evaluate.statistics import bootstrap_interval

_NORMAL = 1.959963984540054  # two-sided 95 %


@dataclass(frozen=True)
class TaskValue:
    """One metric of one model in one language of a task, over `count` documents of all its subtasks there."""

    task: str
    language: str | None
    metric: str
    model: str
    value: float
    stderr: float | None
    count: int


@dataclass(frozen=True)
class TaskChange:
    """What a metric changed by from one model to another, with a 95 % interval; `count` documents of both."""

    task: str
    language: str | None
    metric: str
    before: float
    after: float
    change: float
    low: float | None
    high: float | None
    count: int


_Key = tuple[str, str | None, str]  # task, language, metric
_Documents = dict[tuple[str, int], float]  # value by (subtask, document)


def task_values(samples: pa.Table, results: pa.Table) -> list[TaskValue]:
    """The values of every task, language, metric and model, from SAMPLES and RESULTS.

    A mean over documents is that over the documents of all subtasks of the language, its standard error
    s / sqrt(n) with s the sample's standard deviation, as the harness has it for one. Of other metrics, such as
    BLEU, the harness' own value is taken where the language has one subtask, and none where it has several.
    """
    documents = _documents(samples)
    found = []
    for (key, model), rows in _grouped(results).items():
        values = list(documents.get((key, model), {}).values())
        if all(row["is_mean"] for row in rows) and values:
            value, stderr, count = float(np.mean(values)), _stderr(values), len(values)
        elif len(rows) == 1 and rows[0]["value"] is not None:
            value, stderr, count = rows[0]["value"], rows[0]["stderr"], rows[0]["count"]
        else:
            continue
        found.append(TaskValue(*key, model, value, stderr, count))
    return sorted(found, key=lambda row: (row.task, row.language or "", row.metric, row.model))


def left_out(results: pa.Table) -> list[str]:
    """Metrics without a value of their own in a language: no means over documents, of several subtasks."""
    return sorted(
        {
            f"{task} {metric} ({language or 'no language'}, {len(rows)} subtasks)"
            for ((task, language, metric), _), rows in _grouped(results).items()
            if len(rows) > 1 and not all(row["is_mean"] for row in rows)
        }
    )


def task_changes(samples: pa.Table, results: pa.Table, before: str, after: str, seed: int = 0) -> list[TaskChange]:
    """Changes from model `before` to model `after`, in the order of `task_values`.

    Of means the interval is that of the mean of the documents' differences, by bootstrap: both models answer the
    same documents, so what makes some harder than others is not in it. Of other metrics it is the normal one of
    two independent estimates, which is too wide.
    """
    documents = _documents(samples)
    values = {(row.task, row.language, row.metric, row.model): row for row in task_values(samples, results)}
    found = []
    for (task, language, metric, model), was in values.items():
        now = values.get((task, language, metric, after))
        if model != before or now is None:
            continue
        key = (task, language, metric)
        old, new = documents.get((key, before), {}), documents.get((key, after), {})
        both = [document for document in old if document in new]
        if both:
            differences = [new[document] - old[document] for document in both]
            start, end = (float(np.mean([of[document] for document in both])) for of in (old, new))
            low, high = bootstrap_interval(differences, seed)
            change = float(np.mean(differences))
            found.append(TaskChange(task, language, metric, start, end, change, low, high, len(both)))
            continue
        change = now.value - was.value
        half = None
        if was.stderr is not None and now.stderr is not None:
            half = _NORMAL * float(np.hypot(was.stderr, now.stderr))
        bounds: tuple[float | None, float | None] = (
            (None, None) if half is None else (change - half, change + half)
        )
        count = min(was.count, now.count)
        found.append(TaskChange(task, language, metric, was.value, now.value, change, *bounds, count))
    return found


def _stderr(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def _documents(samples: pa.Table) -> dict[tuple[_Key, str], _Documents]:
    found: dict[tuple[_Key, str], _Documents] = defaultdict(dict)
    names = ("task", "language", "metric", "model", "subtask", "document", "value")
    for task, language, metric, model, subtask, document, value in zip(
        *(samples[name].to_pylist() for name in names), strict=True
    ):
        if value is not None:
            found[(task, language, metric), model][subtask, document] = value
    return found


def _grouped(results: pa.Table) -> dict[tuple[_Key, str], list[Mapping[str, Any]]]:
    found: dict[tuple[_Key, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in results.to_pylist():
        found[(row["task"], row["language"], row["metric"]), row["model"]].append(row)
    return found
