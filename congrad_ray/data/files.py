"""The files that the name of a source stands for: near or far, one or many, compressed or not."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from congrad_ray.config.printable import brief, printable, without_keys
from congrad_ray.config.recipe import Source
from congrad_ray.config.settings import local_path
from congrad_ray.data.records import InputError

Format: TypeAlias = Literal["json", "csv", "parquet", "arrow"]

_FORMATS: dict[str, Format] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")  # Arrow's names for what it takes off while it reads
_UNREAD = (".xlsx", ".xls", ".zip", ".tar", ".tgz", ".txt", ".pkl", ".pickle", ".pt", ".h5")
_READ = "JSON Lines, JSON, CSV, TSV, Parquet and Arrow files are read, all but Parquet also as .gz and .zst"
# Beside the data in folders that `datasets` wrote.
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True)
class DataFile:
    """A file of rows on some filesystem; `name` may be printed."""

    filesystem: pafs.FileSystem
    path: str
    name: str
    format: Format

    @contextmanager
    def open(self) -> Iterator[pa.NativeFile]:
        """Its bytes, decompressed; what goes wrong while they are read becomes an InputError."""
        try:
            with self.filesystem.open_input_stream(self.path) as stream:
                yield stream
        except (pa.ArrowException, OSError, EOFError) as error:
            raise _unreadable(self, error) from error

    @contextmanager
    def parquet(self) -> Iterator[pq.ParquetFile]:
        """The file, opened. Raises InputError where it is damaged, also while it is read."""
        try:
            with self.filesystem.open_input_file(self.path) as stream, pq.ParquetFile(stream) as file:
                yield file
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _unreadable(self, error) from error


def source_digest(source: Source) -> str | None:
    """What a run notices a change of its input by: a hash of a local file's bytes; None for a hub dataset.

    Of files elsewhere, their sizes and times.
    """
    try:
        files = data_files(source)
    except InputError:
        return None
    if files is None:
        return None
    parts = [_digest(file) for file in files]
    if len(parts) == 1:
        return parts[0]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _digest(file: DataFile) -> str:
    if not isinstance(file.filesystem, pafs.LocalFileSystem):
        info = file.filesystem.get_file_info(file.path)
        return f"{file.path} {info.size} {info.mtime_ns}"
    path = Path(file.path)
    paths = sorted(path.glob("*.arrow")) if path.is_dir() else [path]
    hashes = []
    for each in paths:
        with each.open("rb") as opened:
            hashes.append(hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest())
    return " ".join(hashes)


def data_files(source: Source) -> list[DataFile] | None:
    """The files that a source names, in the order of their paths; None for the name of a dataset on the hub.

    A name is a file, a folder of files, one that `Dataset.save_to_disk` wrote, or a pattern with * ? or [], here
    or at a URI that pyarrow's filesystems know (s3://, gs://; there `?` begins settings of the store, as in
    s3://bucket/file.jsonl?region=eu-west-1). Raises InputError.
    """
    name = without_keys(source.name)
    try:
        if "://" in source.name:
            filesystem, path = _remote(source.name)
        else:
            local = local_path(source.name)
            if not local.exists() and not _looks_like_files(source.name):
                return None
            filesystem, path = pafs.LocalFileSystem(), str(local.absolute())
        paths = _paths(filesystem, path, source.split)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"cannot open {brief(name)}: {brief(_without(error, source.name))}") from None
    if not paths:
        if filesystem.get_file_info(path).type == pafs.FileType.Directory:
            raise InputError(f"{brief(name)} is a folder that has no file that can be read ({_READ})")
        pattern = any(sign in name for sign in "*?[")
        raise InputError(f"no file {'matches ' if pattern else ''}{brief(name)}")
    files = [_data_file(filesystem, each, brief(name), len(paths) == 1) for each in paths]
    return [file for file in files if file]


def is_data_name(name: str) -> bool:
    """Whether a path ends as files of rows do that can be read, .jsonl.gz for example."""
    return _format(name) is not None


def _looks_like_files(name: str) -> bool:
    suffixes = Path(name).suffixes[-2:]
    known = {*_FORMATS, *_COMPRESSED, *_UNREAD}
    return name.startswith((".", "/", "~")) or bool(known & {s.lower() for s in suffixes}) or "*" in name


def _without(error: BaseException, uri: str) -> str:
    return str(error).replace(uri, without_keys(uri))


def _remote(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a URI and the path in it, which may be a pattern."""
    address, _, settings = uri.partition("?")
    scheme, _, rest = address.partition("://")
    bucket, _, path = rest.partition("/")
    if scheme == "file":
        return pafs.LocalFileSystem(), f"/{path}"
    filesystem, root = pafs.FileSystem.from_uri(f"{scheme}://{bucket}{'?' if settings else ''}{settings}")
    return filesystem, f"{root}/{path}".rstrip("/")


