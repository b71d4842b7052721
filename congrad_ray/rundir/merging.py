"""Many small Parquet parts of a finished table become few large ones, whenever the work is cut off.

Parts lie in groups by the hash in their names, so which parts go together does not depend on which are merged
already; the number of groups is in the names of the merged parts. A merged part is written before its sources are
deleted, and its name comes before theirs: where a kill leaves both, the search for doubled rows keeps the merged.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from congrad_ray.rundir.directory import ROWS_PER_GROUP, Folder, each, parquet_options

# Merged are more parts than this, of less than this mean size,
_FEW_PARTS = 64
_LARGE_PART = 2**25
# into parts of about this size, whichever is reached first.
_ROWS_PER_PART = 2**16
_BYTES_PER_PART = 2**27
_BYTES_PER_GROUP = 2**24  # of Parquet's row groups, in memory

_PART = re.compile(r"part-([0-9a-f]{8})[0-9a-f]*\.parquet")
_MERGED = re.compile(r"merged-(\d+)-of-(\d+)\.parquet")


@dataclass(frozen=True)
class Merge:
    """Files of a folder to be merged, in this order, and the name of the file that they become."""

    sources: list[str]
    target: str


def planned_merges(folder: Folder) -> list[Merge]:
    """What is to be merged of the parts in a folder; nothing where they are few or large."""
    infos = folder.filesystem.get_file_info(pafs.FileSelector(folder.path, allow_not_found=True))
    sizes = {info.base_name: info.size for info in infos if info.type == pafs.FileType.File}
    parts = sorted(name for name in sizes if _PART.fullmatch(name))
    merged = {name: found for name in sizes if (found := _MERGED.fullmatch(name))}
    bytes_ = sum(sizes[name] for name in parts)
    if merged:
        number = max(int(found[2]) for found in merged.values())
    elif len(parts) > _FEW_PARTS and bytes_ < len(parts) * _LARGE_PART:
        rows = sum(each(lambda name: _rows(folder, name), parts))
        number = max(-(-rows // _ROWS_PER_PART), -(-bytes_ // _BYTES_PER_PART))
    else:
        return []
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in parts:
        found = _PART.fullmatch(name)
        assert found is not None
        group = int(found[1], 16) * number >> 32
        groups[f"merged-{group:05}-of-{number:05}.parquet"].append(name)
    return [
        Merge([*([target] if target in merged else []), *sources], target)
        for target, sources in sorted(groups.items())
    ]


def _rows(folder: Folder, name: str) -> int:
    with folder.open_parquet(f"{folder.path}/{name}") as file:
        return int(file.metadata.num_rows)


def merge(folder: Folder, what: Merge) -> None:
    """Writes the merged part and deletes its sources; a few row groups are in memory at a time."""
    tables = _row_groups(folder, what.sources)
    first = next(tables)
    with (
        folder.output_stream(what.target) as sink,
        pq.ParquetWriter(sink, first.schema, **parquet_options(first.schema)) as writer,
    ):
        for table in _joined(first, tables):
            writer.write_table(table, row_group_size=len(table))
    for name in what.sources:
        if name != what.target:
            folder.filesystem.delete_file(f"{folder.path}/{name}")


def _row_groups(folder: Folder, names: Iterable[str]) -> Iterator[pa.Table]:
    for name in names:
        with folder.open_parquet(f"{folder.path}/{name}") as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, use_threads=False)


def _joined(first: pa.Table, others: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The tables, small ones put together."""
    waiting, rows, bytes_ = [first], len(first), first.nbytes
    for table in others:
        if rows + len(table) > ROWS_PER_GROUP or bytes_ + table.nbytes > _BYTES_PER_GROUP:
            yield pa.concat_tables(waiting)
            waiting, rows, bytes_ = [], 0, 0
        waiting.append(table)
        rows, bytes_ = rows + len(table), bytes_ + table.nbytes
    yield pa.concat_tables(waiting)
