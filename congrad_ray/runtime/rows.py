"""Streaming rows from one table to the next: read what is missing, write what comes, keep failures apart."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from congrad_ray.config.profile import Pool, Profile
from congrad_ray.data.tables import FAILURE, quarantined, row_id, table_of
from congrad_ray.rundir.directory import Folder, RunDirectoryError, StageFolder, each
from congrad_ray.rundir.ids import Ids, Keys, keys_of, repeated
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.metrics import COUNTERS, Meter
from congrad_ray.runtime.notices import heard
from congrad_ray.runtime.progress import Progress
from congrad_ray.runtime.resources import pool_sizes

if TYPE_CHECKING:
    from ray.data import Dataset

# So many failed rows never stop a stage, however few rows it has.
_FEW = 10


@dataclass(frozen=True)
class MissingRows:
    """The rows of a table that a stage has still to do, and what was read of the whole table to find them."""

    dataset: Dataset
    """Of the missing rows; one block is one batch."""
    count: int
    batches: int
    ids: Ids
    """Of all rows."""
    languages: list[str]
    """Of all rows, each once, sorted."""
    schema: pa.Schema
    text_bytes: int
    """Of all rows, before compression."""


def read_missing_batches(
    folder: Folder,
    output: StageFolder,
    id_column: str,
    batch_size: int,
    batch_bytes: int,
) -> MissingRows:
    """The rows of the Parquet files in `folder` that are not in `output` yet, in batches.

    A batch is consecutive rows of one file, `batch_size` of them, or fewer where rows of the file's mean size
    would be more than `batch_bytes`. Batches of which all rows are in `output` are left out. Which rows go
    together does not depend on what is done already, so that results whose last bits depend on the rest of the
    batch are the same after a kill: a batch is the unit of work. Each file is opened once.

    Raises RunDirectoryError where there is no file, or one is damaged.
    """
    import ray

    done = output.ids(id_column)
    paths = folder.files(".parquet")
    if not paths:
        raise RunDirectoryError(f"no Parquet file in {folder.path}")
    parts = each(lambda path: _look_at_part(folder, path, id_column, done, batch_size, batch_bytes), paths)
    batches = [batch for part in parts for batch in part.batches]

    def read(batch: dict[str, Any]) -> pa.Table:
        return read_slice(folder, str(batch["path"][0]), int(batch["start"][0]), int(batch["stop"][0]))

    dataset = ray.data.from_items(batches, override_num_blocks=max(1, len(batches)))
    return MissingRows(
        dataset.map_batches(read, batch_format="numpy", batch_size=None),
        sum(part.missing for part in parts),
        len(batches),
        Ids.from_keys(part.keys for part in parts),
        sorted({language for part in parts for language in part.languages}),
        parts[0].schema,
        sum(part.text_bytes for part in parts),
    )


@dataclass(frozen=True)
class _Part:
    """What a look at a Parquet file tells: its ids, and the batches of which not all rows are done."""

    keys: Keys
    languages: list[str]
    schema: pa.Schema
    text_bytes: int
    batches: list[dict[str, Any]]
    missing: int


def _look_at_part(
    folder: Folder, path: str, id_column: str, done: Ids, batch_size: int, batch_bytes: int
) -> _Part:
    with folder.open_parquet(path) as file:
        groups = (file.metadata.row_group(group) for group in range(file.num_row_groups))
        text_bytes = sum(group.total_byte_size for group in groups)  # before compression, from the footer
        schema = file.schema_arrow
        table = file.read([name for name in (id_column, "language") if name in schema.names], use_threads=False)
    keys = keys_of(table[id_column])
    languages = pc.unique(table["language"]).to_pylist() if "language" in table.column_names else []
    size = max(1, min(batch_size, batch_bytes * len(keys) // max(1, text_bytes)))
    starts = np.arange(0, len(keys), size)
    new = np.add.reduceat(~done.contains_keys(keys), starts, dtype=np.int64) if len(keys) else starts
    batches = [{"path": path, "start": int(start), "stop": int(start) + size} for start in starts[new > 0]]
    return _Part(keys, languages, schema, text_bytes, batches, int(new.sum()))


def read_slice(folder: Folder, path: str, start: int, stop: int) -> pa.Table:
    """Rows `start` to `stop` of a Parquet file; of its row groups only those that hold them are read."""
    with folder.filesystem.open_input_file(path) as stream:
        file = pq.ParquetFile(stream, page_checksum_verification=True)
        first = 0
        groups, skipped = [], 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first + rows <= start:
                skipped += rows
            elif first < stop:
                groups.append(group)
            first += rows
        return file.read_row_groups(groups).slice(start - skipped, stop - start)


def pool_arguments(pool: Pool, profile: Profile, batches: int) -> dict[str, Any]:
    """Arguments of Ray Data's `map_batches`: a class runs on the actors of a pool, on a whole block at a time."""
    from ray.data import ActorPoolStrategy

    least, most = pool_sizes(pool, profile, batches)
    return {
        "batch_format": "pyarrow",
        "batch_size": None,
        "compute": ActorPoolStrategy(min_size=least, max_size=most),
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus or None,
        "memory": pool.memory_bytes,
        "resources": pool.resources or None,
    }


