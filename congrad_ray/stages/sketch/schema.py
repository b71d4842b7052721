"""The table of sketches, and the numbers in its sketch column."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from congrad_ray.data.tables import LANGUAGE, PAIR_ID, field

# What a kill can cost, and what a part holds: this many pairs, or this many bytes of text where they are long. On
# a CPU that is about a minute of work for a model of some hundred million parameters.
PAIRS_PER_PART = 64
PART_BYTES = {"cpu": 2**15, "cuda": 2**21}


def sketches_schema(width: int, dtype: str) -> pa.Schema:
    """Schema of the sketch stage's table for sketches of `width` numbers of a NumPy dtype."""
    sketch = pa.binary(width * np.dtype(dtype).itemsize)
    return pa.schema(
        [
            PAIR_ID,
            LANGUAGE,
            field("sketch", sketch, f"sketch of u, the pair's gradient direction: {width} {dtype}, little-endian"),
            field("sketch_scale", pa.float32(), "what the numbers of the sketch are to be multiplied by"),
            field(
                "norm", pa.float64(), "Euclidean norm of u over the sketched layers: exact where no side is folded"
            ),
            field("coefficient", pa.float64(), "c >= 0: the gradient of the pair's loss is -c * u"),
            field("chosen_logps", pa.float64(), "summed log-probability of chosen, nats; also the reference's"),
            field(
                "rejected_logps",
                pa.float64(),
                "summed log-probability of rejected, nats; also the reference's",
            ),
            field("prompt_tokens", pa.int32(), "tokens of the prompt"),
            field("chosen_tokens", pa.int32(), "tokens of chosen"),
            field("rejected_tokens", pa.int32(), "tokens of rejected"),
            field("positions", pa.int32(), "positions computed for the pair in layers other than attention"),
            field("attention_padding", pa.int32(), "padding positions computed beside the pair in attention"),
            field(
                "audit_exact",
                pa.float64(),
                "audited pairs: exact cosine of u with the mean u of the others in its micro-batch",
                nullable=True,
            ),
            field(
                "audit_sketched", pa.float64(), "audited pairs: the same from the stored sketches", nullable=True
            ),
        ]
    )


def dtype_of(schema: pa.Schema) -> str | None:
    """The dtype of the sketches, from what the column says of itself; None where that is lost."""
    words = (schema.field("sketch").metadata or {}).get(b"doc", b"").decode()
    found = re.search(r"\d+ (int8|float16|float32), little-endian$", words)
    return found[1] if found else None


def sketch_bytes(sketches: NDArray[Any]) -> list[bytes]:
    """The sketch column's values of (rows, width) numbers in the dtype to be stored."""
    little_endian = sketches.astype(sketches.dtype.newbyteorder("<"), copy=False)
    return [row.tobytes() for row in little_endian]


def sketch_numbers(table: pa.Table | pa.RecordBatch, dtype: str) -> NDArray[np.float32]:
    """The sketches in a table with the columns sketch and sketch_scale, (rows, width) float32."""
    return stored_numbers(table, dtype) * table["sketch_scale"].to_numpy()[:, None].astype(np.float32)


def stored_numbers(table: pa.Table | pa.RecordBatch, dtype: str) -> NDArray[Any]:
    """The numbers of the sketch column as they are stored, without their scales: (rows, width), not copied."""
    column = table["sketch"]
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    stored = np.dtype(dtype).newbyteorder("<")
    rows, numbers = len(column), column.type.byte_width // stored.itemsize
    values = np.frombuffer(column.buffers()[1], stored, rows * numbers, column.offset * column.type.byte_width)
    return values.reshape(rows, numbers)
