"""The sketches of a dataset in a form that thousands of selections are made from, with labels flipped at will."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from congrad_ray.config.recipe import Sketch
from congrad_ray.rundir.directory import Folder, RunDirectoryError
from congrad_ray.stages.select.directions import Float64Array
from congrad_ray.stages.sketch.schema import dtype_of, sketch_bytes, sketch_numbers, sketches_schema
from real_study.pairs import SELECT
from real_study.protocol import DatasetName, Planting
from real_study.sketching import EMBEDDING, PAIRS_FILE, SKETCHES

_LEAST_NUMBERS = 64  # of a block: a recipe allows no sketch of fewer
# What a flipped label turns round, beside the gradient.
_OTHER_SIDE = {"chosen": "rejected", "chosen_logps": "rejected_logps", "chosen_tokens": "rejected_tokens"}


@dataclass(frozen=True)
class Sketched:
    """Pairs with the coordinates of their sketches, and how to read those.

    `pairs`: a table sorted by pair_id with the columns that `select_pairs` takes, chosen_score and rejected_score
    where people rated, and of the study's own the texts.
    """

    pairs: pa.Table
    sketch: Sketch

    @property
    def blocks(self) -> int:
        return self.sketch.groups

    @property
    def languages(self) -> NDArray[np.str_]:
        """Of every pair, (N,)."""
        return np.asarray(self.pairs["language"].to_pylist(), dtype=np.str_)

    def coordinates(self) -> NDArray[np.float32]:
        """(N, blocks, numbers of a block), flipped pairs with their sign."""
        numbers = sketch_numbers(self.pairs, "float32")
        return numbers.reshape(len(self.pairs), self.blocks, -1)

    def of_blocks(self, blocks: Sequence[int]) -> Sketched:
        """The same pairs with the sketches and norms of some blocks of layers alone."""
        coordinates = self.coordinates()[:, list(blocks)]
        norms = np.linalg.norm(coordinates.reshape(len(coordinates), -1).astype(np.float64), axis=1)
        pairs = replaced(self.pairs, "norm", pa.array(norms, self.pairs.schema.field("norm").type))
        return with_coordinates(pairs, coordinates)

    def of_languages(self, languages: Sequence[str]) -> Sketched:
        """The pairs of some languages."""
        return replace(self, pairs=self.pairs.filter(pa.array(np.isin(self.languages, list(languages)))))


@dataclass(frozen=True)
class Draw:
    """Pairs of one draw, some of whose labels are planted."""

    data: Sketched
    flipped: NDArray[np.bool_]
    """(N,): whether the label is the file's turned round."""
    planted: tuple[str, ...]
    """The languages whose labels were planted in."""


def read_sketched(run: Folder, dataset: DatasetName, groups: int) -> Sketched:
    """The dataset's pairs to select from with their sketches, which have `groups` blocks of layers.

    Raises RunDirectoryError where some have none.
    """
    pairs = (run / dataset).read_table(name=PAIRS_FILE)
    pairs = pairs.filter(pc.equal(pairs["part"], SELECT)).sort_by("pair_id")
    sketches = (run / dataset / SKETCHES).read_table().sort_by("pair_id").combine_chunks()
    missing = len(pairs) - len(sketches)
    if missing:
        raise RunDirectoryError(
            f"{missing} of {len(pairs)} pairs of {dataset} have no sketch: run `sketch` to the end"
        )
    dtype = dtype_of(sketches.schema)
    assert dtype is not None  # sketches_schema names it
    grams = block_grams(sketch_numbers(sketches, dtype), groups)
    if pairs["chosen_score"].null_count:
        pairs = pairs.drop_columns(["chosen_score", "rejected_score"])
    for name in sketches.schema.names:
        if name not in (*pairs.schema.names, "audit_exact", "audit_sketched"):
            pairs = pairs.append_column(sketches.schema.field(name), sketches[name])
    return with_coordinates(pairs, coordinates_of(grams))


def block_grams(numbers: NDArray[np.float32], blocks: int) -> Float64Array:
    """Inner products (blocks, N, N) of sketches (N, width) in each of their blocks."""
    wide = numbers.reshape(len(numbers), blocks, -1).astype(np.float64)
    return np.einsum("nbi,mbi->bnm", wide, wide, optimize=True)


def coordinates_of(grams: Float64Array) -> NDArray[np.float32]:
    """Vectors (N, blocks, n) with the inner products `grams` (blocks, N, N): all that a selection looks at.

    With V the eigenvectors and l the eigenvalues of a block's matrix they are V sqrt(l). n is N, or 64 where that
    is less, the rest zero.
    """
    count = grams.shape[1]
    found = np.zeros((count, len(grams), max(count, _LEAST_NUMBERS)), dtype=np.float32)
    for block, gram in enumerate(grams):
        values, vectors = np.linalg.eigh((gram + gram.T) / 2)
        found[:, block, :count] = vectors * np.sqrt(np.maximum(values, 0.0))
    return found


