"""The two passes over the sketches table: sums by language, then every pair's products with them.

Sketches are read and reduced in the same Ray Data task; what leaves it is one sum per language, or a few numbers
per pair. So memory does not depend on how many sketches there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from congrad_ray.recipe import Sketch
from congrad_ray.rundir import Folder
from congrad_ray.surgery.directions import Float64Array
from congrad_ray.surgery.scores import Agreement, Direction, LeaveOut, PairProducts, agreement
from congrad_ray.tables import stored_numbers

if TYPE_CHECKING:
    from ray.data import Dataset

# Sketches turned into float64 at once: as many numbers as a processor's cache holds.
_NUMBERS_AT_A_TIME = 2**18
_SUMS_AT_A_TIME = 512


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

    def rows_of(self, batch: pa.Table) -> NDArray[np.int64]:
        """The language of each row as an index into `languages`."""
        found = pc.index_in(batch["language"], value_set=pa.array(self.languages, pa.string()))
        return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int64)

    def sketches(self, batch: pa.Table) -> Iterator[tuple[slice, Float64Array]]:
        """The sketches of a batch without their scales, some rows at a time: (rows, blocks, width / blocks).

        The results, which are few, are multiplied by the scales; that spares a copy of all numbers.
        """
        numbers = stored_numbers(batch, self.dtype)
        step = max(1, _NUMBERS_AT_A_TIME // numbers.shape[1])
        for start in range(0, len(batch), step):
            rows = slice(start, min(start + step, len(batch)))
            yield rows, numbers[rows].astype(np.float64).reshape(rows.stop - rows.start, self.blocks, -1)


# Shares of pairs in their languages' gradients, for the rows of a batch.
Shares = Callable[[pa.Table], Float64Array]

SUM_COLUMNS = ("pair_id", "language", "sketch", "sketch_scale", "coefficient")
PRODUCT_COLUMNS = (*SUM_COLUMNS, "norm")


def sums_of(batch: pa.Table, layout: Layout, shares: Float64Array) -> Float64Array:
    """sum of shares * c * s over a batch's pairs of each language, (languages, blocks, width / blocks)."""
    factors = np.zeros((len(layout.languages), len(batch)))
    weights = shares * batch["coefficient"].to_numpy() * _scales(batch)
    factors[layout.rows_of(batch), np.arange(len(batch))] = weights
    total: Any = 0.0
    for rows, sketches in layout.sketches(batch):
        total = total + factors[:, rows] @ sketches.reshape(len(sketches), -1)
    return np.asarray(total, dtype=np.float64).reshape(len(layout.languages), layout.blocks, -1)


def products_of(
    batch: pa.Table, layout: Layout, gradients: NDArray[np.float32], shares: Float64Array
) -> PairProducts:
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


def _scales(batch: pa.Table) -> Float64Array:
    return np.asarray(batch["sketch_scale"].to_numpy(), dtype=np.float64)


def language_gradients(sketches: Folder, layout: Layout, shares: Shares) -> NDArray[np.float32]:
    """The gradient of every language, (languages, blocks, width / blocks): the sum of shares * c * sketch(u).

    u points where the loss goes down, so these are descent directions; sketches are linear, so the sum of
    sketches is the sketch of the sum. Sums are taken in float64 and rounded at the end, so that the order in which
    parts come in, which changes the last bits of a sum, hardly ever shows.
    """

    def reduce(batch: pa.Table) -> dict[str, NDArray[Any]]:
        total = sums_of(batch, layout, shares(batch))
        return {"language": np.arange(len(total)), "sums": total.reshape(len(total), -1)}

    def add(batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        languages = np.unique(batch["language"])
        if not len(languages):
            return batch
        sums = [batch["sums"][batch["language"] == language].sum(axis=0) for language in languages]
        return {"language": languages, "sums": np.stack(sums)}

    partial = _read(sketches, SUM_COLUMNS).map_batches(reduce, batch_format="pyarrow", batch_size=None)
    # The driver adds up what is left; of very many parts it gets one sum for hundreds of them.
    partial = partial.repartition(target_num_rows_per_block=_SUMS_AT_A_TIME)
    partial = partial.map_batches(add, batch_format="numpy", batch_size=None)
    sums: Any = 0.0
    for batch in partial.iter_batches(batch_format="numpy", batch_size=None):
        total = np.zeros((len(layout.languages), batch["sums"].shape[1]))
        np.add.at(total, batch["language"], batch["sums"])
        sums = sums + total
    return np.asarray(sums, dtype=np.float32).reshape(len(layout.languages), layout.blocks, -1)


def score_pairs(
    sketches: Folder,
    layout: Layout,
    gradients: NDArray[np.float32],
    direction: Direction,
    leave_out: LeaveOut,
    shares: Shares,
) -> tuple[pa.Array, Agreement]:
    """The ids of all pairs, ascending, and their scores against `direction`."""
    import ray

    shared = ray.put((gradients, direction))

    def score(batch: pa.Table) -> pa.Table:
        # In a local variable, so that neither this process nor a worker keeps what the last batch was made of.
        vectors, against = ray.get(shared)
        found = agreement(products_of(batch, layout, vectors, shares(batch)), against, leave_out)
        columns = {name: pa.array(getattr(found, name)) for name in Agreement.__dataclass_fields__}
        return pa.table({"pair_id": batch["pair_id"], **columns})

    scored = _read(sketches, PRODUCT_COLUMNS).map_batches(score, batch_format="pyarrow", batch_size=None)
    parts = list(scored.iter_batches(batch_format="pyarrow", batch_size=None))
    table = pa.concat_tables(parts).sort_by("pair_id")
    columns = {name: table[name].to_numpy() for name in Agreement.__dataclass_fields__}
    return table["pair_id"].combine_chunks(), Agreement(**columns)


def _read(sketches: Folder, columns: tuple[str, ...]) -> Dataset:
    import ray

    return ray.data.read_parquet(sketches.files(".parquet"), filesystem=sketches.filesystem, columns=list(columns))
