"""Writing an export: a stream of rows to one folder, in chunks, complete or not at all."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from congrad_ray.config.names import ExportFormat, Trainer
from congrad_ray.config.recipe import Source
from congrad_ray.data.exports.card import ExportFacts, dataset_card
from congrad_ray.data.exports.trainers import (
    NotWritten,
    Shape,
    json_text,
    llama_factory_info,
    shape_of,
    snippet,
    trainer_row,
)
from congrad_ray.data.own_rows import own_rows, write_own_rows
from congrad_ray.data.preferences import Preference

_CHUNK = 1024  # rows held at once, and of a group in a Parquet file


_OPTIONAL = ("tools", "chat_template_kwargs")


class ExportError(ValueError):
    """The rows cannot be written in this format; the text says why and what to do."""


@dataclass(frozen=True)
class ExportedRow:
    """A pair of the filter's input with what became of it."""

    preference: Preference
    score: float | None
    """The cosine with the direction; None for a pair that has none."""
    kept: bool


@dataclass(frozen=True)
class Rows:
    """The rows of an export: as pairs for a trainer, and as the user's own."""

    pairs: Callable[[], Iterator[ExportedRow]]
    """All pairs, in the order of the input."""
    sources: Sequence[Source]
    numbers: NDArray[np.int64]
    """Of the rows whose own columns are written: the kept ones, or all; ascending."""
    added: Mapping[str, pa.Array]
    """The columns that those get."""


@dataclass
class Exported:
    """What was written: `rows` kept pairs, `dropped` others (only with `all_rows`); the rest by reason."""

    rows: int = 0
    dropped: int = 0
    not_written: Counter[str] = field(default_factory=Counter)
    snippet: str = ""
    """What to tell the reader."""


def write_export(
    rows: Rows,
    to: ExportFormat,
    folder: Path,
    facts: ExportFacts,
    *,
    all_rows: bool = False,
    place: str | None = None,
) -> Exported:
    """Writes rows to `folder` as `to` reads them, with a dataset card; replaces the folder.

    A trainer gets prompt, chosen and rejected in its own names, language and congrad_score, in train.parquet or
    train.jsonl; with `all_rows` the dropped pairs too, in a file `dropped` beside it, and a column kept. The
    others get the user's own columns and those added. `place`: what the snippet calls the folder. Rows pass in
    chunks.

    Raises ExportError for plain and chat pairs in one export for a trainer, and for no row to write.
    """
    place = str(folder) if place is None else place
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as name:
        new = Path(name) / "export"
        new.mkdir()
        if to in get_args(Trainer):
            trainer: Trainer = to  # type: ignore[assignment]
            exported = _for_trainer(rows, trainer, new, facts, all_rows, place)
        else:
            exported = _own(rows, to, new, place)
        card = dataset_card(facts, to, exported.rows, exported.dropped, exported.not_written, _splits(new))
        (new / "README.md").write_text(card, encoding="utf-8")
        if folder.exists():
            folder.rename(Path(name) / "before")
        new.rename(folder)
    return exported


def _for_trainer(
    rows: Rows, trainer: Trainer, new: Path, facts: ExportFacts, all_rows: bool, place: str
) -> Exported:
    exported, shapes = Exported(), Counter[Shape]()

    def records(counted: bool = True) -> Iterator[_Record]:
        wanted = (row for row in rows.pairs() if all_rows or row.kept)
        counts = (exported, shapes) if counted else (Exported(), Counter[Shape]())
        return _trainer_records(wanted, trainer, all_rows, *counts)

    if trainer == "trl":
        needs = _needs(records(counted=False))
        _write_tables(((split, _trl_table(part, needs)) for split, part in _chunks(records())), new)
    else:
        _write_jsonl(records(), new)
    shape = next(iter(shapes))
    if trainer == "llama-factory":
        (new / "dataset_info.json").write_text(json.dumps(llama_factory_info(shape), indent=2) + "\n")
    exported.snippet = snippet(trainer, shape, place, facts.model, facts.max_length)
    return exported


def _own(rows: Rows, to: ExportFormat, new: Path, place: str) -> Exported:
    count = len(rows.numbers)
    if not count:
        raise ExportError(f"there is no row to write as {to}; keep more pairs (--keep)")
    given = (rows.sources, rows.numbers, rows.added)
    if to == "jsonl":
        with (new / "train.jsonl").open("wb") as file:
            for row in own_rows(*given):
                file.write(json_text(row).encode() + b"\n")
    else:
        with tempfile.TemporaryDirectory(dir=new.parent) as beside:
            path = (Path(beside) if to == "dataset" else new) / "train.parquet"
            with path.open("wb") as file:
                write_own_rows(*given, file)
            if to == "dataset":
                import datasets

                datasets.Dataset.from_parquet(str(path), cache_dir=beside).save_to_disk(new)
    kept = rows.added.get("congrad_kept")
    kept_count = count if kept is None else sum(kept.to_pylist())
    return Exported(kept_count, count - kept_count, snippet=_own_snippet(to, place))


