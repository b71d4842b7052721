"""Reading preferences for the filter: each pair once, what cannot be used in quarantine, and every row counted."""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from congrad_ray.config.printable import brief, without_keys
from congrad_ray.config.recipe import Source
from congrad_ray.data.files import source_digest
from congrad_ray.data.languages import SMALL_GROUP, identify_languages, language_table
from congrad_ray.data.preferences import PREFERENCES, Columns, Preference, preference_in, stored, texts_to_identify
from congrad_ray.data.reading import check_source, read_records
from congrad_ray.data.records import BadRow, InputError, MissingColumn, Record, clean_language, too_many_bad
from congrad_ray.data.tables import QUARANTINE, quarantined, table_of
from congrad_ray.data.tables import field as table_field
from congrad_ray.rundir.directory import ROWS_PER_GROUP, StageFolder, parquet_options

logger = logging.getLogger(__name__)

_FORMAT = 2  # of the table of pairs; another number makes other results
_TOLD_EVERY_S = 10
_SURE = 0.25  # of a sentence among 75 languages; of 834 real pairs 725 are right then, 92 unknown; at 0.5 700, 123

_PAIRS, _OTHERS, _QUARANTINE = "pairs.parquet", "others.parquet", "quarantine.parquet"
DUPLICATE = "duplicate"
OTHERS = pa.schema(
    [
        table_field("row", pa.int64(), "number of the row in the input, from 0"),
        table_field("reason", pa.string(), "why it is no pair: duplicate, or the reason in quarantine"),
    ]
)
"""The rows of the input that are not in the table of pairs."""


@dataclass(frozen=True)
class Reading:
    """Which preferences, and how their rows are understood."""

    sources: Sequence[Source]
    columns: Columns = field(default_factory=Columns)
    chat: bool = False
    """Whether strings are taken as chat messages."""
    language_names: Mapping[str, str] = field(default_factory=dict)
    """The sources' own names of languages to BCP-47 tags."""
    keep_scripts: bool = False
    """Whether zh-Hant and zh, and the like, are languages of their own."""
    identify_languages: bool = False
    """Whether rows without a language get the one that is identified in their texts."""

    @property
    def needed(self) -> list[str]:
        """The columns that every source must have."""
        return [*self.columns.needed, *([] if self.identify_languages else [self.columns.language])]

    def check(self) -> None:
        """What can be seen without reading rows. Raises InputError or SettingsError."""
        if len(set(source.name for source in self.sources)) < len(self.sources):
            raise InputError("the same preferences are named twice")
        for source in self.sources:
            with _way_out():
                check_source(source, self.needed)

    def settings(self, called: str | None) -> dict[str, Any]:
        """What decides the pairs; `called` stands for a source whose path says nothing to a person."""
        names = [called or source.name for source in self.sources]
        digests = [source_digest(source) for source in self.sources]
        only = len(names) == 1
        more = {
            "columns": self.columns != Columns()
            and {name: value for name, value in asdict(self.columns).items() if value},
            "language_names": dict(self.language_names),
            "keep_scripts": self.keep_scripts,
            "identify_languages": self.identify_languages,
        }
        return {
            "source": names[0] if only else names,
            "digest": digests[0] if only else digests,
            "chat": self.chat,
            "format": _FORMAT,
            **{name: value for name, value in more.items() if value},
        }