def _paths(filesystem: pafs.FileSystem, path: str, split: str) -> list[str]:
    """The files of a path: itself, those in a folder, or those that match a pattern; sorted.

    Of several, those that are of no kind that is read, or hidden, or say something of the others, are left out.
    """
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.File:
        return [path]
    if kind == pafs.FileType.Directory:
        listed = filesystem.get_file_info(pafs.FileSelector(path))
        names = {info.base_name for info in listed}
        if "dataset_dict.json" in names:
            splits = sorted(info.base_name for info in listed if info.type == pafs.FileType.Directory)
            if split not in splits:
                raise InputError(f"{printable(path)} has no split {brief(split)}; splits found: {splits}")
            return _paths(filesystem, f"{path}/{split}", split)
        if {"state.json", "dataset_info.json"} <= names and isinstance(filesystem, pafs.LocalFileSystem):
            return [path]
        pattern = f"{path}/**"
    else:
        pattern = path
    fixed = re.split(r"[*?\[]", pattern)[0]
    if fixed == pattern:
        return []
    folder = fixed.rpartition("/")[0] or "/"
    infos = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True, recursive=True))
    found = [info.path for info in infos if info.type == pafs.FileType.File]
    matching = [each for each in found if _matches(each, pattern)]
    data = [each for each in matching if _is_data(each[len(folder) + 1 :])]
    return sorted(data if pattern != path else data or matching)


def _is_data(path: str) -> bool:
    parts = path.split("/")
    return (
        not any(part.startswith((".", "_")) for part in parts)
        and parts[-1] not in _ABOUT
        and _format(parts[-1]) is not None
    )


def _matches(path: str, pattern: str) -> bool:
    """As in a shell: `*` stays within a folder, `**` does not."""
    if "**" in pattern:
        return fnmatch.fnmatchcase(path, pattern)
    ones, others = path.split("/"), pattern.split("/")
    return len(ones) == len(others) and all(map(fnmatch.fnmatchcase, ones, others))


def _format(name: str) -> Format | None:
    path = Path(name)
    if path.suffix.lower() in _COMPRESSED:
        path = path.with_suffix("")
    return _FORMATS.get(path.suffix.lower())


def _data_file(filesystem: pafs.FileSystem, path: str, given: str, alone: bool) -> DataFile:
    """Raises InputError for files of kinds that are not read."""
    name = given if alone else printable(path.rpartition("/")[2])
    kind = _format(path)
    suffix = Path(path).suffix.lower()
    if Path(path).is_dir() and isinstance(filesystem, pafs.LocalFileSystem):
        kind = "arrow"
    elif suffix in _UNREAD:
        raise InputError(
            f"{name} cannot be read: {suffix} files are not supported ({_READ}). Write its rows to one of these, "
            "for example with pandas' DataFrame.to_parquet"
        )
    elif kind == "parquet" and suffix in _COMPRESSED:
        raise InputError(f"{name} cannot be read: decompress it; Parquet compresses by itself")
    return DataFile(filesystem, path, name, kind or "json")


def _unreadable(file: DataFile, error: BaseException) -> InputError:
    kind = {"parquet": "Parquet file", "arrow": "Arrow file"}.get(file.format, "file")
    return InputError(f"{file.name} is not a readable {kind}: {brief(error)}; write or fetch it again")
