"""A linear map from gradients, one (out, in) matrix a layer, to short vectors with nearly the same inner products.

Count-sketch (Charikar, Chen, Farach-Colton 2002; Weinberger et al. 2009, arXiv 0902.2206): every entry is added,
with a random sign, to one of `width` buckets. Here the bucket and the sign of an entry come from its place. The
entries of a layer, in row-major order, are cut into chunks of `width`; each chunk is turned by a random shift,
multiplied by a random window of random signs and by a random sign of its own, and added. So two entries of the
same chunk never share a bucket and two of different chunks do with probability 1 / width, with independent signs:
what a count-sketch needs, without a table of entries. For sketches S of the same width, over the random choice of
the seed,

    E <S(x), S(y)>   = <x, y>
    Var <S(x), S(y)> = (|x|^2 |y|^2 + <x, y>^2 - sum over chunks k of (|x_k|^2 |y_k|^2 + <x_k, y_k>^2)) / width

up to terms of order 1 / width^2, and never more than the count-sketch's own (|x|^2 |y|^2 + <x, y>^2 - 2 sum_i
x_i^2 y_i^2) / width (Weinberger et al. 2009, lemma 2): the entries within a chunk, where that formula only leaves
out an entry with itself, do not collide at all.

**Folding.** A layer's gradient is a sum of outer products d_t a_t^T over tokens. With a fold f the vectors d and a
are first shortened f times, each by a count-sketch of the same kind, and the (out / f, in / f) product of the
shortened ones is sketched as above: f^2 times fewer multiplications, still linear and unbiased. The price is an
error of its own that more width does not lower. It is largest for a gradient of rank one with itself, where each
layer adds to the variance

    |x|^4 ((1 + 2 (f - 1) / out) (1 + 2 (f - 1) / in) - 1),

and much smaller for gradients of more directions and for such as have little in common; errors of different layers
are independent. docs/results/engine.md has measured errors. Hence sides are only folded while they stay long:
`FoldRule`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_MAX_WIDTH = 2**31
# Entries of a layer up to which its order is kept on an accelerator, 5 bytes each: folded layers have fewer.
_KEPT_ORDER = 2**19


def _signed(value: int) -> int:
    """The two's-complement int64 with the same 64 bits as `value`."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> on int64 copies the sign bit, which the mask removes again."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _random_bits(count: int, *parts: object) -> Tensor:
    """(count,) int64 of random bits, the same in every process: splitmix64 (Steele, Lea, Flood 2014).

    Python's hash() differs between processes, so the stream starts at a digest of `parts`.
    """
    digest = hashlib.blake2b("\n".join(str(part) for part in parts).encode(), digest_size=8).digest()
    value = torch.arange(count, dtype=torch.int64) * _GOLDEN + int.from_bytes(digest, "little", signed=True)
    value = (value ^ _shift_right(value, 30)) * _MIX_1
    value = (value ^ _shift_right(value, 27)) * _MIX_2
    return value ^ _shift_right(value, 31)


def _random_below(limit: int, bits: Tensor) -> Tensor:
    """Numbers in [0, limit) from the 31 high bits; any limit will do."""
    return (_shift_right(bits, 33) * limit) >> 31


def _random_signs(bits: Tensor) -> Tensor:
    """float32 -1 or 1 from the lowest bit."""
    return (1 - 2 * (bits & 1)).float()


@dataclass(frozen=True)
class FoldRule:
    """How many times a layer's sides are shortened before their product is formed.

    `fold` for every side, or (None) for each side the largest power of two that leaves at least `min_side`.
    """

    fold: int | None = None
    min_side: int = 512

    def __call__(self, side: int) -> int:
        """The fold of a side of this length; 1 is no folding."""
        if self.fold is not None:
            return min(self.fold, side)
        fold = 1
        while side >= 2 * fold * self.min_side:
            fold *= 2
        return fold


