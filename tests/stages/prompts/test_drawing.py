"""Prompts drawn while they are read, against all of them sorted."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from congrad_ray.data.tables import prompt_id, row_id
from congrad_ray.stages.prompts.drawing import Candidates, Collected


def message(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Sag {number} “mal”"}]


@given(st.lists(st.integers(0, 60)), st.integers(0, 20), st.integers(0, 3))
def test_the_drawn_are_the_first_of_all_whatever_their_order(numbers: list[int], room: int, seed: int) -> None:
    def held(numbers: list[int]) -> list[str]:
        candidates = Candidates(room, seed)
        for number in numbers:
            candidates.offer({"prompt_id": prompt_id("de", message(number)), "prompt": message(number)})
            assert len(candidates.in_order()) <= room
        rows = [candidates.row(key) for key in candidates.in_order()]
        assert all(row["prompt_id"] == prompt_id("de", row["prompt"]) for row in rows)
        return [row["prompt_id"] for row in rows]

    ids = {prompt_id("de", message(number)) for number in numbers}
    assert held(numbers) == sorted(ids, key=lambda identifier: row_id("draw", seed, identifier))[:room]
    assert held(numbers) == held(random.Random(seed).sample(numbers, len(numbers)))


def test_every_row_that_was_read_is_counted_once() -> None:
    found = Collected({"de": 2, "en": 5}, 0, read=14, bad=3, others=Counter(fr=1, it=1))
    for number in (1, 2, 3, 4, 4, 4):
        found.add("de", message(number))
    for number in (1, 2, 1):  # a prompt of another language is another prompt
        found.add("en", message(number))
    counts = found.counts(4)
    assert counts == {
        "rows_read": 14,
        "drawn": 4,
        "not_drawn": 2,
        "duplicates": 3,
        "other_languages": 2,
        "bad": 3,
    }
    assert counts.pop("rows_read") == sum(counts.values())


@pytest.mark.parametrize(("read", "drawn"), [(3, 1), (1, 1), (2, 3)])
def test_a_row_that_is_not_counted_is_an_error(read: int, drawn: int) -> None:
    found = Collected({"de": 2}, 0, read=read)
    found.add("de", message(1))
    found.add("de", message(2))
    with pytest.raises(RuntimeError, match="report this as a bug"):
        found.counts(drawn)
