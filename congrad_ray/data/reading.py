"""Reading rows that users bring: JSON Lines, JSON, CSV, Parquet, Arrow, and datasets of the hub; near or far."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from congrad_ray.config.printable import brief, printable
from congrad_ray.config.recipe import Source
from congrad_ray.data.files import DataFile, data_files
from congrad_ray.data.records import InputError, MissingColumn, Record

if TYPE_CHECKING:
    import datasets

_AT_ONCE = 1000  # rows
_CHARACTERS = 1 << 20
_PEEKED = 1 << 20  # bytes


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a file, the first with the number `start` in it.

    Arrow's where the file has types, `batch`, else as they were parsed.
    """

    name: str
    start: int
    batch: pa.RecordBatch | None = None
    parsed: list[Record] | None = None
    columns: tuple[str, ...] = ()
    """All that a file with types has, read or not."""

    def __len__(self) -> int:
        return len(self.batch if self.batch is not None else self.parsed or [])

    def records(self) -> list[Record]:
        """Each row as Python values; one that Python cannot hold has a `problem`."""
        return self.parsed or [] if self.batch is None else _records(self.batch, self.name, self.start)


def check_source(source: Source, needed: Collection[str]) -> None:
    """What can be seen of a source without reading its rows. Raises InputError or SettingsError."""
    for file in data_files(source) or []:
        if file.format == "parquet":
            with file.parquet() as opened:
                check_columns(opened.schema_arrow.names, file.name, needed)


def read_records(
    source: Source, needed: Collection[str] = (), columns: Collection[str] | None = None
) -> Iterator[Record]:
    """The rows of a source in its order; of files with columns only `columns` (by default `needed`) are read.

    Raises InputError when there is no such file or dataset, one is no file of its kind or damaged or empty, or no
    row of it has one of the `needed` columns; SettingsError for a name that can be neither file nor dataset.
    """
    found: set[str] = set()
    name: str | None = None
    count = 0
    first: Record | None = None

    def check() -> None:
        if name is None:
            return
        if first is None:
            raise InputError(f"{name} is empty")
        if not found and first.problem:
            raise InputError(
                f"{name} has {count} line(s) and none is a JSON object; {printable(first.place)}: "
                f"{brief(first.problem[1])}. Write it as UTF-8 with one JSON object on each line, or as .parquet"
            )
        check_columns(found, name, needed)

    for rows in read_rows(source, needed if columns is None else columns):
        if not rows.start:  # of the next file, which may have the name of the one before in another folder
            check()
            found, name, count, first = set(), rows.name, 0, None
        found.update(rows.columns)
        for record in rows.records():
            count += 1
            first = first or record
            found.update(record.values)
            yield record
    check()


def read_rows(source: Source, columns: Collection[str] | None = None) -> Iterator[Rows]:
    """The rows of a source in its order, many at a time; of typed files only `columns`, null: all.

    A file without rows gives one `Rows` without any. Raises as `read_records` does, but looks for no columns.
    """
    files = data_files(source)
    if files is None:
        yield from _dataset_rows(_hub(source), source.name, columns)
        return
    for file in files:
        folder = Path(file.path)
        if file.format == "arrow" and folder.is_dir():
            yield from _dataset_rows(_from_disk(folder, file.name), file.name, columns)
        elif file.format == "parquet":
            yield from _parquet_rows(file, columns)
        elif file.format == "arrow":
            yield from _arrow_rows(file, columns)
        elif file.format == "csv":
            yield from _csv_rows(file)
        else:
            yield from _json_rows(file)


def check_columns(columns: Collection[str], name: str, needed: Collection[str]) -> None:
    """Raises MissingColumn where one of the needed columns is not there; `name` says of what."""
    for column in needed:
        if column not in columns:
            found = ", ".join(sorted(map(printable, columns))) or "none"
            raise MissingColumn(f"{name} has no column '{printable(column)}'; columns found: {found}")


def _many(name: str, records: Iterator[Record]) -> Iterator[Rows]:
    start = 0
    while parsed := list(islice(records, _AT_ONCE)):
        yield Rows(name, start, parsed=parsed)
        start += len(parsed)
    if not start:
        yield Rows(name, 0, parsed=[])


def _place(file: DataFile) -> str:
    return file.path.rpartition("/")[2]


def _json_rows(file: DataFile) -> Iterator[Rows]:
    with file.open() as stream:
        buffered = io.BufferedReader(stream, _PEEKED)
        if _is_array(buffered.peek(_PEEKED)):
            yield from _many(file.name, _array(file, buffered))
        else:
            yield from _many(file.name, _lines(file, buffered))


