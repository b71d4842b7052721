"""What became of the rows of a filter's input, from the tables in its work folder."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from congrad_ray.data.exports.write import ExportedRow
from congrad_ray.data.preferences import preference_of
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.pair.stage import STAGE as PAIR
from congrad_ray.stages.select.stage import STAGE as SELECT
from congrad_ray.stages.sketch.stage import STAGE as SKETCH

_AT_ONCE = 1024


def kept_rows(work: RunDirectory) -> tuple[NDArray[np.int64], pa.DoubleArray]:
    """The numbers of the kept rows in the input, ascending, and their congrad_score."""
    selected = work.stage(SELECT.folder, 0).read_table(["pair_id", "congrad_score"], name="selected.parquet")
    pairs = work.stage(PAIR.folder, 0).read_table(["pair_id", "row"])
    place = pc.index_in(selected["pair_id"], value_set=pairs["pair_id"].combine_chunks())
    numbers = pairs["row"].take(place).to_numpy()
    order = np.argsort(numbers)
    return numbers[order], selected["congrad_score"].take(order).combine_chunks()


def every_row(work: RunDirectory) -> dict[str, pa.Array]:
    """What became of every row of the input, in its order: the columns that rows.parquet has beside the user's."""
    of_pairs = work.stage(PAIR.folder, 0)
    pairs = of_pairs.read_table(["row", "pair_id", "language"]).combine_chunks()
    scores = work.stage(SELECT.folder, 0).read_table(["pair_id", "score", "kept"], "scores.parquet")
    scores = scores.combine_chunks()
    place = pc.index_in(pairs["pair_id"], value_set=scores["pair_id"])
    kept = scores["kept"].take(place)
    status = pc.if_else(pc.fill_null(kept, False), "kept", "dropped")
    failed = work.stage(SKETCH.folder, 0) / "quarantine"
    if failed.files(".parquet"):
        why = failed.read_table(["row_id", "reason"]).combine_chunks()
        reason = why["reason"].take(pc.index_in(pairs["pair_id"], value_set=why["row_id"]))
        status = pc.coalesce(reason, status)
    table = pa.table(
        {
            "row": pairs["row"],
            "congrad_score": scores["score"].take(place),
            "congrad_language": pairs["language"],
            "congrad_kept": pc.fill_null(kept, False),
            "congrad_status": status,
        }
    )
    others = of_pairs / "others"
    if others.files(".parquet"):
        rest = others.read_table(["row", "reason"]).rename_columns(["row", "congrad_status"])
        rest = rest.append_column("congrad_kept", pa.array([False] * len(rest)))
        table = pa.concat_tables([table, rest], promote_options="default")
    table = table.sort_by("row").combine_chunks()
    return {name: table[name].combine_chunks() for name in table.column_names if name != "row"}


def exported_rows(work: RunDirectory) -> Iterator[ExportedRow]:
    """All pairs with their scores, in the order of the input."""
    scores = work.stage(SELECT.folder, 0).read_table(["pair_id", "score", "kept"], "scores.parquet")
    ids = scores["pair_id"].combine_chunks()
    pairs = work.stage(PAIR.folder, 0)
    with pairs.open_parquet(f"{pairs.path}/pairs.parquet") as file:
        for batch in file.iter_batches(_AT_ONCE):
            here = scores.take(pc.index_in(batch["pair_id"], value_set=ids))
            score, kept = here["score"].to_pylist(), here["kept"].to_pylist()
            for row, of_row, is_kept in zip(batch.to_pylist(), score, kept, strict=True):
                yield ExportedRow(preference_of(row), of_row, bool(is_kept))
