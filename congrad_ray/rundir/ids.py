"""Sets of row ids as sorted arrays of 16-byte keys: a sixth of the memory of a Python set, and cheap to send.

An id of 32 lowercase hexadecimal digits, which is what `data.tables.row_id` makes, is its own key; of any other
text the key is a 16-byte hash. Keys of hexadecimal ids have the order of the ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Keys = NDArray[np.bytes_]
"""(N,) of 16 bytes each."""

_DIGITS = 32
_KEY = np.dtype("S16")
# The value of a hexadecimal digit by its byte; 255 for any other byte.
_VALUES = np.full(256, 255, np.uint8)
_VALUES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16, dtype=np.uint8)


def keys_of(ids: pa.Array | pa.ChunkedArray | Sequence[str]) -> Keys:
    """The keys (N,) of ids, in their order. Raises ValueError for an id that is null."""
    array = ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(ids, pa.string())
    chunks = array.chunks if isinstance(array, pa.ChunkedArray) else [array]
    return np.concatenate([np.empty(0, _KEY), *map(_keys_of_chunk, chunks)])


def _keys_of_chunk(ids: pa.Array) -> Keys:
    if ids.null_count:
        raise ValueError(f"{ids.null_count} ids are null")
    if not len(ids):
        return np.empty(0, _KEY)
    keys = _keys_of_digits(ids)
    if keys is None:
        texts = (text.encode("utf-8", "surrogatepass") for text in ids.to_pylist())
        keys = np.array([_key(text) for text in texts], dtype=_KEY)
    return keys


def _keys_of_digits(ids: pa.Array) -> Keys | None:
    """None where not all are hexadecimal."""
    if not pc.all(pc.equal(pc.binary_length(ids), _DIGITS)).as_py():
        return None
    ids = ids.cast(pa.large_string())
    start = np.frombuffer(ids.buffers()[1], np.int64)[ids.offset]
    values = _VALUES[np.frombuffer(ids.buffers()[2], np.uint8)[start : start + len(ids) * _DIGITS]]
    if values.max() > 15:
        return None
    keys: Keys = (values[::2] << 4 | values[1::2]).view(_KEY)
    return keys


def _key(text: bytes) -> bytes:
    if len(text) == _DIGITS and _VALUES[np.frombuffer(text, np.uint8)].max() <= 15:
        return bytes.fromhex(text.decode())
    # `row_id` of a text is the plain hash of it, which is another id.
    return hashlib.blake2b(text, digest_size=16, person=b"key of an id").digest()


def repeated(keys: Keys) -> Keys:
    """The keys that are in a sorted array more than once, sorted, each once."""
    return _distinct(keys[1:][keys[1:] == keys[:-1]])


def count_distinct(keys: Keys) -> int:
    """How many different keys (N,) there are; sorts the array in place."""
    keys.sort()
    return len(keys) and 1 + int(np.count_nonzero(keys[1:] != keys[:-1]))


def _distinct(keys: Keys) -> Keys:
    if len(keys) < 2:
        return keys
    return keys[np.concatenate([[True], keys[1:] != keys[:-1]])]


@dataclass(frozen=True, eq=False)
class Ids:
    """A set of ids. Cheap to send to Ray workers: one array, which processes of a node share."""

    keys: Keys
    """Sorted, each once."""

    @classmethod
    def from_keys(cls, parts: Iterable[Keys]) -> Ids:
        """Of all these keys, in any order."""
        keys = np.concatenate([np.empty(0, _KEY), *parts])
        keys.sort()
        return cls(_distinct(keys))

    @classmethod
    def from_parts(cls, parts: Iterable[pa.Array | pa.ChunkedArray | Sequence[str]]) -> Ids:
        """Of the ids in all these columns or lists."""
        return cls.from_keys(map(keys_of, parts))

    def __len__(self) -> int:
        return len(self.keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ids) and np.array_equal(self.keys, other.keys)

    __hash__ = None  # type: ignore[assignment]

    def contains(self, ids: pa.Array | pa.ChunkedArray | Sequence[str]) -> NDArray[np.bool_]:
        """For each of the ids (N,) whether it is one of the set."""
        return self.contains_keys(keys_of(ids))

    def contains_keys(self, keys: Keys) -> NDArray[np.bool_]:
        """As `contains`, by keys (N,)."""
        if not len(self.keys):
            return np.zeros(len(keys), np.bool_)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        found: NDArray[np.bool_] = self.keys[places] == keys
        return found
