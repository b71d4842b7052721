"""The two passes over the sketches table: sums by language, then every pair's products with them.

A Ray Data task gets the paths of some files, reads them a piece at a time and reduces each piece where it lies;
what leaves the task is one sum per language, or a few numbers per pair. So memory does not depend on how many
sketches there are, and no sketch is copied into Ray's object store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow.fs import FileSystem

from congrad_ray.config.recipe import LeaveOut, Sketch
from congrad_ray.rundir.directory import Folder
from congrad_ray.stages.select.directions import Float64Array
from congrad_ray.stages.select.scores import Agreement, Direction, PairProducts, agreement
from congrad_ray.stages.sketch.schema import stored_numbers

if TYPE_CHECKING:
    from ray.data import Dataset

# Rows of the sketches table.
Rows: TypeAlias = pa.Table | pa.RecordBatch

# Sketches turned into float64 at once: as many numbers as a processor's cache holds.
_NUMBERS_AT_A_TIME = 2**18
# Bytes of sketches that a task holds at once, and reads ahead.
_PIECE = 2**25
# Enough to keep a large cluster busy and to spread it evenly; each gives the driver one sum per language.
_MOST_TASKS = 256


@dataclass(frozen=True)
class Layout:
    """How to read the sketches table."""

    languages: tuple[str, ...]
    blocks: int
    dtype: str
    exact: bool  # norms are those of the gradients, of which the table holds only the part among the languages'

    @classmethod
    def of(cls, settings: Sketch, languages: tuple[str, ...]) -> Layout:
        exact = settings.method == "exact"
        return cls(languages, 1 if exact else settings.groups, settings.stored_dtype, exact)

    def rows_of(self, batch: Rows) -> NDArray[np.int64]:
        """The language of each row as an index into `languages`."""
        found = pc.index_in(batch["language"], value_set=pa.array(self.languages, pa.string()))
        return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int64)

    def sketches(self, batch: Rows) -> Iterator[tuple[slice, Float64Array]]:
        """The sketches of a batch without their scales, some rows at a time: (rows, blocks, width / blocks).

        The results, which are few, are multiplied by the scales; that spares a copy of all numbers.
        """
        numbers = stored_numbers(batch, self.dtype)
        step = max(1, _NUMBERS_AT_A_TIME // numbers.shape[1])
        for start in range(0, len(batch), step):
            rows = slice(start, min(start + step, len(batch)))
            yield rows, numbers[rows].astype(np.float64).reshape(rows.stop - rows.start, self.blocks, -1)


# Shares of pairs in their languages' gradients, for the rows of a batch.
Shares = Callable[[pa.RecordBatch], Float64Array]

SUM_COLUMNS = ("pair_id", "language", "sketch", "sketch_scale", "coefficient")
PRODUCT_COLUMNS = (*SUM_COLUMNS, "norm")


def sums_of(batch: Rows, layout: Layout, shares: Float64Array) -> Float64Array:
    """sum of shares * c * s over a batch's pairs of each language, (languages, blocks, width / blocks)."""
    factors = np.zeros((len(layout.languages), len(batch)))
    weights = shares * batch["coefficient"].to_numpy() * _scales(batch)
    factors[layout.rows_of(batch), np.arange(len(batch))] = weights
    total: Any = 0.0
    for rows, sketches in layout.sketches(batch):
        total = total + factors[:, rows] @ sketches.reshape(len(sketches), -1)
    return np.asarray(total, dtype=np.float64).reshape(len(layout.languages), layout.blocks, -1)


def products_of(batch: Rows, layout: Layout, gradients: NDArray[np.float32], shares: Float64Array) -> PairProducts:
    """A batch's products with the languages' gradients (languages, blocks, width / blocks)."""
    wide = gradients.astype(np.float64)
    dots = np.empty((len(batch), layout.blocks, len(layout.languages)))
    squares = np.empty((len(batch), layout.blocks))
    for rows, sketches in layout.sketches(batch):
        for block in range(layout.blocks):
            part = sketches[:, block]
            dots[rows, block] = part @ wide[:, block].T
            squares[rows, block] = np.einsum("ni,ni->n", part, part)
    scales = _scales(batch)[:, None]
    dots *= scales[..., None]
    squares *= scales**2
    if layout.exact:
        squares[:, 0] = batch["norm"].to_numpy() ** 2
    return PairProducts(dots, squares, layout.rows_of(batch), shares, batch["coefficient"].to_numpy())


