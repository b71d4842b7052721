"""A count-sketch of vectors indexed by (layer name, output index, input index).

Entry (i, j) of a layer is added, with a sign s in {-1, +1}, to one of `width` buckets h; bucket and sign come
from a hash of (seed, layer name, i, j) (Charikar, Chen, Farach-Colton 2002; Weinberger et al. 2009, arXiv
0902.2206). For sketches S of the same width and seed, over the random choice of the seed,

    E <S(x), S(y)>   = <x, y>
    Var <S(x), S(y)> = (|x|^2 |y|^2 + <x, y>^2 - 2 sum_i x_i^2 y_i^2) / width

(Weinberger et al. 2009, lemma 2). So a cosine between sketches is off by at most about sqrt(2 / width).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_MAX_WIDTH = 2**31
_MAX_SIDE = 2**31


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


def _mix(value: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) on int64, which wraps modulo 2**64."""
    value = (value ^ _shift_right(value, 30)) * _MIX_1
    value = (value ^ _shift_right(value, 27)) * _MIX_2
    return value ^ _shift_right(value, 31)


class CountSketch:
    """A linear map from dictionaries of per-layer (out, in) tensors to float32 vectors of `width` entries.

    The same width and seed give the same map in every process and on every device. Any width from 1 to 2**31
    will do. `cache_bytes` bounds the memory of the tables kept between calls (5 bytes an entry); tables that
    do not fit are worked out anew each time, and none is thrown out for another, because layers come round in
    the same order.
    """

    def __init__(self, width: int, seed: int, cache_bytes: int = 2**30) -> None:
        if not 1 <= width <= _MAX_WIDTH:
            raise ValueError(f"the sketch width is {width}; it must be from 1 to {_MAX_WIDTH}")
        self.width = width
        self.seed = seed
        self.cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._tables: dict[tuple[str, tuple[int, int], torch.device], tuple[Tensor, Tensor]] = {}

    def layer_tables(self, name: str, shape: tuple[int, int], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Bucket (out, in) int32 and sign (out, in) int8 of every entry of a layer of `shape` (out, in).

        Both depend only on seed, width, `name`, i and j, not on the shape: a corner of a layer has the
        tables' corner.
        """
        key = (name, (shape[0], shape[1]), torch.device(device))
        if key in self._tables:
            return self._tables[key]
        tables = self._compute_tables(*key)
        size = sum(table.numel() * table.element_size() for table in tables)
        if self._cached_bytes + size <= self.cache_bytes:
            self._tables[key] = tables
            self._cached_bytes += size
        return tables

    def _compute_tables(self, name: str, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        rows, columns = shape
        if max(shape) >= _MAX_SIDE:
            raise ValueError(f"layer {name!r} has shape {shape}; a side must be below {_MAX_SIDE}")
        # Python's hash() differs between processes, so the layer's own stream starts at a digest.
        digest = hashlib.blake2b(f"{self.seed}\n{name}".encode(), digest_size=8).digest()
        stream = int.from_bytes(digest, "little", signed=True)
        bucket = torch.empty(shape, dtype=torch.int32, device=device)
        sign = torch.empty(shape, dtype=torch.int8, device=device)
        column = torch.arange(columns, dtype=torch.int64, device=device)
        # A block of rows at a time: the int64 intermediates would otherwise take several times the tables'
        # memory.
        block = max(1, 2**22 // columns)
        for start in range(0, rows, block):
            row = torch.arange(start, min(start + block, rows), dtype=torch.int64, device=device)
            position = (row[:, None] << 32) + column[None, :]
            bits = _mix(position * _GOLDEN + stream)
            # Bucket from the 31 high bits (scaled, so that any width will do), sign from the lowest.
            bucket[start : start + block] = (_shift_right(bits, 33) * self.width) >> 31
            sign[start : start + block] = 1 - 2 * (bits & 1)
        return bucket, sign

    def add_(self, sketches: Tensor, name: str, gradient: Tensor) -> None:
        """Add the sketch of one layer of B vectors in place.

        `sketches` is (B, width) float32, `gradient` (B, out, in) of any float dtype on the same device. On
        CUDA the additions happen in no fixed order, so the last bits may differ between runs.
        """
        if sketches.shape != (gradient.shape[0], self.width) or sketches.dtype != torch.float32:
            raise ValueError(
                f"sketches is {tuple(sketches.shape)} {sketches.dtype}; for a gradient of shape "
                f"{tuple(gradient.shape)} it must be {(gradient.shape[0], self.width)} torch.float32"
            )
        bucket, sign = self.layer_tables(name, (gradient.shape[1], gradient.shape[2]), gradient.device)
        signed = (gradient.float() * sign).flatten(1)
        sketches.scatter_add_(1, bucket.flatten().long().expand(signed.shape[0], -1), signed)

    def sketch_vector(self, layers: Mapping[str, Tensor]) -> Tensor:
        """Sketch of one vector given as {layer name: (out, in) tensor}: (width,) float32."""
        if not layers:
            raise ValueError("no layers to sketch; give at least one")
        device = next(iter(layers.values())).device
        sketch = torch.zeros((1, self.width), dtype=torch.float32, device=device)
        for name, values in layers.items():
            self.add_(sketch, name, values[None])
        return sketch[0]
