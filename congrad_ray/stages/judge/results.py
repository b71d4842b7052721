"""What the judgements of a stage come to: one score a response in JUDGEMENTS, and the manifest's counters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from congrad_ray.config.recipe import Recipe
from congrad_ray.data.tables import row_id, table_of
from congrad_ray.rundir.directory import StageFolder
from congrad_ray.stages.judge.combine import Scores
from congrad_ray.stages.judge.schema import JUDGEMENTS, ROWS_PER_PART
from congrad_ray.stages.judge.unreadable import counts_by_language

Row = dict[str, Any]


def write_means(samples: StageFolder, output: StageFolder, asked: int) -> None:
    """Writes JUDGEMENTS from JUDGEMENT_SAMPLES, reading its parts in the order in which they were written.

    The judgements of a response are asked one after the other, so few responses are incomplete at any time and
    neither a shuffle nor the whole table in memory is needed.
    """
    done = output.ids("response_id")
    pending: dict[str, dict[str, Row]] = {}
    complete_rows: list[Row] = []

    def write() -> None:
        name = f"part-{row_id(*(row['response_id'] for row in complete_rows))}.parquet"
        output.write_table(name, table_of(complete_rows, JUDGEMENTS))
        complete_rows.clear()

    infos = samples.filesystem.get_file_info(samples.parts())
    for info in sorted(infos, key=lambda info: (info.mtime_ns or 0, info.path)):
        part = samples.read_parquet(info.path)
        for row in part.filter(pa.array(~done.contains(part["response_id"]))).to_pylist():
            judgements = pending.setdefault(row["response_id"], {})
            judgements[row["judgement_id"]] = row
            if len(judgements) == asked:
                complete_rows.append(_judgement(list(pending.pop(row["response_id"]).values()), asked))
                if len(complete_rows) == ROWS_PER_PART:
                    write()
    if complete_rows:
        write()


def _judgement(judgements: list[Row], asked: int) -> Row:
    """One response's row of JUDGEMENTS: the mean of the readable scores."""
    judgements.sort(key=lambda row: str(row["judgement_id"]))
    scores = [row["score"] for row in judgements if row["score"] is not None]
    return {
        **{name: judgements[0][name] for name in ("response_id", "prompt_id", "language")},
        "score": sum(scores) / len(scores) if scores else None,
        "readable": len(scores),
        "asked": asked,
        "outputs": [row["output"] or "" for row in judgements],
    }


def write_combined(scores: Scores, output: StageFolder) -> None:
    """Writes JUDGEMENTS of judges whose judgements have to be seen together."""
    for path in output.parts():  # of a try that ended here
        output.filesystem.delete_file(path)
    combined = scores.combined()
    table = pa.table(
        {
            "response_id": scores.response_ids,
            "prompt_id": scores.prompt_ids,
            "language": scores.languages,
            "score": pa.array(combined, pa.float32(), mask=np.isnan(combined)),
            "readable": pa.array(scores.readable, pa.int32()),
            "asked": pa.array(scores.asked, pa.int32()),
            "outputs": pa.array([[]] * len(combined), pa.list_(pa.string())),
        }
    ).cast(JUDGEMENTS)
    for start in range(0, len(table), ROWS_PER_PART):
        output.write_table(f"part-{start // ROWS_PER_PART:05}.parquet", table.slice(start, ROWS_PER_PART))


def counters_of(samples: StageFolder, output: StageFolder, recipe: Recipe) -> dict[str, Any]:
    """Mean scores and masses, and judgements asked, readable and unreadable by reason, by language and over all.

    `unreadable` alone counts responses: those of which no judgement could be read. With a server `cost_usd` is
    what its tokens cost, and with several judges `judges` has each one's numbers.
    """
    table = output.read_table(["language", "score"])
    asked = samples.read_table(
        ["language", "unreadable", "mass", "prompt_tokens", "output_tokens", "judge", "score"]
    )
    judgements = counts_by_language(asked)
    for language, row in judgements.items():
        row["mean_score"] = _mean(table.filter(pc.equal(table["language"], language))["score"], 4)
        row["mean_mass"] = _mean(asked.filter(pc.equal(asked["language"], language))["mass"], None)
    judges: dict[str, dict[str, Any]] = {}
    costs: list[float] = []
    for name, judge in recipe.judge.judges.items():
        own = asked.filter(pc.equal(asked["judge"], name))
        read, written = (pc.sum(own[column]).as_py() or 0 for column in ("prompt_tokens", "output_tokens"))
        cost = judge.endpoint.dollars(read, written) if judge.endpoint else None
        costs += [] if cost is None else [cost]
        judges[name] = {
            "asked": len(own),
            "readable": len(own) - own["score"].null_count,
            "mean_score": None if judge.method == "pairwise" else _mean(own["score"], 4),
            "prompt_tokens": read,
            "output_tokens": written,
            "cost_usd": cost,
        }
    return {
        "mean_prompt_tokens": _mean(asked["prompt_tokens"], 1),
        "mean_output_tokens": _mean(asked["output_tokens"], 1),
        "mean_score": _mean(table["score"], 4),
        "mean_mass": _mean(asked["mass"], None),
        "unreadable": table["score"].null_count,
        "unreadable_share": round(table["score"].null_count / len(table), 4),
        "cost_usd": round(sum(costs), 6) if costs else None,
        "judges": judges if len(judges) > 1 else {},
        "judgements": judgements,
    }


def _mean(column: pa.ChunkedArray, digits: int | None) -> float | None:
    """The mean with this many digits after the point; None: with four significant ones."""
    mean = pc.mean(column).as_py()
    if mean is None or digits is not None:
        return None if mean is None else round(mean, digits)
    return float(f"{mean:.4g}")