def _scales(batch: Rows) -> Float64Array:
    return np.asarray(batch["sketch_scale"].to_numpy(), dtype=np.float64)


def language_gradients(
    sketches: Folder, layout: Layout, shares: Shares, progressed: Callable[[], None] = lambda: None
) -> NDArray[np.float32]:
    """The gradient of every language, (languages, blocks, width / blocks): the sum of shares * c * sketch(u).

    u points where the loss goes down, so these are descent directions; sketches are linear, so the sum of
    sketches is the sketch of the sum. Sums are taken in float64 and in the order of the files' names, so that the
    same files give the same numbers to the last bit.
    """

    def reduce(files: dict[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        pieces = _pieces(files["path"], sketches.filesystem, SUM_COLUMNS)
        total: Any = sum(sums_of(piece, layout, shares(piece)) for piece in pieces)
        if np.ndim(total):  # not where all files are empty
            yield {"first": files["number"][:1], "next": files["number"][-1:] + 1, "sums": total[None]}

    partial = _files(sketches).map_batches(reduce, batch_format="numpy", batch_size=None)
    sums: Any = 0.0
    turn, early = 0, {}
    for batch in partial.iter_batches(batch_format="numpy", batch_size=None):
        for first, following, part in zip(batch["first"], batch["next"], batch["sums"], strict=True):
            early[int(first)] = (int(following), part)
        while turn in early:
            turn, part = early.pop(turn)
            sums = sums + part
        progressed()
    for _, part in (early[first] for first in sorted(early)):  # behind a task whose files were all empty
        sums = sums + part
    return np.asarray(sums, dtype=np.float32)


def gram_matrices(gradients: NDArray[np.float32]) -> Float64Array:
    """Inner products of the languages' gradients (languages, blocks, width / blocks) in each block, (B, L, L)."""
    wide = gradients.astype(np.float64)
    return np.einsum("kbi,lbi->bkl", wide, wide)


def score_pairs(
    sketches: Folder,
    layout: Layout,
    gradients: NDArray[np.float32],
    direction: Direction,
    leave_out: LeaveOut,
    shares: Shares,
    progressed: Callable[[], None] = lambda: None,
) -> tuple[pa.Array, Agreement]:
    """The ids of all pairs, ascending, and their scores against `direction`."""
    import ray

    shared = ray.put((gradients, direction))

    def score(files: dict[str, NDArray[Any]]) -> Iterator[pa.Table]:
        vectors, against = ray.get(shared)
        for piece in _pieces(files["path"], sketches.filesystem, PRODUCT_COLUMNS):
            found = agreement(products_of(piece, layout, vectors, shares(piece)), against, leave_out)
            columns = {name: pa.array(getattr(found, name)) for name in Agreement.__dataclass_fields__}
            yield pa.table({"pair_id": piece["pair_id"], **columns})

    scored = _files(sketches).map_batches(score, batch_format="numpy", batch_size=None)
    parts = []
    for part in scored.iter_batches(batch_format="pyarrow", batch_size=None):
        parts.append(part)
        progressed()
    table = pa.concat_tables(parts).sort_by("pair_id")
    columns = {name: table[name].to_numpy() for name in Agreement.__dataclass_fields__}
    return table["pair_id"].combine_chunks(), Agreement(**columns)


def _files(sketches: Folder) -> Dataset:
    """The paths of the sketches' files, as a dataset of as many blocks as there shall be tasks."""
    import ray

    paths = [{"path": path, "number": number} for number, path in enumerate(sketches.files(".parquet"))]
    return ray.data.from_items(paths, override_num_blocks=min(len(paths), _MOST_TASKS))


def _pieces(paths: Iterable[str], filesystem: FileSystem, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    """The rows of some files of sketches, so many at a time that their sketches have about _PIECE bytes."""
    for path in paths:
        with (
            filesystem.open_input_file(path) as stream,
            pq.ParquetFile(stream, buffer_size=_PIECE) as file,
        ):
            bytes_each = file.schema_arrow.field("sketch").type.byte_width
            yield from file.iter_batches(max(1, _PIECE // bytes_each), columns=list(columns))
