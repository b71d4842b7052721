"""Reading rows that users bring: JSONL, Parquet, or a Hugging Face dataset; bad rows are told, not fatal."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import langcodes
import pyarrow as pa
import pyarrow.parquet as pq

from congrad_ray.recipe import Source
from congrad_ray.tables import Message


class InputError(ValueError):
    """An input cannot be read at all; the text names it, what was found, and the way out."""


@dataclass(frozen=True)
class Record:
    """One row as it was read: `values`, or the `problem` (reason, detail) that kept it from being read."""

    place: str
    values: dict[str, Any]
    problem: tuple[str, str] | None = None


class BadRow(ValueError):
    """A row cannot be used; `reason` is a short fixed word for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def read_records(source: Source, needed: tuple[str, ...]) -> Iterator[Record]:
    """The rows of a source in its order.

    Raises InputError when there is no such file or dataset, it is no file of its kind, it is empty, or no row
    has one of the `needed` columns.
    """
    path = Path(source.name).expanduser()
    looks_like_path = source.name.startswith((".", "/", "~")) or path.suffix in (
        ".jsonl",
        ".json",
        ".parquet",
    )
    if path.is_dir():
        raise InputError(f"{source.name} is a folder; give a .jsonl or .parquet file, or a hub dataset's name")
    if path.is_file():
        records = _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
    elif looks_like_path:
        raise InputError(f"no file {source.name}")
    else:
        records = _read_hub(source)
    yield from _checked(records, source.name, needed)


def file_digest(name: str) -> str | None:
    """Hash of a local file's bytes, so that a run notices when its input changed; None for a hub dataset."""
    path = Path(name).expanduser()
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _checked(records: Iterator[Record], name: str, needed: tuple[str, ...]) -> Iterator[Record]:
    columns: set[str] = set()
    count = 0
    for record in records:
        count += 1
        columns.update(record.values)
        yield record
    if count == 0:
        raise InputError(f"{name} is empty")
    for column in needed:
        if column not in columns:
            found = ", ".join(sorted(columns)) or "none"
            raise InputError(f"{name} has no column '{column}'; columns found: {found}")


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path.name}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
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


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}") from error
    number = 0
    for batch in file.iter_batches():
        for values in batch.to_pylist():
            yield Record(f"{path.name}:{number}", values)
            number += 1


def _read_hub(source: Source) -> Iterator[Record]:
    import datasets

    try:
        dataset = datasets.load_dataset(source.name, source.config, split=source.split, revision=source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise InputError(
            f"cannot load the hub dataset '{source.name}' (config {source.config}, split {source.split}): {error}"
        ) from error
    for number, values in enumerate(dataset):
        yield Record(f"{source.name}:{number}", values)


def clean_text(value: Any, what: str) -> str:
    """A text in NFC without surrounding white space. Raises BadRow when it is none, or empty, or not Unicode."""
    if not isinstance(value, str):
        raise BadRow(f"{what}_not_text", f"{what} is {type(value).__name__}: {value!r:.200}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{what}_not_unicode", f"{what}: {error}") from error
    text = unicodedata.normalize("NFC", value).strip()
    if not text:
        raise BadRow(f"{what}_empty", f"{what} is empty")
    if "\x00" in text:
        raise BadRow(f"{what}_control_characters", f"{what} holds a NUL character")
    return text


def clean_messages(value: Any, what: str, default_role: str) -> list[Message]:
    """Chat messages from a text (one message of `default_role`) or a list of messages. Raises BadRow."""
    if not isinstance(value, list):
        return [{"role": default_role, "content": clean_text(value, what)}]
    messages = []
    for item in value:
        if not isinstance(item, dict) or not isinstance(item.get("role"), str):
            raise BadRow(f"{what}_not_messages", f"{what} should hold role and content, found {item!r:.200}")
        messages.append({"role": item["role"], "content": clean_text(item.get("content"), what)})
    if not messages:
        raise BadRow(f"{what}_empty", f"{what} has no messages")
    if messages[-1]["role"] != default_role:
        raise BadRow(
            f"{what}_last_role",
            f"the last message of {what} is of {messages[-1]['role']}, not {default_role}",
        )
    return messages


def clean_language(value: Any, names: dict[str, str]) -> str:
    """A BCP-47 tag from a tag, or from the source's own name by `names`. Raises BadRow."""
    text = clean_text(value, "language")
    if text in names:
        return names[text]
    if not langcodes.tag_is_valid(text):
        raise BadRow("unknown_language", f"'{text}' is no BCP-47 tag; map it under language_names in the recipe")
    return langcodes.standardize_tag(text)
