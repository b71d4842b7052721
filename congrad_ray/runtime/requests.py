"""Which requests of a stage are still to be made: rows expanded into requests, less those with an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from congrad_ray.data.tables import table_of
from congrad_ray.rundir.directory import Folder
from congrad_ray.rundir.ids import Ids

if TYPE_CHECKING:
    from ray.data import Dataset


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

    id_column = schema.names[0]
    answered = ray.put(done)

    def requests(batch: pa.Table) -> pa.Table:
        made = [request for row in batch.to_pylist() for request in expand(row)]
        skip = ray.get(answered).contains([request[id_column] for request in made])
        return table_of([request for request, skipped in zip(made, skip, strict=True) if not skipped], schema)

    dataset = ray.data.read_parquet(folder.files(".parquet"), filesystem=folder.filesystem)
    return dataset.map_batches(requests, batch_format="pyarrow", batch_size=1024)
