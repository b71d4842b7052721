"""A selection's two passes over the files of the sketches table, with Ray Data.

A Ray Data task gets the paths of some files, reads them a piece at a time and reduces each piece where it lies;
what leaves the task is one sum per language, or a few numbers per pair. So memory does not depend on how many
sketches there are, and no sketch is copied into Ray's object store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow.fs import FileSystem

from congrad_ray.config.names import LeaveOut
from congrad_ray.rundir.directory import Folder, RunDirectoryError
from congrad_ray.stages.select.gram import Float64Array
from congrad_ray.stages.select.scores import Agreement, Direction, agreement
from congrad_ray.stages.select.sums import PRODUCT_COLUMNS, SUM_COLUMNS, Layout, Rows, products_of, sums_of

if TYPE_CHECKING:
    from ray.data import Dataset

# Bytes of sketches that a task holds at once, and reads ahead.
_PIECE = 2**25
# Enough to keep a large cluster busy and to spread it evenly; each gives the driver one sum per language.
_MAX_TASKS = 256


class StreamedSketches:
    """The sketches in a folder, on a connected Ray.

    `pairs` has the pair_id and language of all of them, sorted by pair_id, and `shares` (N,) the share of each in
    its language's gradient. `progressed` is called with every piece of a result.
    """

    def __init__(
        self,
        folder: Folder,
        layout: Layout,
        pairs: pa.Table,
        shares: Float64Array,
        progressed: Callable[[], None] = lambda: None,
    ) -> None:
        self.layout = layout
        self._folder, self._progressed = folder, progressed
        self._pairs, self._shares = pairs.select(["pair_id", "language"]), shares

    def language_gradients(self) -> NDArray[np.float32]:
        """The gradient of every language, (L, blocks, width / blocks): its pairs' sum of share * c * sketch(u).

        u points where the loss goes down, so these are descent directions; sketches are linear, so the sum of
        sketches is the sketch of the sum. Sums are taken in float64 and in the order of the files' names, so that
        the same files give the same numbers to the last bit.
        """
        layout, shares, filesystem = self.layout, self._shares_of_rows, self._folder.filesystem

        def reduce(files: dict[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
            pieces = _pieces(files["path"], filesystem, SUM_COLUMNS)
            total: Any = sum(sums_of(piece, layout, shares(piece)) for piece in pieces)
            if np.ndim(total):  # not where all files are empty
                yield {"first": files["number"][:1], "next": files["number"][-1:] + 1, "sums": total[None]}

        partial = self._files().map_batches(reduce, batch_format="numpy", batch_size=None)
        sums: Any = 0.0
        turn, early = 0, {}
        for batch in partial.iter_batches(batch_format="numpy", batch_size=None):
            for first, following, part in zip(batch["first"], batch["next"], batch["sums"], strict=True):
                early[int(first)] = (int(following), part)
            while turn in early:
                turn, part = early.pop(turn)
                sums = sums + part
            self._progressed()
        for _, part in (early[first] for first in sorted(early)):  # behind a task whose files were all empty
            sums = sums + part
        return np.asarray(sums, dtype=np.float32)

    def agreement(
        self, gradients: NDArray[np.float32], directions: Sequence[Direction], leave_out: LeaveOut
    ) -> list[Agreement]:
        """The scores of all pairs, by pair_id, against each of the directions, in one pass.

        Raises RunDirectoryError where the folder no longer holds the pairs that it held.
        """
        import ray

        layout, shares, filesystem = self.layout, self._shares_of_rows, self._folder.filesystem
        shared = ray.put((gradients, directions))
        names = tuple(Agreement.__dataclass_fields__)

        def score(files: dict[str, NDArray[Any]]) -> Iterator[pa.Table]:
            vectors, against = ray.get(shared)
            for piece in _pieces(files["path"], filesystem, PRODUCT_COLUMNS):
                products = products_of(piece, layout, vectors, shares(piece))
                columns: dict[str, Any] = {}
                for number, direction in enumerate(against):
                    found = agreement(products, direction, leave_out)
                    columns.update((f"{name} {number}", pa.array(getattr(found, name))) for name in names)
                yield pa.table({"pair_id": piece["pair_id"], **columns})

        scored = self._files().map_batches(score, batch_format="numpy", batch_size=None)
        parts = []
        for part in scored.iter_batches(batch_format="pyarrow", batch_size=None):
            parts.append(part)
            self._progressed()
        table = pa.concat_tables(parts).sort_by("pair_id")
        if not table["pair_id"].combine_chunks().equals(self._pairs["pair_id"].combine_chunks()):
            raise RunDirectoryError(
                f"the sketches in {self._folder.path} changed while they were read: run select again"
            )
        return [
            Agreement(**{name: table[f"{name} {number}"].to_numpy() for name in names})
            for number in range(len(directions))
        ]

    @cached_property
    def _shares_of_rows(self) -> Callable[[Rows], Float64Array]:
        """How a task finds the shares of the pairs that it reads."""
        layout, index = self.layout, self.layout.rows_of(self._pairs)
        by_language = np.zeros(len(layout.languages))
        by_language[index] = self._shares
        if (by_language[index] == self._shares).all():  # no need to look for each pair
            return lambda batch: by_language[layout.rows_of(batch)]
        import ray

        known = ray.put((self._pairs["pair_id"].combine_chunks(), self._shares))

        def look_up(batch: Rows) -> Float64Array:
            ids, values = ray.get(known)
            return np.asarray(values[pc.index_in(batch["pair_id"], value_set=ids).to_numpy()])

        return look_up

    def _files(self) -> Dataset:
        """The paths of the sketches' files, as a dataset with one block per task."""
        import ray

        paths = [{"path": path, "number": number} for number, path in enumerate(self._folder.files(".parquet"))]
        return ray.data.from_items(paths, override_num_blocks=min(len(paths), _MAX_TASKS))


def _pieces(paths: Iterable[str], filesystem: FileSystem, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    """The rows of some files of sketches, in pieces whose sketches have about _PIECE bytes."""
    for path in paths:
        with (
            filesystem.open_input_file(path) as stream,
            pq.ParquetFile(stream, buffer_size=_PIECE) as file,
        ):
            bytes_each = file.schema_arrow.field("sketch").type.byte_width
            yield from file.iter_batches(max(1, _PIECE // bytes_each), columns=list(columns))
