"""Values and changes of the harness' tasks, against SciPy and NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import sem

from congrad_ray.data.tables import row_id, table_of
from congrad_ray.stages.benchmark.intervals import left_out, task_changes, task_values
from congrad_ray.stages.benchmark.schema import RESULTS, SAMPLES


def tables(*parts: dict[str, Any]) -> tuple[pa.Table, pa.Table]:
    """SAMPLES and RESULTS of subtasks; a part has model, task, subtask, language, values, and more of a result."""
    samples, results = [], []
    for part in parts:
        about = {name: part[name] for name in ("model", "task", "subtask", "language")}
        about["metric"] = part.get("metric", "acc")
        values = part["values"]
        for number, value in enumerate(values):
            samples.append(
                {
                    **about,
                    "sample_id": row_id(*about.values(), number),
                    "document": number,
                    "document_hash": str(number),
                    "value": value,
                    "target": "0",
                    "output": "[]",
                }
            )
        results.append(
            {
                **about,
                "result_id": row_id(*about.values()),
                "value": part.get("value"),
                "stderr": part.get("stderr"),
                "count": len(values),
                "samples": len(values),
                "is_mean": part.get("is_mean", True),
                "higher_is_better": True,
                "cut": 0,
                "few_shot": 0,
            }
        )
    return table_of(samples, SAMPLES), table_of(results, RESULTS)


def part(model: str, subtask: str, language: str | None, values: Any, **more: Any) -> dict[str, Any]:
    about = {"model": model, "task": subtask.split("_")[0], "subtask": subtask, "language": language}
    return about | {"values": list(values)} | more


def test_subtasks_of_a_language_are_pooled_over_documents() -> None:
    generator = np.random.default_rng(0)
    one, two, other = (generator.integers(0, 2, size).astype(float) for size in (30, 10, 20))
    found = task_values(
        *tables(
            part("M_0", "mmlu_de_law", "de", one),
            part("M_0", "mmlu_de_stem", "de", two),
            part("M_0", "mmlu_fr_law", "fr", other),
        )
    )
    both = np.concatenate([one, two])
    assert [(row.task, row.language, row.count) for row in found] == [("mmlu", "de", 40), ("mmlu", "fr", 20)]
    assert found[0].value == pytest.approx(both.mean())
    assert found[0].stderr == pytest.approx(sem(both))
    assert found[1].value == pytest.approx(other.mean())


def test_the_interval_is_of_paired_differences() -> None:
    """Hard and easy documents differ far more than the models do, which unpaired intervals would not survive."""
    generator = np.random.default_rng(1)
    before = generator.normal(0, 10, 400)
    after = before - 1 + generator.normal(0, 1, 400)
    rows = tables(part("M_0", "x_de", "de", before), part("M_1", "x_de", "de", after))
    (change,) = task_changes(*rows, "M_0", "M_1")
    differences = after - before
    assert change.change == pytest.approx(differences.mean())
    assert (change.before, change.after) == pytest.approx((before.mean(), after.mean()))
    assert change.low is not None and change.high is not None
    half = 1.96 * differences.std(ddof=1) / np.sqrt(400)
    assert change.low == pytest.approx(differences.mean() - half, abs=0.02)
    assert change.high == pytest.approx(differences.mean() + half, abs=0.02)
    assert change.high < 0
    assert 1.96 * np.hypot(sem(before), sem(after)) > 1.2  # unpaired it would hold 0


def test_documents_that_only_one_model_has_are_left_out_of_a_change() -> None:
    rows = tables(part("M_0", "x_de", "de", [1, 0, None]), part("M_1", "x_de", "de", [1, 1, 1, 1]))
    (change,) = task_changes(*rows, "M_0", "M_1")
    assert (change.count, change.before, change.after, change.change) == (2, 0.5, 1.0, 0.5)


def test_what_is_no_mean_is_the_harness_own_value() -> None:
    more = {"metric": "bleu", "is_mean": False, "stderr": 3.0}
    rows = tables(
        part("M_0", "t_de", "de", [None, None], value=20.0, **more),
        part("M_1", "t_de", "de", [None, None], value=10.0, **(more | {"stderr": 4.0})),
    )
    (change,) = task_changes(*rows, "M_0", "M_1")
    assert (change.before, change.after, change.change) == (20.0, 10.0, -10.0)
    assert change.low == pytest.approx(-10 - 1.959964 * 5)  # sqrt(3^2 + 4^2)
    assert change.high == pytest.approx(-10 + 1.959964 * 5)
    assert left_out(rows[1]) == []


def test_what_is_no_mean_has_no_value_over_several_subtasks() -> None:
    more = {"metric": "bleu", "is_mean": False, "value": 20.0, "stderr": 1.0}
    rows = tables(part("M_0", "t_de_a", "de", [None], **more), part("M_0", "t_de_b", "de", [None], **more))
    assert task_values(*rows) == []
    assert left_out(rows[1]) == ["t bleu (de, 2 subtasks)"]


def test_tasks_without_a_language_stay_apart_from_those_with_one() -> None:
    rows = tables(part("M_0", "x_de", "de", [1, 1]), part("M_0", "x_all", None, [0, 0]))
    assert {row.language: row.value for row in task_values(*rows)} == {"de": 1.0, None: 0.0}


def test_a_single_document_has_no_standard_error() -> None:
    (value,) = task_values(*tables(part("M_0", "x_de", "de", [1])))
    assert (value.value, value.stderr, value.count) == (1.0, None, 1)
