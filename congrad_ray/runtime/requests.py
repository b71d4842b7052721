"""Which requests of a stage are still to be made: rows expanded into requests, less those with an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from congrad_ray.data.tables import table_of
from congrad_ray.rundir.directory import Folder
from congrad_ray.rundir.ids import Ids

if TYPE_CHECKING:
    from ray.data import Dataset

_ROWS_TOGETHER = 4096
_ROWS_HERE = 2**16


def read_requests(
    folder: Folder,
    expand: Callable[[dict[str, Any]], Iterable[dict[str, Any]]],
    schema: pa.Schema,
    done: Ids,
) -> Dataset:
    """A Ray dataset with the rows that `expand` makes of each row of `folder`, without those in `done`.

    The first column of `schema` is the id. The expansion runs in Ray tasks and keeps the order, so the requests
    of one prompt stay next to each other and share its cached prefix in the engine.
    """
    import ray

    requests = _not_done(lambda batch: [made for row in batch.to_pylist() for made in expand(row)], schema, done)
    dataset = ray.data.read_parquet(folder.files(".parquet"), filesystem=folder.filesystem)
    return dataset.map_batches(requests, batch_format="pyarrow", batch_size=1024)


def read_grouped_requests(
    folder: Folder,
    by: str,
    expand: Callable[[list[dict[str, Any]]], Iterable[dict[str, Any]]],
    schema: pa.Schema,
    done: Ids,
) -> Dataset:
    """As `read_requests`, of groups of rows with the same value in the column `by`, wherever they lie.

    All requests are made before this returns: a shuffle beside actors that hold all CPUs would wait for ever. Few
    rows are brought together in this process, many by a shuffle of Ray Data's.
    """
    import ray

    def made(batch: pa.Table) -> list[dict[str, Any]]:
        found = sorted(batch.to_pylist(), key=lambda row: str(row[by]))
        return [request for _, group in groupby(found, key=lambda row: row[by]) for request in expand(list(group))]

    rows = len(folder.read_table([by]))
    if rows <= _ROWS_HERE:
        missing = _without_done(made(folder.read_table()), schema, done)
        return ray.data.from_arrow(missing)
    dataset = ray.data.read_parquet(folder.files(".parquet"), filesystem=folder.filesystem)
    together = dataset.repartition(max(1, rows // _ROWS_TOGETHER), keys=[by])
    return together.map_batches(
        _not_done(made, schema, done), batch_format="pyarrow", batch_size=None
    ).materialize()


def _not_done(
    make: Callable[[pa.Table], list[dict[str, Any]]], schema: pa.Schema, done: Ids
) -> Callable[[pa.Table], pa.Table]:
    """Makes requests of a batch, as a table of `schema`, and leaves out those whose id is in `done`."""
    import ray

    answered = ray.put(done)

    def requests(batch: pa.Table) -> pa.Table:
        return _without_done(make(batch), schema, ray.get(answered))

    return requests


def _without_done(made: list[dict[str, Any]], schema: pa.Schema, done: Ids) -> pa.Table:
    skip = done.contains([request[schema.names[0]] for request in made])
    return table_of([request for request, skipped in zip(made, skip, strict=True) if not skipped], schema)