@dataclass(frozen=True)
class Preferences:
    """What was read: rows = pairs + duplicates + quarantined. The tables lie in a local folder."""

    folder: Path
    rows: int
    pairs: int
    duplicates: int
    chats: int
    """Pairs of chat messages; the others are plain text."""
    prompts_taken: dict[str, int]
    """Prompts that were not simply in their column: in the responses alone, or there as well."""
    languages: dict[str, int]
    written: dict[str, set[str]]
    """What the sources call the languages, by their tags."""
    quarantined: dict[str, int]

    def __post_init__(self) -> None:
        if self.rows != self.pairs + self.duplicates + sum(self.quarantined.values()):
            raise AssertionError(f"rows are lost: {self}")
        if self.pairs != sum(self.languages.values()):
            raise AssertionError(f"pairs are without a language: {self}")

    def counters(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "duplicates": self.duplicates,
            "chats": self.chats,
            "prompts_taken": self.prompts_taken,
            "languages": self.languages,
            "quarantined": self.quarantined,
        }

    def show(self, smallest: int) -> None:
        """Logs what was read: the languages, those with fewer pairs than `smallest` named, and how."""
        logger.info("pairs by language:")
        for line in language_table(self.languages, max(smallest, SMALL_GROUP), self.written):
            logger.info(f"  {line}")
        taken = {"responses": "in the responses alone", "both": "in their column and in both responses"}
        for name, count in self.prompts_taken.items():
            logger.info(f"{count:,} prompts are {taken[name]}; each is taken once")
        if 0 < self.chats < self.pairs:
            logger.info(
                f"{self.chats:,} pairs are chats and {self.pairs - self.chats:,} plain text: each goes by its own "
                "shape; --chat takes all for chats"
            )

    def write_to(self, output: StageFolder) -> None:
        """Copies the tables to a stage's folder."""
        folders = {_QUARANTINE: output / "quarantine", _OTHERS: output / "others", _PAIRS: output}
        for name, folder in folders.items():
            if (self.folder / name).exists():
                with (self.folder / name).open("rb") as source, folder.output_stream(name) as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)


def read_preferences(reading: Reading, folder: Path, failed_share: float) -> Preferences:
    """Reads all rows once and writes their pairs to `folder`; memory grows by a hash of each pair.

    Raises InputError where a source cannot be read, has no usable pair, or more than `failed_share` of its rows,
    and more than a few, cannot be used.
    """
    rows = _Rows(folder)
    told = time.monotonic()
    with rows.pairs, rows.others, rows.quarantine:
        for records in _batches(reading):
            _sort(reading, records, rows)
            if time.monotonic() - told > _TOLD_EVERY_S:
                told = time.monotonic()
                logger.info(f"{rows.count:,} rows read")
    found = rows.found(folder)
    names = ", ".join(brief(without_keys(source.name)) for source in reading.sources)
    if not found.pairs:
        raise InputError(f"{names} has no usable pair; rows that cannot be used, by reason:\n{rows.why()}")
    bad = sum(found.quarantined.values())
    if too_many_bad(bad, found.rows, failed_share):
        raise InputError(
            f"{names}: {bad:,} of {found.rows:,} rows cannot be used, more than --failed-share "
            f"({failed_share:g}) of them:\n{rows.why()}\nFix the rows, name the columns with --columns, or raise "
            "--failed-share"
        )
    return found