Counted = Callable[[dict[str, Any]], Mapping[str, float]]
Counts = Sequence[tuple[str, str, float]]  # (metric, language, number)


@dataclass(frozen=True)
class PartWriter:
    """Writes a table as a Parquet part of a stage, in whichever process it is called. Cheap to send to workers.

    A row whose FAILURE column is set goes to the stage's `quarantine/`. `counted`: what a good row adds to which
    of `metrics.COUNTERS`.
    """

    output: StageFolder
    schema: pa.Schema
    id_column: str
    counted: Counted = lambda row: {}

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Returns what `follow` wants to know of the part."""
        rows = batch.to_pylist()
        failed = [row for row in rows if row.get(FAILURE)]
        good = [row for row in rows if not row.get(FAILURE)]
        # By its rows: a write that is tried again replaces its first try, and files have the same order in every
        # run, which fixes the last bits of sums over them.
        name = f"part-{row_id(*(row[self.id_column] for row in rows))}.parquet"
        why = [(row, row[FAILURE]) for row in failed]
        self.output.write_quarantine(
            (
                quarantined(row[self.id_column], row.get("language"), found["reason"], found["detail"])
                for row, found in why
            ),
            name,
        )
        if good:
            self.output.write_table(name, table_of(good, self.schema))
        counts = json.dumps(_counts(good, self.counted))
        return pa.table({"written": [len(good)], "failed": [len(failed)], "counts": [counts]})


def write_rows(
    dataset: Dataset,
    context: Context,
    schema: pa.Schema,
    id_column: str,
    total: int,
    counted: Counted = lambda row: {},
    check: Callable[[Counts], None] = lambda counts: None,
) -> None:
    """Runs `dataset` and writes each of its blocks by a `PartWriter`; see `follow`."""
    writer = PartWriter(context.output, schema, id_column, counted)

    def write(batch: pa.Table) -> pa.Table:
        return writer(batch)

    write.__name__ = f"write_{context.output.path.rsplit('/', 1)[1]}"  # Ray names the operator after it
    follow(dataset.map_batches(write, batch_format="pyarrow", batch_size=None), context, total, check)


def follow(
    parts: Dataset, context: Context, total: int, check: Callable[[Counts], None] = lambda counts: None
) -> None:
    """Runs a dataset whose last step is a `PartWriter`, with progress on the log and in the metrics.

    Each part is whole or not there: what a kill can cost is the batches in flight. Raises RunDirectoryError when
    more rows fail than the recipe's `limits.failed_share` of the stage's rows, and more than a few. `check` gets
    what each part adds to the metrics, and may raise an error that ends the stage.
    """
    output = context.output
    failed_before = sum(output.quarantine_counts().values())
    limit = max(_FEW, context.recipe.limits.failed_share * (total + output.rows_so_far() + failed_before))
    progress = Progress(total)
    parts.set_name(f"{context.meter.stage}_{context.iteration}")

    def computed(rows: int) -> None:
        progress.computed(rows)
        context.progressed()

    with heard(context.notify(), computed):
        for part in parts.iter_rows():
            counts = json.loads(part["counts"])
            tokens = int(sum(number for name, _, number in counts if name == "congrad_tokens"))
            progress.add(part["written"], part["failed"], tokens)
            context.progressed()
            _measure(context.meter, part["written"], part["failed"], counts, progress.left)
            if failed_before + progress.failed > limit:
                raise RunDirectoryError(_too_many_failed(output, context.recipe.limits.failed_share))
            check(counts)


def _counts(rows: Sequence[Mapping[str, Any]], counted: Counted) -> list[tuple[str, str, float]]:
    """What rows add to metrics, as (metric, language, number)."""
    sums: defaultdict[tuple[str, str], float] = defaultdict(int)
    for row in rows:
        for name, number in counted(dict(row)).items():
            sums[name, str(row.get("language") or "")] += number
    return [(name, language, number) for (name, language), number in sums.items()]


def _measure(meter: Meter, written: int, failed: int, counts: Counts, left: int) -> None:
    meter.count("congrad_rows", written, outcome="written")
    meter.count("congrad_rows", failed, outcome="failed")
    meter.set("congrad_rows_left", left)
    for name, language, number in counts:
        by_language = "language" in COUNTERS[name][1]
        meter.count(name, number, **({"language": language} if by_language else {}))


def _too_many_failed(output: StageFolder, share: float) -> str:
    rows = (output / "quarantine").read_table(["reason", "detail"]).to_pylist()
    examples = {row["reason"]: row["detail"] for row in reversed(rows)}
    counts = Counter(row["reason"] for row in rows)
    listed = "\n".join(
        f"  {reason}: {counts[reason]} rows, such as: {examples[reason]}" for reason in sorted(counts)
    )
    return (
        f"{len(rows)} rows are in quarantine, more than limits.failed_share ({share:g}) of all:\n{listed}\n"
        f"They are in {output.path}/quarantine. Fix the cause and give --redo, or raise limits.failed_share and "
        "run the same command again."
    )


def outcome_of(
    output: StageFolder, id_column: str, counters: dict[str, Any] | None = None, expected: int | None = None
) -> Outcome:
    """The outcome of a stage whose parts a `PartWriter` wrote.

    Rows that a retried task wrote twice are removed, and those in quarantine that another try brought through.
    Raises RunDirectoryError where not all of the `expected` rows are there or in quarantine.
    """
    seen = _remove_seen(output, output.keys_by_part(id_column), Ids.from_keys([]))
    _remove_seen(output.quarantine, output.quarantine.keys_by_part("row_id"), seen)
    rows = len(seen)
    quarantined_rows = output.quarantine_counts()
    failed = sum(quarantined_rows.values())
    if expected is not None and rows + failed != expected:
        raise RunDirectoryError(
            f"{expected} rows were asked for, but {output.path} has {rows} and {failed} in quarantine: has "
            "something deleted files there? Run the stage again; what is there is kept."
        )
    return Outcome(rows, {**(counters or {}), "quarantined": quarantined_rows})


def _remove_seen(folder: Folder, keys_by_part: Mapping[str, Keys], seen: Ids) -> Ids:
    """Removes the rows of Parquet files whose id is in `seen` or in a row before; returns the ids of the rest."""
    keys = np.concatenate([np.empty(0, seen.keys.dtype), *keys_by_part.values()])
    keys.sort()
    again = Ids(repeated(keys))
    met: set[bytes] = set()  # of those in `again`: few, since only a task that was tried twice writes a row twice
    for path, of_part in keys_by_part.items():
        fresh = ~seen.contains_keys(of_part)
        for place in np.flatnonzero(again.contains_keys(of_part)):
            key = bytes(of_part[place])
            fresh[place] &= key not in met
            met.add(key)
        if not fresh.any():
            folder.filesystem.delete_file(path)
        elif not fresh.all():
            folder.write_table(path.rsplit("/", 1)[1], folder.read_parquet(path).filter(pa.array(fresh)))
    return Ids.from_keys([keys[~seen.contains_keys(keys)]])
