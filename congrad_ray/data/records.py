"""Reading rows that users bring: JSONL, Parquet, or a Hugging Face dataset; bad rows are reported, not fatal."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import langcodes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from congrad_ray.config.printable import brief, printable, shown
from congrad_ray.config.recipe import Source
from congrad_ray.config.settings import local_path
from congrad_ray.data.tables import Message


class InputError(ValueError):
    """An input cannot be read at all; the text names it, what was found, and the way out."""


@dataclass(frozen=True)
class Record:
    """One row as it was read: `values`, or the `problem` (reason, detail) that kept it from being read.

    Of a Parquet file only the columns asked for are read; there is a record for every row of it, in its order.
    """

    place: str
    values: dict[str, Any]
    problem: tuple[str, str] | None = None


class BadRow(ValueError):
    """A row cannot be used; `reason` is a short fixed word for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


# Files that people have and that are read as nothing else here, by their suffix.
_UNREAD = {
    ".csv": "CSV",
    ".tsv": "tab-separated",
    ".xlsx": "Excel",
    ".arrow": "Arrow",
    ".zip": "zip",
    ".gz": "gzip",
}


def check_source(source: Source, needed: tuple[str, ...]) -> None:
    """What can be seen of a source without reading its rows. Raises InputError or SettingsError."""
    path = local_path(source.name)
    name = brief(source.name)
    suffix = path.suffix.lower()
    if path.is_dir():
        raise InputError(
            f"{name or repr(name)} is a folder; give a .jsonl or .parquet file, or a hub dataset's name"
        )
    if not path.is_file() and (
        source.name.startswith((".", "/", "~")) or suffix in (".jsonl", ".json", ".parquet", *_UNREAD)
    ):
        raise InputError(f"no file {name}")
    if suffix in _UNREAD:
        raise InputError(
            f"{name} cannot be read: {_UNREAD[suffix]} files are not supported. Write its rows to a .jsonl or "
            ".parquet file, for example with pandas' DataFrame.to_parquet"
        )
    if is_parquet(path):
        with _parquet(path) as file:
            _check_columns(file.schema_arrow.names, printable(path), needed)


def read_records(source: Source, needed: tuple[str, ...]) -> Iterator[Record]:
    """The rows of a source in its order.

    Raises InputError when there is no such file or dataset, it is no file of its kind or damaged, it is empty, or
    no row has one of the `needed` columns; SettingsError for a name that can be neither file nor dataset.
    """
    check_source(source, needed)
    path = local_path(source.name)
    if path.is_file():
        records = _read_parquet(path, needed) if is_parquet(path) else _read_jsonl(path)
    else:
        records = _read_hub(source)
    yield from _checked(records, brief(source.name), needed)


def file_digest(name: str) -> str | None:
    """Hash of a local file's bytes, so that a run notices when its input changed; None for a hub dataset."""
    path = local_path(name)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def is_parquet(path: Path) -> bool:
    """Whether it is a file to be read as Parquet; any other is read as JSONL."""
    return path.suffix == ".parquet" and path.is_file()


def parquet_rows(path: Path, wanted: Sequence[int]) -> pa.Table:
    """The rows of a Parquet file with these ascending numbers: all its columns, in its own types.

    Raises InputError where a column is damaged, also one that `read_records` does not read.
    """
    start, parts = 0, []
    with _parquet(path) as file:
        for batch in file.iter_batches():
            first, last = np.searchsorted(wanted, (start, start + len(batch)))
            parts.append(batch.take(pa.array(np.asarray(wanted[first:last], dtype=np.int64) - start)))
            start += len(batch)
        return pa.Table.from_batches(parts, schema=file.schema_arrow)


def _checked(records: Iterator[Record], name: str, needed: tuple[str, ...]) -> Iterator[Record]:
    columns: set[str] = set()
    count = 0
    first: Record | None = None
    for record in records:
        count += 1
        first = first or record
        columns.update(record.values)
        yield record
    if first is None:
        raise InputError(f"{name} is empty")
    if not columns and first.problem:
        raise InputError(
            f"{name} has {count} line(s) and none is a JSON object; {printable(first.place)}: "
            f"{brief(first.problem[1])}. Write it as UTF-8 with one JSON object on each line, or as .parquet"
        )
    _check_columns(columns, name, needed)