def _is_array(start: bytes) -> bool:
    """Whether a file that begins so is one JSON array of objects: not where lines follow that one alone."""
    start = start.removeprefix(b"\xef\xbb\xbf")
    if not re.match(rb"\s*\[\s*\{", start):
        return False
    line, _, rest = start.lstrip().partition(b"\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return not rest.strip()


def _lines(file: DataFile, stream: io.BufferedReader) -> Iterator[Record]:
    for number, line in enumerate(stream, start=1):
        place = f"{_place(file)}:{number}"
        try:
            text = line.decode("utf-8-sig").strip()  # files put together have the mark inside
        except UnicodeDecodeError as error:
            yield Record(place, {}, ("not_utf8", str(error)))
            continue
        if not text:
            continue
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield Record(place, {}, ("not_json", f"{error}: {text[:200]}"))
            continue
        yield _object(place, values)


def _object(place: str, values: Any) -> Record:
    if isinstance(values, dict):
        return Record(place, values)
    return Record(place, {}, ("not_an_object", str(values)[:200]))


def _array(file: DataFile, stream: io.BufferedReader) -> Iterator[Record]:
    """The members of a JSON array, with the lines on which they begin; the array is never whole in memory.

    Raises InputError where the text is no JSON, or goes on after the array: nothing behind can be trusted.
    """
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
    decoder = json.JSONDecoder()
    rest, place, line = "", 0, 1  # what was read, up to where it is used, and the line there

    def more() -> bool:
        nonlocal rest, place
        read = text.read(_CHARACTERS)
        rest, place = rest[place:] + read, 0
        return bool(read)

    def next_sign() -> str:
        nonlocal place, line
        while True:
            start = place
            while place < len(rest) and rest[place] in " \t\r\n":
                place += 1
            line += rest.count("\n", start, place)
            if place < len(rest):
                return rest[place]
            if not more():
                return ""

    def wrong(what: str) -> InputError:
        return InputError(
            f"{file.name}, line {line}: {what}. The file begins as a JSON array, so all of it has to be one; "
            "write it again, or with one JSON object on each line"
        )

    def member() -> Any:
        nonlocal place, line
        while True:
            try:
                value, end = decoder.raw_decode(rest, place)
            except (ValueError, RecursionError) as error:
                is_cut = not isinstance(error, json.JSONDecodeError) or (
                    error.msg.startswith("Unterminated string") or error.pos > len(rest) - 16
                )
                if is_cut and not isinstance(error, RecursionError) and more():
                    continue
                raise wrong(f"no JSON: {brief(error)}") from None
            if end == len(rest) and more():
                continue  # a number may go on
            line += rest.count("\n", place, end)
            place = end
            return value

    next_sign()
    place += 1  # the bracket
    sign = next_sign()
    while sign != "]":
        if not sign:
            raise wrong("the array does not end")
        began = line
        yield _object(f"{_place(file)}:{began}", member())
        sign = next_sign()
        if sign == ",":
            place += 1
            sign = next_sign()
            if sign == "]":
                raise wrong("a comma before the end")
        elif sign != "]":
            raise wrong("no comma after a member" if sign else "the array does not end")
    place += 1
    if next_sign():
        raise wrong("more follows after the array")


def _csv_rows(file: DataFile) -> Iterator[Rows]:
    with file.open() as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        csv.field_size_limit(1 << 30)
        tabs = ".tsv" in file.path.lower()
        # Strict: else a quote that is not closed takes the rest of the file for one value.
        reader = csv.reader(text, strict=True, delimiter="\t" if tabs else ",")
        try:
            yield from _many(file.name, _csv_records(file, reader))
        except csv.Error as error:
            raise InputError(
                f"{file.name}, line {reader.line_num}: {brief(error)}. Quote values that hold quotes, commas or "
                "line ends, and double the quotes in them, as Python's csv module and pandas do"
            ) from error


def _csv_records(file: DataFile, reader: Any) -> Iterator[Record]:
    header: list[str] = next(reader, [])
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise InputError(f"{file.name} has several columns '{printable(repeated[0])}'; leave one")
    end = reader.line_num
    for values in reader:
        place, end = f"{_place(file)}:{end + 1}", reader.line_num
        if len(values) == len(header):
            yield Record(place, dict(zip(header, values, strict=True)))
        elif values:
            said = f"{len(values)} values for {len(header)} columns: {values}"
            yield Record(place, {}, ("wrong_number_of_values", said[:200]))


def _parquet_rows(file: DataFile, columns: Collection[str] | None) -> Iterator[Rows]:
    with file.parquet() as opened:
        names = opened.schema_arrow.names
        for column in names if columns is None else columns:
            if names.count(column) > 1:
                raise InputError(f"{file.name} has several columns '{printable(column)}'; leave one")
        wanted = None if columns is None else [name for name in names if name in columns]
        start = 0
        for batch in opened.iter_batches(_AT_ONCE, columns=wanted):
            yield Rows(file.name, start, batch=batch, columns=tuple(names))
            start += len(batch)
        if not start:
            yield Rows(file.name, 0, parsed=[])


def _arrow_rows(file: DataFile, columns: Collection[str] | None) -> Iterator[Rows]:
    """Of an Arrow file in either of its two formats; `datasets` writes the one, Feather is the other."""
    with file.open() as stream:
        buffered = io.BufferedReader(stream, _PEEKED)
        if buffered.peek(6)[:6] == b"ARROW1":
            with file.filesystem.open_input_file(file.path) as seekable:
                opened = pa.ipc.open_file(seekable)
                batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
                yield from _batches(file.name, batches, columns)
        else:
            yield from _batches(file.name, iter(pa.ipc.open_stream(buffered)), columns)


def _batches(
    name: str,
    batches: Iterator[pa.RecordBatch],
    columns: Collection[str] | None,
    all_columns: tuple[str, ...] = (),
) -> Iterator[Rows]:
    start = 0
    for batch in batches:
        names = all_columns or tuple(batch.schema.names)
        if columns is not None:
            batch = batch.select([name for name in batch.schema.names if name in columns])
        for first in range(0, len(batch), _AT_ONCE):
            part = batch.slice(first, _AT_ONCE)
            yield Rows(name, start, batch=part, columns=names)
            start += len(part)
    if not start:
        yield Rows(name, 0, parsed=[])


def _hub(source: Source) -> datasets.Dataset:
    import datasets

    try:
        return datasets.load_dataset(source.name, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # the library lets out what its many readers raise
        raise InputError(
            f"cannot load the hub dataset '{brief(source.name)}' (config {source.config}, split {source.split}): "
            f"{printable(error)}; see its name, config and split on the hub, or give a file"
        ) from error


def _from_disk(folder: Path, name: str) -> datasets.Dataset:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # as for the hub
        raise InputError(f"{name} is not a readable dataset: {printable(error)}; save it again") from error
    assert isinstance(dataset, datasets.Dataset)  # a DatasetDict has a dataset_dict.json
    return dataset


def _dataset_rows(dataset: datasets.Dataset, name: str, columns: Collection[str] | None) -> Iterator[Rows]:
    names = tuple(dataset.column_names)
    if columns is not None:
        dataset = dataset.select_columns([name for name in dataset.column_names if name in columns])
    tables = dataset.with_format("arrow").iter(_AT_ONCE)
    yield from _batches(name, (batch for table in tables for batch in table.to_batches()), None, names)


def _records(batch: pa.RecordBatch, name: str, start: int) -> list[Record]:
    name = name.rpartition("/")[2]
    try:
        return [Record(f"{name}:{start + i}", values) for i, values in enumerate(python_rows(batch))]
    except (ValueError, OverflowError):  # one value that Python cannot hold fails the batch
        pass
    records = []
    for i in range(len(batch)):
        place = f"{name}:{start + i}"
        try:
            records.append(Record(place, python_rows(batch.slice(i, 1))[0]))
        except (ValueError, OverflowError) as error:
            reason = "not_utf8" if isinstance(error, UnicodeDecodeError) else "not_readable"
            records.append(Record(place, dict.fromkeys(batch.schema.names), (reason, str(error))))
    return records


def python_rows(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """Rows as Python values; what has Arrow's JSON type (the feature Json of `datasets`) is decoded."""
    rows: list[dict[str, Any]] = batch.to_pylist()
    for field in batch.schema:
        decode = _decoder(field.type)
        if decode is not None:
            for row in rows:
                row[field.name] = decode(row[field.name])
    return rows


def _decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What makes Python values of a type's JSON texts; None where it holds none."""
    if isinstance(kind, pa.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _decoder(kind.value_type)
        return inner and (lambda value: None if value is None else [inner(item) for item in value])
    if pa.types.is_struct(kind):
        found = {kind.field(i).name: _decoder(kind.field(i).type) for i in range(kind.num_fields)}
        some = {name: decode for name, decode in found.items() if decode}
        return (
            (lambda value: value and {**value, **{name: decode(value[name]) for name, decode in some.items()}})
            if some
            else None
        )
    return None
