"""Bytes of tables on disk."""

from __future__ import annotations

from functools import cache

import pyarrow as pa

from congrad_ray.planning.estimate import Planned
from congrad_ray.rundir.directory import Manifest, parquet_bytes

# 32 hexadecimal digits hold 16 bytes, and zstd finds nearly all of that.
ID_BYTES = 18.0


def table_bytes(
    planned: Planned, stage: str, schema: pa.Schema, rows: float, row_bytes: float, parts: int = 1
) -> float:
    """Bytes of a stage's table in this many Parquet parts. Bytes per row that a run has measured come first."""
    if not rows:
        return 0.0
    return rows * planned.lengths.row_bytes.get(stage, row_bytes) + parts * file_bytes(schema)


def text_bytes(planned: Planned, tokens: float) -> float:
    """Bytes on disk of a text of this many tokens, compressed as assumed."""
    return planned.assumptions.bytes_per_token / planned.assumptions.text_compression * tokens


def number_bytes(schema: pa.Schema) -> float:
    """Bytes of a row's numbers and ids; texts are counted apart."""
    total = 0.0
    for field in schema:
        if field.name.endswith("_id"):
            total += ID_BYTES
        elif pa.types.is_fixed_size_binary(field.type):
            total += field.type.byte_width
        elif pa.types.is_integer(field.type) or pa.types.is_floating(field.type):
            total += field.type.bit_width / 8
    return total


def measured_row_bytes(schema: pa.Schema, manifest: Manifest) -> float | None:
    """Bytes of a row, from what a finished stage has written; None where it wrote none."""
    stored = manifest.stored
    if not manifest.rows or not stored.parts:
        return None
    return max(0.0, stored.part_bytes - stored.parts * file_bytes(schema)) / manifest.rows


@cache
def file_bytes(schema: pa.Schema) -> int:
    """What a Parquet part takes beside its rows: header and footer, with what the schema says of every column."""
    return len(parquet_bytes(schema.empty_table()))
