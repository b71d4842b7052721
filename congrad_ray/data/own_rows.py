"""The rows that a user brought, all their columns, as a Parquet file: in their own types, or exactly as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from congrad_ray.config.recipe import Source
from congrad_ray.data.reading import python_rows, read_rows

_DEEPEST_TYPE = 32


def write_own_rows(
    sources: Sequence[Source], numbers: NDArray[np.int64], added: Mapping[str, pa.Array], sink: Any
) -> None:
    """Writes the rows with these ascending numbers, counted from 0 over all sources, and the columns `added`.

    Those replace columns of the same names. A column keeps its Arrow type. Of files without types it gets one that
    holds all its values exactly, or Arrow's JSON type, which `datasets` decodes (its feature Json) and others read
    as text: structs are not filled with nulls. The sources are read twice, and never held. Raises InputError.
    """
    types: dict[str, pa.DataType] = {}
    for _, _, chunk in _chunks(sources, numbers):
        found = _types(chunk)
        for name, kind in found.items():
            types[name] = _joined(types[name], kind) if name in types else kind
    names = {name: _printable_name(name) for name in types if name not in added}
    fields = [pa.field(names[name], types[name]) for name in names]
    schema = pa.schema([*fields, *(pa.field(name, column.type) for name, column in added.items())])
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        for first, last, chunk in _chunks(sources, numbers):
            columns = [_column(chunk, name, types[name]) for name in names]
            more = [column.slice(first, last - first) for column in added.values()]
            writer.write_table(pa.Table.from_arrays([*columns, *more], schema=schema))


def own_rows(
    sources: Sequence[Source], numbers: NDArray[np.int64], added: Mapping[str, pa.Array]
) -> Iterator[dict[str, Any]]:
    """The same rows one by one, as Python values; a key that a row has not is not there."""
    for first, last, chunk in _chunks(sources, numbers):
        rows = python_rows(chunk) if isinstance(chunk, pa.RecordBatch) else chunk
        more = {name: column.slice(first, last - first).to_pylist() for name, column in added.items()}
        for place, row in enumerate(rows):
            own = {name: value for name, value in row.items() if name not in added}
            yield own | {name: values[place] for name, values in more.items()}


Chunk: TypeAlias = pa.RecordBatch | list[dict[str, Any]]


def _chunks(sources: Sequence[Source], numbers: NDArray[np.int64]) -> Iterator[tuple[int, int, Chunk]]:
    """The wanted rows as they come, with the places in `numbers` at which each part begins and ends."""
    start = 0
    for source in sources:
        for rows in read_rows(source):
            first, last = (int(place) for place in np.searchsorted(numbers, (start, start + len(rows))))
            wanted = numbers[first:last] - start
            start += len(rows)
            if not len(wanted):
                continue
            if rows.batch is not None:
                yield first, last, _taken(rows.batch, wanted)
            else:
                records = rows.parsed or []
                yield first, last, [records[place].values for place in wanted]


def _taken(batch: pa.RecordBatch, places: NDArray[np.int64]) -> pa.RecordBatch:
    try:
        return batch.take(pa.array(places))
    except pa.ArrowNotImplementedError:  # of views of strings
        return pa.concat_batches([batch.slice(place, 1) for place in places.tolist()])


def _types(chunk: Chunk) -> dict[str, pa.DataType]:
    if isinstance(chunk, pa.RecordBatch):
        return {field.name: field.type for field in chunk.schema}
    names = dict.fromkeys(name for row in chunk for name in row)  # in the order in which they come
    return {name: _exact_type([row.get(name) for row in chunk]) for name in names}


def _exact_type(values: list[Any]) -> pa.DataType:
    """The type in which Arrow gives back the very values; JSON where none does, or none can be written."""
    try:
        array = pa.array(values)
        exact = array.to_pylist() == values
    except (pa.ArrowException, TypeError, ValueError, OverflowError, RecursionError):
        return pa.json_()
    text = str(array.type)
    # Parquet has no struct without fields, and its readers give up on types of great depth.
    return array.type if exact and "struct<>" not in text and text.count("<") <= _DEEPEST_TYPE else pa.json_()


def _joined(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """A type that holds the values of both exactly, or JSON."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    are_flat = not pa.types.is_nested(one) and not pa.types.is_nested(other)
    if are_flat and not isinstance(one, pa.JsonType) and not isinstance(other, pa.JsonType):
        try:
            schemas = [pa.schema([("", kind)]) for kind in (one, other)]
            return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
        except pa.ArrowException:
            pass
    return pa.json_()


def _column(chunk: Chunk, name: str, kind: pa.DataType) -> pa.Array:
    if isinstance(chunk, pa.RecordBatch):
        if name not in chunk.schema.names:
            return pa.nulls(len(chunk), kind)
        place = chunk.schema.get_field_index(name)
        if chunk.schema.field(place).type == kind:
            return chunk.column(place)
        if not isinstance(kind, pa.JsonType):
            return chunk.column(place).cast(kind)
        values = [row[name] for row in python_rows(chunk.select([name]))]
    else:
        values = [row.get(name) for row in chunk]
    if isinstance(kind, pa.JsonType):
        as_text: Callable[[Any], str] = lambda value: json.dumps(value, default=str)  # noqa: E731
        texts = [None if value is None else as_text(value) for value in values]
        return pa.ExtensionArray.from_storage(kind, pa.array(texts, kind.storage_type))
    if pa.types.is_floating(kind):
        values = [value if value is None else float(value) for value in values]
    return pa.array(values, kind)


def _printable_name(name: str) -> str:
    """Without lone surrogates, which cannot be written."""
    return name.encode("utf-8", "backslashreplace").decode()