class _Table:
    """A Parquet file that is written as rows come, and only where there are some."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        if self._writer:
            self._writer.close()

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer = self._writer or pq.ParquetWriter(
                self._path, self._schema, **parquet_options(self._schema)
            )
            self._writer.write_table(table_of(self._rows, self._schema), row_group_size=ROWS_PER_GROUP)
            self._rows = []


class _Rows:
    """The tables that all rows go to, each row to one of pairs and others, and their counts."""

    def __init__(self, folder: Path) -> None:
        self.pairs = _Table(folder / _PAIRS, PREFERENCES)
        self.others = _Table(folder / _OTHERS, OTHERS)
        self.quarantine = _Table(folder / _QUARANTINE, QUARANTINE)
        self.count = self.chats = 0
        self.languages: Counter[str] = Counter()
        self.taken: Counter[str] = Counter()
        self.written: dict[str, set[str]] = defaultdict(set)
        self.reasons: Counter[str] = Counter()
        self._seen: set[bytes] = set()
        self._first: dict[str, dict[str, Any]] = {}

    def add(self, preference: Preference, called: str) -> None:
        row = stored(preference, self.count)
        key = bytes.fromhex(row["pair_id"])
        if key in self._seen:
            self._other(DUPLICATE)
            return
        self._seen.add(key)
        self.count += 1
        self.pairs.add(row)
        self.chats += preference.is_chat
        self.languages[preference.language] += 1
        self.written[preference.language].add(called)
        self.taken[preference.prompt_from] += 1

    def add_bad(self, place: str, language: Any, error: BadRow) -> None:
        known = language if isinstance(language, str) else None
        row = quarantined(place, known, error.reason, str(error))
        self._first.setdefault(error.reason, row)
        self.quarantine.add(row)
        self._other(error.reason)

    def _other(self, reason: str) -> None:
        self.others.add({"row": self.count, "reason": reason})
        self.reasons[reason] += 1
        self.count += 1

    def found(self, folder: Path) -> Preferences:
        reasons = dict(sorted(self.reasons.items()))
        return Preferences(
            folder=folder,
            rows=self.count,
            pairs=len(self._seen),
            duplicates=reasons.pop(DUPLICATE, 0),
            chats=self.chats,
            prompts_taken={name: self.taken[name] for name in ("responses", "both") if self.taken[name]},
            languages=dict(sorted(self.languages.items())),
            written=self.written,
            quarantined=reasons,
        )

    def why(self) -> str:
        """How many rows there are in quarantine for each reason, and the first of them."""
        return "\n".join(
            f"  {reason}: {self.reasons[reason]}, such as {row['row_id']}: {brief(row['detail'])}"
            for reason, row in sorted(self._first.items())
        )


@contextmanager
def _way_out() -> Iterator[None]:
    try:
        yield
    except MissingColumn as error:
        raise InputError(
            f"{error}. --columns names others, as in --columns chosen=NAME,language=NAME; --identify-languages "
            "finds languages in the texts"
        ) from error


def _batches(reading: Reading) -> Iterator[list[Record]]:
    records: list[Record] = []
    for source in reading.sources:
        with _way_out():
            for record in read_records(source, reading.needed, [*reading.needed, *reading.columns.read]):
                records.append(record)
                if len(records) == ROWS_PER_GROUP:
                    yield records
                    records = []
    if records:
        yield records


def _sort(reading: Reading, records: Sequence[Record], rows: _Rows) -> None:
    """Each row becomes a pair, or goes to quarantine, in the order of the rows."""
    read = [_understood(reading, record) for record in records]
    if reading.identify_languages:
        _identify(read)
    for record, found in zip(records, read, strict=True):
        if isinstance(found, Preference):
            rows.add(found, brief(record.values.get(reading.columns.language) or found.language))
        else:
            rows.add_bad(record.place, record.values.get(reading.columns.language), found)


def _identify(read: list[Preference | BadRow]) -> None:
    """Gives the pairs that have no language theirs; where none is sure they become bad rows."""
    unknown = {i: found for i, found in enumerate(read) if isinstance(found, Preference) and not found.language}
    languages = identify_languages([texts_to_identify(found) for found in unknown.values()], confidence=_SURE)
    why = "no language is sure for its prompt and chosen; give it in the column of languages"
    for (i, found), language in zip(unknown.items(), languages, strict=True):
        bad = BadRow("language_not_identified", why)
        read[i] = replace(found, language=language) if language else bad


def _understood(reading: Reading, record: Record) -> Preference | BadRow:
    """The pair in a row; without a language where that is to be identified."""
    columns = reading.columns
    given = record.values.get(columns.language)
    try:
        if record.problem:
            raise BadRow(*record.problem)
        if reading.identify_languages and not given:
            language = ""
        elif columns.language not in record.values:
            raise BadRow("missing_column", f"no '{columns.language}' in this row")
        else:
            language = clean_language(given, reading.language_names, keep_scripts=reading.keep_scripts)
        return preference_in(record, columns, language, reading.chat)
    except BadRow as error:
        return error