@dataclass(frozen=True)
class _Order:
    """Chunks of features turned and signed, as one reordering: place p of chunk k gets feature index[k, p]."""

    index: Tensor  # int32, (chunks * length,)
    signs: Tensor  # int8, (chunks, length); 0 where a chunk has no such feature

    @classmethod
    def of(cls, shifts: Tensor, signs: Tensor, features: int, length: int) -> _Order:
        """Of chunks of `length`, each turned by its shift; `signs` (features,). All on one device."""
        place = torch.arange(length, device=shifts.device)
        chunk = torch.arange(len(shifts), device=shifts.device)[:, None]
        index = chunk * length + (place - shifts[:, None]) % length
        there = index < features
        index = torch.where(there, index, 0)
        return cls(index.flatten().int(), torch.where(there, signs[index], 0.0).to(torch.int8))

    def to(self, device: torch.device) -> _Order:
        return _Order(self.index.to(device), self.signs.to(device))

    def add_up(self, vectors: Tensor) -> Tensor:
        """(..., features) to (..., length) in the dtype of `vectors`, summed in float32 and rounded once."""
        turned = vectors.index_select(-1, self.index).unflatten(-1, self.signs.shape)
        return (turned * self.signs.to(vectors.dtype)).sum(-2)


class _Side:
    """The fold of one side of a layer: features in chunks of `length`, each turned, signed and added."""

    def __init__(self, features: int, fold: int, device: torch.device, *stream: object) -> None:
        self.features = features
        self.length = -(-features // fold)
        self.fold = fold
        bits = _random_bits(features, *stream)
        self.signs = _random_signs(bits)
        self._device = device
        self.shifts: list[int] = _random_below(self.length, bits[:fold]).tolist()

    @cached_property
    def _order(self) -> _Order:
        return _Order.of(torch.tensor(self.shifts), self.signs, self.features, self.length).to(self._device)

    def __call__(self, vectors: Tensor) -> Tensor:
        """(..., features) to (..., length), in the dtype of `vectors`."""
        if self.fold == 1:
            return vectors
        return self.in_chunks(vectors) if vectors.device.type == "cpu" else self.at_once(vectors)

    def at_once(self, vectors: Tensor) -> Tensor:
        """The same chunks in a few large kernels instead of two small ones each: what an accelerator wants."""
        return self._order.add_up(vectors)

    def in_chunks(self, vectors: Tensor) -> Tensor:
        """Chunk after chunk is added, which on a CPU keeps to its cache."""
        folded = vectors.new_zeros(*vectors.shape[:-1], self.length)
        signs = self.signs.to(vectors.dtype)
        for number, shift in enumerate(self.shifts):
            start = number * self.length
            end = min(start + self.length, self.features)
            # The chunk from `shift` on, and what goes over the end at the beginning.
            turn = min(end, start + self.length - shift)
            for source, target in ((slice(start, turn), shift), (slice(turn, end), 0)):
                count = source.stop - source.start
                if count > 0:
                    folded[..., target : target + count].addcmul_(vectors[..., source], signs[source])
        return folded


@dataclass(frozen=True)
class _Chunks:
    """Where the chunks of one layer's entries go: one number a chunk."""

    shifts: Tensor  # int64 in [0, width of a group)
    windows: Tensor  # int64, where the chunk's signs begin in the table of signs
    signs: Tensor  # float32

    def to(self, device: torch.device) -> _Chunks:
        return _Chunks(self.shifts.to(device), self.windows.to(device), self.signs.to(device))


class CountSketch:
    """The map for all layers of a model: deterministic from (seed, layer name, shapes), alike on every replica.

    A sketch has `groups` parts of equal width; the layers named in `group_of` go to the part given there, others
    to the first. Each part is a sketch of its layers' gradient alone, so parts can be compared part by part, and
    the whole is a sketch of the whole gradient. What is kept in memory is a few numbers for each chunk and
    feature.

    Raises ValueError for a width that is not positive or not a multiple of the number of groups.
    """

    def __init__(
        self,
        width: int,
        seed: int,
        fold: FoldRule | None = None,
        groups: int = 1,
        group_of: Mapping[str, int] | None = None,
    ) -> None:
        if not 1 <= width <= _MAX_WIDTH:
            raise ValueError(f"the sketch width is {width}; it must be from 1 to {_MAX_WIDTH}")
        if groups < 1 or width % groups:
            raise ValueError(f"the sketch width {width} cannot be cut into {groups} equal groups")
        self.width = width
        self.seed = seed
        self.groups = groups
        self.part = width // groups
        self.fold = fold or FoldRule()
        self._group_of = group_of or {}
        self._sides: dict[tuple[str, str, int, torch.device], _Side] = {}
        self._chunks: dict[tuple[str, int], _Chunks] = {}
        self._orders: dict[tuple[str, int, torch.device], _Order] = {}
        # Windows begin in the first two thirds: two chunks hardly ever have the same signs.
        self._sign_table = _random_signs(_random_bits(3 * self.part, seed, "signs"))

    def fold_inputs(self, name: str, vectors: Tensor) -> Tensor:
        """The inputs of a layer (..., in) folded to (..., ceil(in / fold)), in their own dtype."""
        return self._side(name, "inputs", vectors)(vectors)

    def fold_outputs(self, name: str, vectors: Tensor) -> Tensor:
        """The same for (the gradients of) a layer's outputs (..., out)."""
        return self._side(name, "outputs", vectors)(vectors)

    def _side(self, name: str, side: str, vectors: Tensor) -> _Side:
        features = vectors.shape[-1]
        key = (name, side, features, vectors.device)
        if key not in self._sides:
            self._sides[key] = _Side(features, self.fold(features), vectors.device, self.seed, name, side)
        return self._sides[key]

    def _chunks_of(self, name: str, entries: int) -> _Chunks:
        if (name, entries) not in self._chunks:
            bits = _random_bits(2 * -(-entries // self.part), self.seed, name, "chunks").view(2, -1)
            self._chunks[name, entries] = _Chunks(
                _random_below(self.part, bits[0]), _random_below(2 * self.part, bits[1]), _random_signs(bits[0])
            )
        return self._chunks[name, entries]

    def table(self, vectors: int, device: torch.device | str) -> Tensor:
        """An empty table for this many vectors: (vectors, groups, 2 * width / groups) float32.

        The second half takes what is turned over the end of the first; `sketches` adds it there.
        """
        return torch.zeros((vectors, self.groups, 2 * self.part), dtype=torch.float32, device=device)

    def sketches(self, table: Tensor) -> Tensor:
        """The finished sketches, (vectors, width) float32."""
        return (table[..., : self.part] + table[..., self.part :]).flatten(1)

    def add_(self, table: Tensor, name: str, folded: Tensor) -> None:
        """Add one layer of B vectors to their rows of a table, (B, groups, 2 * width / groups).

        `folded` (B, out / fold, in / fold) float32 holds the layer's folded gradients. The order of additions is
        fixed, so the same input gives the same bits.
        """
        part = table[:, self._group_of.get(name, 0)]
        entries = folded.flatten(1)
        chunks = self._chunks_of(name, entries.shape[1])
        if table.device.type == "cpu":
            signs = self._sign_table
            for number, (shift, window, sign) in enumerate(
                zip(chunks.shifts.tolist(), chunks.windows.tolist(), chunks.signs.tolist(), strict=True)
            ):
                chunk = entries[:, number * self.part : (number + 1) * self.part]
                length = chunk.shape[1]
                part[:, shift : shift + length].addcmul_(chunk, signs[window : window + length], value=sign)
        else:
            part[:, : self.part] += self._order_of(name, entries).add_up(entries)

    def _order_of(self, name: str, entries: Tensor) -> _Order:
        """What `add_` adds chunk by chunk, as one reordering; that of a small layer is kept."""
        count, device = entries.shape[1], entries.device
        key = (name, count, device)
        if key in self._orders:
            return self._orders[key]
        chunks = self._chunks_of(name, count).to(device)
        if self._sign_table.device != device:
            self._sign_table = self._sign_table.to(device)
        within = torch.arange(self.part, device=device)
        signs = self._sign_table[chunks.windows[:, None] + within] * chunks.signs[:, None]
        order = _Order.of(chunks.shifts, signs.flatten()[:count], count, self.part)
        if count <= _KEPT_ORDER:
            self._orders[key] = order
        return order

    def sketch_vector(self, layers: Mapping[str, Tensor]) -> Tensor:
        """Sketch of one vector given as {layer name: (out, in) tensor}: (width,) float32."""
        if not layers:
            raise ValueError("no layers to sketch; give at least one")
        device = next(iter(layers.values())).device
        table = self.table(1, device)
        for name, values in layers.items():
            folded = self.fold_outputs(name, self.fold_inputs(name, values.float()).T).T
            self.add_(table, name, folded[None])
        return self.sketches(table)[0]


def layer_groups(names: Sequence[str], groups: int) -> dict[str, int]:
    """The layers, in the model's order, cut into `groups` runs of nearly equal numbers of layers.

    Raises ValueError if there are fewer layers than groups.
    """
    if groups > len(names):
        raise ValueError(f"{len(names)} layers cannot make {groups} groups")
    return {name: index * groups // len(names) for index, name in enumerate(names)}
