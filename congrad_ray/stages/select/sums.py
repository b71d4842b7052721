"""What a selection needs of the sketches: sums by language, then every pair's products with them.

The functions work on a piece of the sketches table at a time. `TableSketches` applies them to a table in memory,
`streaming.StreamedSketches` to files, with Ray Data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from congrad_ray.config.names import LeaveOut
from congrad_ray.config.recipe import Sketch
from congrad_ray.stages.select.gram import Float64Array
from congrad_ray.stages.select.scores import Agreement, Direction, PairProducts, agreement
from congrad_ray.stages.sketch.schema import stored_numbers

# Rows of the sketches table.
Rows: TypeAlias = pa.Table | pa.RecordBatch

SUM_COLUMNS = ("pair_id", "language", "sketch", "sketch_scale", "coefficient")
PRODUCT_COLUMNS = (*SUM_COLUMNS, "norm")

# Sketches turned into float64 at once: as many numbers as a processor's cache holds.
_NUMBERS_AT_A_TIME = 2**18


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


class Sketches(Protocol):
    """Sketches of N pairs in L languages, wherever they are: the two passes that a selection makes over them."""

    @property
    def layout(self) -> Layout:
        """How to read them."""

    def language_gradients(self) -> NDArray[np.float32]:
        """The gradient of every language, (L, blocks, width / blocks): its pairs' sum of share * c * sketch."""

    def agreement(
        self, gradients: NDArray[np.float32], directions: Sequence[Direction], leave_out: LeaveOut
    ) -> list[Agreement]:
        """Every pair's scores, by pair_id, against each of the directions, in one pass."""


@dataclass(frozen=True)
class TableSketches:
    """Sketches in a table in memory."""

    table: pa.Table
    """Sorted by pair_id."""
    layout: Layout
    shares: Float64Array
    """(N,) of each pair in its language's gradient."""

    def language_gradients(self) -> NDArray[np.float32]:
        return sums_of(self.table, self.layout, self.shares).astype(np.float32)

    def agreement(
        self, gradients: NDArray[np.float32], directions: Sequence[Direction], leave_out: LeaveOut
    ) -> list[Agreement]:
        products = products_of(self.table, self.layout, gradients, self.shares)
        return [agreement(products, direction, leave_out) for direction in directions]


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


def gram_matrices(gradients: NDArray[np.float32]) -> Float64Array:
    """Inner products of the languages' gradients (languages, blocks, width / blocks) in each block, (B, L, L)."""
    wide = gradients.astype(np.float64)
    return np.einsum("kbi,lbi->bkl", wide, wide)


def _scales(batch: Rows) -> Float64Array:
    return np.asarray(batch["sketch_scale"].to_numpy(), dtype=np.float64)