def _check_columns(columns: Collection[str], name: str, needed: tuple[str, ...]) -> None:
    for column in needed:
        if column not in columns:
            found = ", ".join(sorted(map(printable, columns))) or "none"
            raise InputError(f"{name} has no column '{printable(column)}'; columns found: {found}")


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path.name}:{number}"
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
            if isinstance(values, dict):
                yield Record(place, values)
            else:
                yield Record(place, {}, ("not_an_object", text[:200]))


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """The file, opened; what Arrow raises while it is read becomes an InputError."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{printable(path)} is not a readable Parquet file: {brief(error)}; write or fetch it again"
        ) from error


def _read_parquet(path: Path, needed: tuple[str, ...]) -> Iterator[Record]:
    number = 0
    with _parquet(path) as file:
        columns = file.schema_arrow.names
        _check_columns(columns, printable(path), needed)
        for column in needed:
            if columns.count(column) > 1:
                raise InputError(f"{printable(path)} has several columns '{printable(column)}'; leave one")
        for batch in file.iter_batches(columns=list(needed)):
            yield from _records(batch, path.name, number)
            number += len(batch)


def _records(batch: pa.RecordBatch, name: str, start: int) -> Iterator[Record]:
    try:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
    except (ValueError, OverflowError):  # one value that Python cannot hold fails the batch
        rows = [None] * len(batch)
    for i, values in enumerate(rows):
        place = f"{name}:{start + i}"
        if values is not None:
            yield Record(place, values)
            continue
        try:
            yield Record(place, batch.slice(i, 1).to_pylist()[0])
        except (ValueError, OverflowError) as error:
            reason = "not_utf8" if isinstance(error, UnicodeDecodeError) else "not_readable"
            yield Record(place, dict.fromkeys(batch.schema.names), (reason, str(error)))


def _read_hub(source: Source) -> Iterator[Record]:
    import datasets

    try:
        dataset = datasets.load_dataset(source.name, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # the library lets out what its many readers raise
        raise InputError(
            f"cannot load the hub dataset '{brief(source.name)}' (config {source.config}, split {source.split}): "
            f"{printable(error)}; see its name, config and split on the hub, or give a file"
        ) from error
    for number, values in enumerate(dataset):
        yield Record(f"{source.name}:{number}", values)


def clean_text(value: Any, what: str) -> str:
    """A text in NFC without surrounding white space. Raises BadRow when it is none, or empty, or not Unicode."""
    if not isinstance(value, str):
        raise BadRow(f"{what}_not_text", f"{what} is {type(value).__name__}: {shown(value)}")
    _check_unicode(value, what)
    text = unicodedata.normalize("NFC", value).strip()
    if not text:
        raise BadRow(f"{what}_empty", f"{what} is empty")
    if "\x00" in text:
        raise BadRow(f"{what}_control_characters", f"{what} holds a NUL character")
    return text


def _check_unicode(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{what}_not_unicode", f"{what}: {error}") from error


def clean_messages(value: Any, what: str, default_role: str) -> list[Message]:
    """Chat messages from a text (one message of `default_role`) or a list of messages. Raises BadRow."""
    if not isinstance(value, list):
        return [{"role": default_role, "content": clean_text(value, what)}]
    messages = []
    for item in value:
        if not isinstance(item, dict) or not isinstance(item.get("role"), str):
            raise BadRow(f"{what}_not_messages", f"{what} should hold role and content, found {shown(item)}")
        _check_unicode(item["role"], what)
        messages.append({"role": item["role"], "content": clean_text(item.get("content"), what)})
    if not messages:
        raise BadRow(f"{what}_empty", f"{what} has no messages")
    if messages[-1]["role"] != default_role:
        raise BadRow(
            f"{what}_last_role",
            f"the last message of {what} is of {shown(messages[-1]['role'])}, not {default_role}",
        )
    return messages


def clean_language(value: Any, names: dict[str, str]) -> str:
    """A BCP-47 tag from a tag, or from the source's own name by `names`. Raises BadRow."""
    text = clean_text(value, "language")
    if text in names:
        return names[text]
    if not langcodes.tag_is_valid(text):
        raise BadRow(
            "unknown_language", f"'{brief(text)}' is no BCP-47 tag; map it under language_names in the recipe"
        )
    return langcodes.standardize_tag(text)
