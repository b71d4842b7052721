"""The tables of a run against those of an undisturbed one: rows lost, rows doubled, rows that differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Table:
    """A table of a run: where it is, its id, the columns that are compared, and whether they must be equal."""

    name: str
    path: str
    id: str
    columns: Sequence[str]
    bitwise: bool


@dataclass(frozen=True)
class Difference:
    """What a comparison found. `promised`: nothing may differ, to the last bit."""

    table: str
    rows: int
    lost: int
    doubled: int
    differing: int
    largest_difference: float
    promised: bool

    @property
    def broken(self) -> bool:
        return bool(self.lost or self.doubled or (self.promised and self.differing))

    def record(self) -> dict[str, Any]:
        return asdict(self)


_ITERATION = "iteration-0"
# What an engine writes may depend on which requests it computes together: its texts and scores are counted only.
SAMPLED = (
    Table("prompts", "prompts", "prompt_id", ("language", "prompt", "split", "task"), True),
    Table("baseline", "baseline", "answer_id", ("response", "true_score"), False),
    Table("responses", f"{_ITERATION}/responses", "response_id", ("prompt_id", "seed", "response"), False),
    Table("judgements", f"{_ITERATION}/judgements", "response_id", ("prompt_id", "score"), False),
)
# Of the same responses and judgements.
DETERMINED = (
    Table("pairs", f"{_ITERATION}/pairs", "pair_id", ("chosen", "rejected", "chosen_score"), True),
    Table(
        "sketches",
        f"{_ITERATION}/sketches",
        "pair_id",
        ("sketch", "sketch_scale", "norm", "coefficient", "chosen_logps", "rejected_logps"),
        True,
    ),
    Table(
        "scores",
        f"{_ITERATION}/selection/scores.parquet",
        "pair_id",
        ("score", "cosine", "dot", "worst_cosine", "own_cosine", "kept"),
        True,
    ),
    Table(
        "selected",
        f"{_ITERATION}/selection/selected.parquet",
        "pair_id",
        ("prompt", "chosen", "rejected", "ref_chosen_logps", "ref_rejected_logps", "congrad_score"),
        True,
    ),
    Table("answers", f"{_ITERATION}/evaluation", "answer_id", ("response", "true_score"), False),
)
POLICY = f"{_ITERATION}/policy"


def compare_table(table: Table, run: Path, undisturbed: Path) -> Difference:
    """A table that is not there has lost all its rows."""
    wanted, found = _rows(table, undisturbed), _rows(table, run)
    unique: dict[str, dict[str, Any]] = {row[table.id]: row for row in found}
    differing, largest = 0, 0.0
    for row in wanted:
        other = unique.get(row[table.id])
        if other is None or _same(row, other):
            continue
        differing += 1
        largest = max([largest, *(_distance(row[name], other[name]) for name in table.columns)])
    lost = sum(row[table.id] not in unique for row in wanted)
    # A row that should not be there at all is as wrong as one that is there twice.
    strange = len(unique.keys() - {row[table.id] for row in wanted})
    return Difference(
        table.name, len(wanted), lost, len(found) - len(unique) + strange, differing, largest, table.bitwise
    )


def compare_metrics(run: Path, undisturbed: Path) -> Difference:
    """The logged steps of training: none missing, none double; their losses are compared."""
    wanted, found = (_metrics(folder) for folder in (undisturbed, run))
    losses = {row["step"]: row["loss"] for row in found}
    distances = [abs(row["loss"] - losses[row["step"]]) for row in wanted if row["step"] in losses]
    return Difference(
        "training steps",
        len(wanted),
        sum(row["step"] not in losses for row in wanted),
        len(found) - len(losses),
        sum(distance > 0 for distance in distances),
        max(distances, default=0.0),
        False,
    )


def compare_policies(run: Path, undisturbed: Path) -> tuple[Difference, float]:
    """The trained weights, tensor by tensor, and |difference| / |weights| over all of them."""
    from safetensors.numpy import load_file

    wanted, found = (load_file(folder / POLICY / "model.safetensors") for folder in (undisturbed, run))
    differing, largest, squares, whole = 0, 0.0, 0.0, 0.0
    for name in wanted.keys() & found.keys():
        difference = wanted[name].astype(np.float64) - found[name].astype(np.float64)
        differing += wanted[name].tobytes() != found[name].tobytes()
        largest = max(largest, float(np.abs(difference).max()))
        squares += float((difference**2).sum())
        whole += float((wanted[name].astype(np.float64) ** 2).sum())
    lost, strange = len(wanted.keys() - found.keys()), len(found.keys() - wanted.keys())
    weights = Difference("policy (tensors)", len(wanted), lost, strange, differing, largest, False)
    return weights, float(np.sqrt(squares / whole))


def compare_report(run: Path) -> Difference:
    there = (run / "report.html").exists()
    return Difference("report", 1, int(not there), 0, 0, 0.0, False)


def _rows(table: Table, run: Path) -> list[dict[str, Any]]:
    path = run / table.path
    files = [path] if path.suffix == ".parquet" else sorted(path.glob("*.parquet"))
    tables = [pq.read_table(file, columns=[table.id, *table.columns]) for file in files if file.exists()]
    return pa.concat_tables(tables).to_pylist() if tables else []


def _metrics(run: Path) -> list[dict[str, float]]:
    file = run / POLICY / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """To the last bit: a float is equal to itself only, also where it is no number."""
    return all(
        value == other[name] or (value != value and other[name] != other[name]) for name, value in row.items()
    )


def _distance(value: Any, other: Any) -> float:
    if isinstance(value, float) and isinstance(other, float):
        return abs(value - other)
    if isinstance(value, bytes) and isinstance(other, bytes):  # the numbers of a sketch, int8
        return float(np.abs(np.frombuffer(value, np.int8).astype(int) - np.frombuffer(other, np.int8)).max())
    return 0.0
