"""Sets of ids as arrays of keys, against Python's sets."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from congrad_ray.data.tables import row_id
from congrad_ray.rundir.ids import Ids, keys_of, repeated

ODD = ["0" * 32, "f" * 32, "a" + "0" * 31, "0" * 30 + "01"]
HEXADECIMAL = st.integers(0, 40).map(row_id) | st.sampled_from(ODD)
ANY = st.text(max_size=40) | st.sampled_from(["", "A" * 32, "g" * 32, "0" * 31, "a" * 33, "00" * 16, "p0"])


@example([[row_id(1)]], ["1"])
@given(st.lists(st.lists(HEXADECIMAL) | st.lists(HEXADECIMAL | ANY)), st.lists(HEXADECIMAL | ANY))
def test_a_set_of_ids_is_a_set(parts: list[list[str]], asked: list[str]) -> None:
    ids, expected = Ids.from_parts(parts), {identifier for part in parts for identifier in part}
    assert len(ids) == len(expected)
    assert ids.contains(asked).tolist() == [identifier in expected for identifier in asked]
    assert ids == Ids.from_parts([sorted(expected)]) and (not expected or ids != Ids.from_parts([]))


@given(st.lists(HEXADECIMAL, unique=True), st.integers(0, 5))
def test_keys_of_hexadecimal_ids_have_their_order_wherever_a_column_begins(ids: list[str], start: int) -> None:
    column = pa.chunked_array([pa.array(["x", *ids], pa.string())[1:], pa.array([], pa.string())])[start:]
    keys = keys_of(column)
    assert [key.hex() for key in keys.view("V16").tolist()] == ids[start:]
    assert np.array_equal(np.argsort(keys), np.argsort(np.array(ids[start:], dtype=object)))


@given(st.lists(HEXADECIMAL | ANY))
def test_what_is_there_more_than_once(ids: list[str]) -> None:
    twice = {identifier for identifier in ids if ids.count(identifier) > 1}
    assert Ids(repeated(np.sort(keys_of(ids)))) == Ids.from_parts([list(twice)])


def test_an_id_takes_sixteen_bytes_wherever_it_is_sent() -> None:
    ids = Ids.from_parts([[row_id(number) for number in range(10_000)]])
    outside: list[pickle.PickleBuffer] = []
    assert len(pickle.dumps(ids, protocol=5, buffer_callback=outside.append)) < 1000
    assert sum(buffer.raw().nbytes for buffer in outside) == 160_000


def test_an_id_that_is_null_is_refused() -> None:
    with pytest.raises(ValueError, match="1 ids are null"):
        keys_of(["a", None])  # type: ignore[list-item]
