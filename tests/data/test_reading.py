"""Every kind of file gives the same rows, near and far; a damaged one gives an error that names it."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from congrad_ray.config.recipe import Source
from congrad_ray.data.files import source_digest
from congrad_ray.data.own_rows import own_rows, write_own_rows
from congrad_ray.data.reading import check_source, python_rows, read_records, read_rows
from congrad_ray.data.records import InputError

Row = dict[str, Any]
Write = Callable[[Path], Path]
ROWS: list[Row] = [{"prompt": f" {n}\n“e\u0301”, \t{{", "language": "de", "n": str(n)} for n in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def texts(name: str, data: bytes | str) -> Write:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    return write


def separated(delimiter: str, name: str) -> Write:
    def write(folder: Path) -> Path:
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
        return folder / name

    return write


def zstandard(folder: Path) -> Path:
    with pa.CompressedOutputStream(str(folder / "rows.jsonl.zst"), "zstd") as stream:
        stream.write(LINES.encode())
    return folder / "rows.jsonl.zst"


def parquet(folder: Path) -> Path:
    """String views, as polars writes them."""
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(
        table.cast(pa.schema([(name, pa.string_view()) for name in table.column_names])), folder / "x.parquet"
    )
    return folder / "x.parquet"


def arrow(folder: Path) -> Path:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(folder / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    return folder / "rows.arrow"


def feather_file(folder: Path) -> Path:
    feather.write_feather(pa.Table.from_pylist(ROWS), folder / "rows.feather")
    return folder / "rows.feather"


def saved(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def saved_splits(folder: Path) -> Path:
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(folder / "saved")
    return folder / "saved"


def in_parts(folder: Path) -> Path:
    """A folder as the hub has them: files of two kinds, and others that are no rows."""
    (folder / "data" / "inner").mkdir(parents=True)
    (folder / "data" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    pq.write_table(pa.Table.from_pylist(ROWS[2:]), folder / "data" / "inner" / "b.parquet")
    for name in ("README.md", "dataset_infos.json", ".hidden.jsonl", "_manifest.json"):
        (folder / "data" / name).write_text("{")
    return folder / "data"


def pattern(folder: Path) -> Path:
    return in_parts(folder) / "**"


KINDS: dict[str, Write] = {
    "lines": texts("rows.jsonl", LINES),
    "lines with marks and blanks": texts("rows.jsonl", "\ufeff" + LINES.replace("\n", "\n\n\r\n")),
    "no suffix": texts("rows", LINES),
    "array": texts("rows.json", json.dumps(ROWS)),
    "array, indented": texts("rows.json", "\n" + json.dumps(ROWS, indent=3)),
    "array, a line each": texts("rows.json", "[\n" + LINES.strip().replace("\n", ",\n") + "\n]\n"),
    "array with a mark": texts("rows.json", "\ufeff" + json.dumps(ROWS, ensure_ascii=False)),
    "gzip": texts("rows.jsonl.gz", gzip.compress(LINES.encode())),
    "gzip array": texts("rows.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    "bz2": texts("rows.jsonl.bz2", bz2.compress(LINES.encode())),
    "zstandard": zstandard,
    "csv": separated(",", "rows.csv"),
    "tsv": separated("\t", "rows.tsv"),
    "parquet": parquet,
    "arrow": arrow,
    "feather": feather_file,
    "dataset": saved,
    "splits": saved_splits,
    "folder": in_parts,
    "pattern": pattern,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    source = Source(name=str(KINDS[kind](tmp_path)))
    check_source(source, ("prompt",))
    assert [record.values for record in read_records(source, ("prompt",), ("prompt", "language", "n"))] == ROWS
    assert source_digest(source) and source_digest(source) == source_digest(source)
    written = tmp_path / "out.parquet"
    numbers = np.array([1, 4])
    write_own_rows([source], numbers, {"score": pa.array([0.5, 0.25])}, written.open("wb"))
    expected = [{**ROWS[1], "score": 0.5}, {**ROWS[4], "score": 0.25}]
    assert pq.read_table(written).to_pylist() == expected
    assert list(own_rows([source], numbers, {"score": pa.array([0.5, 0.25])})) == expected


def test_a_long_array_is_read_across_its_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"a": '\\"[{e\u0301😀' * (n % 7), "b": [n, {"c": -1.5e-3}], "d": None} for n in range(400)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), "utf-8")
    for size in (1, 2, 17, 1000):
        monkeypatch.setattr("congrad_ray.data.reading._CHARACTERS", size)
        if size < 4:
            path.write_text(json.dumps(rows[:9], ensure_ascii=False), "utf-8")
        records = list(read_records(Source(name=str(path)), ("a",)))
        assert [record.values for record in records] == (rows[:9] if size < 4 else rows)
        if size >= 4:
            assert records[1].place.startswith("rows.json:")
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), "utf-8")


def test_places_are_lines(tmp_path: Path) -> None:
    array = texts("a.json", '[\n{"prompt": 1},\n\n 7, {"prompt":\n 2}]')(tmp_path)
    places = [(record.place, record.problem and record.problem[0]) for record in read(array)]
    assert places == [("a.json:2", None), ("a.json:4", "not_an_object"), ("a.json:4", None)]
    table = texts("a.csv", 'prompt,n\n"a\nb",1\n\n"x",2,3\ny,4\n')(tmp_path)
    places = [(record.place, record.problem and record.problem[0]) for record in read(table)]
    assert places == [("a.csv:2", None), ("a.csv:5", "wrong_number_of_values"), ("a.csv:6", None)]


def read(path: Path, **more: Any) -> list[Any]:
    return list(read_records(Source(name=str(path), **more), ("prompt",)))


@pytest.mark.parametrize(
    ("write", "text"),
    [
        (texts("x.json", '[{"prompt": 1}, {"prompt": 2]'), "x.json, line 1: no JSON"),
        (texts("x.json", '[{"prompt": 1},\n{"prompt": "2'), "x.json, line 2: no JSON"),
        (texts("x.json", '[{"prompt": 1},\n'), "line 2: the array does not end"),
        (texts("x.json", '[{"prompt": 1},]'), "a comma before the end"),
        (texts("x.json", '[{"prompt": 1} {"prompt": 2}]'), "no comma after a member"),
        (texts("x.json", '[\n{"prompt": 1}]\n{"prompt": 2}'), "more follows after the array"),
        (texts("x.json", '[{"prompt": 1}]\n[{"prompt": 2}]'), "none is a JSON object"),
        (texts("x.csv", 'prompt,n\n"a,1\nb,2\n'), "x.csv, line 3: unexpected end of data"),
        (texts("x.csv", "prompt,prompt\na,b\n"), "several columns 'prompt'"),
        (texts("x.csv", "question;answer\na;b\n"), "no column 'prompt'; columns found: question;answer"),
        (texts("x.csv", ""), "is empty"),
        (texts("x.jsonl.gz", gzip.compress(LINES.encode())[:-9]), "x.jsonl.gz is not a readable file"),
        (texts("x.jsonl.gz", LINES), "x.jsonl.gz is not a readable file"),
        (texts("x.parquet", b"PAR1"), "x.parquet is not a readable Parquet file"),
        (texts("x.arrow", b"ARROW1 and no more"), "x.arrow is not a readable Arrow file"),
        (texts("x.arrow", b"no"), "x.arrow is not a readable Arrow file"),
        (texts("x.parquet.gz", b""), "decompress it"),
        (texts("x.xlsx", b""), ".xlsx files are not supported"),
        (lambda folder: folder / "*.jsonl", "no file matches"),
        (lambda folder: folder, "a folder that has no file that can be read"),
    ],
)
def test_what_cannot_be_read_is_an_error_with_its_name(write: Write, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read(write(tmp_path))
    assert text in str(error.value)


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = saved_splits(tmp_path)
    assert len(read(path, split="test")) == 1
    with pytest.raises(InputError, match=r"no split dev; splits found: \['test', 'train'\]"):
        read(path, split="dev")


def test_a_column_that_one_file_of_several_lacks_is_named(tmp_path: Path) -> None:
    texts("a.jsonl", LINES)(tmp_path)
    texts("b.jsonl", '{"question": 1}\n')(tmp_path)
    with pytest.raises(InputError, match=r"b\.jsonl has no column 'prompt'; columns found: question"):
        read(tmp_path / "[ab].jsonl")


def test_files_of_one_name_in_two_folders_are_two_files(tmp_path: Path) -> None:
    for folder, text in (("a", LINES), ("b", '{"question": 1}\n')):
        (tmp_path / folder).mkdir()
        texts("rows.jsonl", text)(tmp_path / folder)
    with pytest.raises(InputError, match=r"rows\.jsonl has no column 'prompt'; columns found: question"):
        read(tmp_path)


def test_a_store_is_read_as_a_disk_is(tmp_path: Path, store_uri: str) -> None:
    in_parts(tmp_path)
    filesystem, folder = pafs.FileSystem.from_uri(store_uri)
    pafs.copy_files(str(tmp_path / "data"), folder, destination_filesystem=filesystem)
    uri, _, settings = store_uri.partition("?")
    names = ("prompt", "language", "n")
    for name, expected in (("", ROWS), ("/a.jsonl", ROWS[:2]), ("/*.jsonl", ROWS[:2]), ("/**", ROWS)):
        source = Source(name=f"{uri}{name}?{settings}")
        assert [record.values for record in read_records(source, ("prompt",), names)] == expected
    assert source_digest(source) == source_digest(source)
    with pytest.raises(InputError, match="no file s3://") as error:
        list(read_records(Source(name=f"{uri}/none.jsonl?{settings}"), ("prompt",)))
    assert "endpoint" not in str(error.value)
    with pytest.raises(InputError, match="cannot open s3://") as error:
        list(read_records(Source(name=f"s3://key:secret@{uri.partition('://')[2]}?regoin=x"), ("prompt",)))
    assert "secret" not in str(error.value) and "regoin" in str(error.value)


STRUCT = pa.struct([("a", pa.int8()), ("b", pa.list_(pa.int16()))])
TYPED = pa.table(
    {
        "decimal": pa.array([None, 1], pa.decimal128(5)),
        "when": pa.array([datetime.datetime(2026, 1, 2), None], pa.timestamp("us", "UTC")),
        "dictionary": pa.array(["x", "y"]).dictionary_encode(),
        "view": pa.array(["x", "y"], pa.string_view()),
        "large": pa.array([["x"], []], pa.large_list(pa.large_string())),
        "struct": pa.array(
            [{"a": None, "b": [1]}, None], pa.struct([("a", pa.int8()), ("b", pa.list_(pa.int16()))])
        ),
        "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int32())),
        "json": pa.array(['{"a":1}', '{"b":"x"}']).cast(pa.json_()),
        "old": pa.array([1, 2]),
    }
)


def test_columns_keep_their_types(tmp_path: Path) -> None:
    pq.write_table(TYPED, tmp_path / "x.parquet")
    given = pq.read_table(tmp_path / "x.parquet")
    added = {"old": pa.array(["new", None])}
    with (tmp_path / "out.parquet").open("wb") as sink:
        write_own_rows([Source(name=str(tmp_path / "x.parquet"))], np.arange(2), added, sink)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.drop_columns("old") == given.drop_columns("old")
    assert found["old"].to_pylist() == ["new", None]


def test_rows_of_several_files_come_back_exactly(tmp_path: Path) -> None:
    """Where no type holds what all of them have, as JSON: no struct gets a null that a row had not."""
    rows: list[Row] = [
        {"m": [{"role": "user", "content": "x"}], "n": 1, "t": "a", "s": {"a": 1}},
        {"m": [{"role": "tool", "content": "y", "name": "z"}], "n": 2.5, "t": None, "s": {"a": 2}},
        {"m": "text", "n": 3, "t": "c", "s": None, "late": {"b": {}}},
        *({"m": [{"role": "user", "content": str(n)}], "n": n, "t": "d", "s": {"a": n}} for n in range(1500)),
    ]
    path = texts("a.jsonl", "\n".join(map(json.dumps, rows)))(tmp_path)
    typed = {"m": [[{"role": "user", "content": "p"}]], "n": [7], "t": ["e"], "s": [{"a": 3}], "more": [True]}
    pq.write_table(pa.table(typed), tmp_path / "b.parquet")
    sources = [Source(name=str(path)), Source(name=str(tmp_path / "b.parquet"))]
    with (tmp_path / "out.parquet").open("wb") as sink:
        write_own_rows(sources, np.arange(len(rows) + 1), {}, sink)
    found = python_rows(pq.read_table(tmp_path / "out.parquet"))
    last = {"m": typed["m"][0], "n": 7, "t": "e", "s": {"a": 3}, "more": True}
    assert [{key: value for key, value in row.items() if value is not None} for row in found] == [
        {key: value for key, value in row.items() if value is not None} for row in (*rows, last)
    ]
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert (schema.field("n").type, schema.field("t").type) == (pa.float64(), pa.string())
    assert schema.field("s").type == pa.struct([("a", pa.int64())])


def test_rows_are_numbered_over_all_sources(tmp_path: Path) -> None:
    texts("a.jsonl", "no\n" + LINES)(tmp_path)
    separated(",", "b.csv")(tmp_path)
    source = Source(name=str(tmp_path))
    records = [record for rows in read_rows(source) for record in rows.records()]
    assert len(records) == 2 * len(ROWS) + 1 and records[0].problem
    assert list(own_rows([source], np.array([1, 6, 10]), {})) == [ROWS[0], ROWS[0], ROWS[4]]