def with_coordinates(pairs: pa.Table, coordinates: NDArray[np.float32]) -> Sketched:
    """The pairs with sketches of these numbers, (N, blocks, n) each, in the place of theirs."""
    count, blocks, numbers = coordinates.shape
    width = blocks * numbers
    field = sketches_schema(width, "float32").field("sketch")
    column = pa.array(sketch_bytes(coordinates.reshape(count, width)), field.type)
    for name, field_, values in (
        ("sketch", field, column),
        ("sketch_scale", pa.field("sketch_scale", pa.float32()), pa.array(np.ones(count, np.float32))),
    ):
        place = pairs.schema.get_field_index(name)
        pairs = pairs.append_column(field_, values) if place < 0 else pairs.set_column(place, field_, values)
    return Sketched(pairs.combine_chunks(), Sketch(width=width, groups=blocks, dtype="float32", audit_pairs=0))


def with_embedding(run: Folder, data: Sketched, gram: Float64Array) -> tuple[Sketched, float]:
    """The pairs of `data` with the embedding's gradient beside that of `gram` (N, N), and its mean share of |u|^2.

    Raises RunDirectoryError where a pair's is missing.
    """
    table = (run / "alpaca" / EMBEDDING).read_table().sort_by("pair_id")
    if table["pair_id"].to_pylist() != data.pairs["pair_id"].to_pylist():
        raise RunDirectoryError("the embedding's gradients are not those of the subset: run `sketch` to the end")
    numbers = np.stack([np.frombuffer(row, np.float32) for row in table["sketch"].to_pylist()])
    squares = table["squared_norm"].to_numpy()
    both = np.concatenate([gram[None], block_grams(numbers, 1)])
    share = float(np.mean(squares / (squares + np.diag(gram))))
    return with_coordinates(data.pairs, coordinates_of(both)), share


def flip(data: Sketched, flipped: NDArray[np.bool_]) -> Sketched:
    """The pairs with the labels of `flipped` (N,) turned round: chosen and rejected change places.

    u = grad log p(chosen) - grad log p(rejected) changes its sign and nothing else, and sketches are linear, so
    their scale does. At policy = reference and without length penalty c = beta / 2 is the same for both. Scores
    stay: a judge that gave the wrong label gave it by them, and its margin is above zero.
    """
    pairs = data.pairs
    index = pa.array(np.arange(len(pairs)) + np.where(flipped, len(pairs), 0))
    for one, other in _OTHER_SIDE.items():
        for name, opposite in ((one, other), (other, one)):
            if name in pairs.column_names:
                both = [*data.pairs[name].chunks, *data.pairs[opposite].chunks]
                pairs = replaced(pairs, name, pa.chunked_array(both, data.pairs[name].type).take(index))
    scale = np.where(flipped, -1.0, 1.0) * pairs["sketch_scale"].to_numpy()
    pairs = replaced(pairs, "sketch_scale", pa.array(scale.astype(np.float32)))
    return replace(data, pairs=pairs.combine_chunks())


def replaced(table: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The table with other values in a column."""
    return table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)


def draw(data: Sketched, planting: Planting, share: float, seed: int) -> Draw:
    """A share of each language's pairs, and the labels that `planting` flips; all by `seed` alone.

    Draws of the same seed have the same pairs in all plantings, and the languages of a planting in two are among
    those of one in three.
    """
    generator = np.random.default_rng([seed, 2])  # not that of the orders of a selection with this seed
    languages, names = data.languages, sorted(set(data.languages.tolist()))
    order = generator.permutation(len(names))
    planted = tuple(sorted(names[place] for place in order[: planting.languages]))
    longer = (data.pairs["rejected_tokens"].to_numpy() > data.pairs["chosen_tokens"].to_numpy()) & planting.longer
    wanted = np.zeros(len(languages), dtype=np.bool_)
    flipped = np.zeros(len(languages), dtype=np.bool_)
    for name in names:
        members = generator.permutation(np.flatnonzero(languages == name))
        members = members[: max(1, round(share * len(members)))]
        wanted[members] = True
        ranks = generator.permutation(members)
        if name in planted and planting.longer:
            flipped[members] = longer[members]
        else:
            wrong = planting.share if name in planted else planting.elsewhere
            flipped[ranks[: round(wrong * len(ranks))]] = True
    turned = flip(data, flipped)
    drawn = replace(turned, pairs=turned.pairs.filter(pa.array(wanted)).combine_chunks())
    return Draw(drawn, flipped[wanted], planted)