def _splits(folder: Path) -> dict[str, str]:
    """The files of each split, as a pattern."""
    if (folder / "state.json").exists():
        return {"train": "data-*.arrow"}
    return {
        path.stem: path.name
        for path in sorted(folder.iterdir(), reverse=True)
        if path.stem in ("train", "dropped")
    }


def _check(shapes: Counter[Shape], to: Trainer, exported: Exported) -> None:
    if len(shapes) > 1:
        raise ExportError(
            f"{shapes['plain']} of the pairs are plain text and {shapes['chat']} are chat messages, and {to} "
            "reads only one shape in a dataset; give --chat to take all as messages"
        )
    if not exported.rows:
        why = ", ".join(f"{reason}: {count}" for reason, count in exported.not_written.most_common())
        raise ExportError(
            f"there is no row to write for {to}"
            + (f", which cannot read them ({why}); take another --to" if why else "; keep more pairs (--keep)")
        )


_Record = tuple[str, dict[str, Any]]
"""The split of a row, and the row."""


def _trainer_records(
    rows: Iterable[ExportedRow], trainer: Trainer, all_rows: bool, exported: Exported, shapes: Counter[Shape]
) -> Iterator[_Record]:
    for row in rows:
        shapes[shape_of(row.preference)] += 1
        try:
            record = trainer_row(trainer, row.preference)
        except NotWritten as reason:
            exported.not_written[str(reason)] += 1
            continue
        record |= {"language": row.preference.language, "congrad_score": row.score}
        _count(exported, row)
        yield "train" if row.kept else "dropped", {**record, "kept": row.kept} if all_rows else record
    _check(shapes, trainer, exported)  # before anything is made of them that could fail


def _count(exported: Exported, row: ExportedRow) -> None:
    exported.rows += row.kept
    exported.dropped += not row.kept


def _write_jsonl(records: Iterable[_Record], folder: Path) -> None:
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        for split, record in records:
            if split not in files:
                files[split] = stack.enter_context((folder / f"{split}.jsonl").open("wb"))
            files[split].write(json_text(record).encode() + b"\n")


def _chunks(records: Iterable[_Record]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows in their order, up to a chunk of one split at a time."""
    waiting: dict[str, list[dict[str, Any]]] = {}
    for split, row in records:
        waiting.setdefault(split, []).append(row)
        if len(waiting[split]) == _CHUNK:
            yield split, waiting.pop(split)
    yield from waiting.items()


def _write_tables(tables: Iterable[tuple[str, pa.Table]], folder: Path) -> None:
    with ExitStack() as stack:
        writers: dict[str, pq.ParquetWriter] = {}
        for split, table in tables:
            if split not in writers:
                path = folder / f"{split}.parquet"
                writers[split] = stack.enter_context(pq.ParquetWriter(path, table.schema, compression="zstd"))
            writers[split].write_table(table)


@dataclass(frozen=True)
class _Needs:
    """What some row of an export for TRL has."""

    simple: bool
    """Messages of role and content alone are a struct; others JSON, so that none gets a field that it had not."""
    optional: frozenset[str]


def _needs(records: Iterable[_Record]) -> _Needs:
    simple = True
    optional: set[str] = set()
    for _, row in records:
        simple = simple and all(_is_simple(row[side]) for side in ("prompt", "chosen", "rejected"))
        optional.update(name for name in _OPTIONAL if row.get(name))
    return _Needs(simple, frozenset(optional))


def _is_simple(texts: Any) -> bool:
    return isinstance(texts, str) or all(
        message.keys() == {"role", "content"} and isinstance(message["content"], str) for message in texts
    )


def _trl_table(rows: list[dict[str, Any]], needs: _Needs) -> pa.Table:
    from datasets import Features, Json, List, Value

    text = Value("string")
    chat = isinstance(rows[0]["prompt"], list)
    side: Any = text if not chat else List({"role": text, "content": text}) if needs.simple else List(Json())
    columns = {"prompt": side, "chosen": side, "rejected": side}
    if chat:
        columns |= {"tools": text, "chat_template_kwargs": Json()}
    columns |= {"language": text, "congrad_score": Value("float64")}
    if "kept" in rows[0]:
        columns["kept"] = Value("bool")
    # Its metadata tells `datasets` which columns to read as JSON.
    left_out = set(_OPTIONAL) - needs.optional
    schema = Features({name: kind for name, kind in columns.items() if name not in left_out}).arrow_schema
    arrays = []
    for column in schema:
        values: list[Any] = [row.get(column.name) for row in rows]
        if column.name == "chat_template_kwargs":  # TRL crashes on a null
            arrays.append(_json_array([json_text(value or {}) for value in values]))
        elif columns[column.name] == List(Json()):
            messages = [[json_text(message) for message in value] for value in values]
            texts = pa.array(messages, pa.list_(pa.string()))
            arrays.append(pa.ListArray.from_arrays(texts.offsets, _json_array(texts.values)))
        else:
            arrays.append(pa.array(values, column.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _json_array(texts: Any) -> pa.ExtensionArray:
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))


def _own_snippet(to: ExportFormat, place: str) -> str:
    loader = "load_from_disk" if to == "dataset" else "load_dataset"
    split = "" if to == "dataset" else ', split="train"'
    return f"dataset = datasets.{loader}({json.dumps(place)}{split})\n"
