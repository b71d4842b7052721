"""The study's pairs: cut to equal length, and parts that have no instruction or table in common."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from congrad_ray.modeling.tokenization import load_tokenizer, tokenize_pair
from real_study.pairs import (
    HELD_OUT,
    SELECT,
    StudyDataError,
    check_parallel,
    cut_to_equal,
    study_pairs,
    table_of,
    tokenized_pairs,
)
from real_study.protocol import Protocol

TEMPLATE = Path(__file__).resolve().parents[3] / "jobs" / "real_study" / "open_answer.jinja"


def test_responses_are_cut_to_the_same_number_of_tokens(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    long, short = "Быстрая лиса прыгает через ленивую собаку и спит", "Le renard brun saute par-dessus"
    tokens = len(tokenizer(short, add_special_tokens=False)["input_ids"])
    for most in (5, 1000):
        found = cut_to_equal(tokenizer, long, short, 2, most)
        assert found is not None
        counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in found]
        assert counts[0] == counts[1] <= min(most, tokens - 1)
        assert long.startswith(found[0]) and short.startswith(found[1]) and found[1] != short
    assert cut_to_equal(tokenizer, long, short, tokens, 1000) is None
    assert cut_to_equal(tokenizer, short, short + " Comment", 2, 4) is None  # nothing is left to prefer


def test_answers_without_an_end(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model), TEMPLATE.read_text())
    prompt, *answers = (
        [{"role": role, "content": text}]
        for role, text in (("user", "Why?"), ("assistant", "so"), ("assistant", "no"))
    )
    pair = tokenize_pair(tokenizer, prompt, *answers, max_length=100)
    assert tokenizer.decode(pair.prompt_ids) == "<s>Why?\n\n"
    assert tokenizer.decode(pair.chosen_ids) == "so"


def test_an_instruction_is_in_one_part_only(protocol: Protocol, made_data: Path, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model), TEMPLATE.read_text())
    pairs = study_pairs("alpaca", protocol, made_data, tokenizer)
    assert study_pairs("alpaca", protocol, made_data, tokenizer).equals(pairs)
    instructions: dict[str, set[str]] = {SELECT: set(), HELD_OUT: set()}
    for row in pairs.to_pylist():
        instructions[row["part"]].add(row["prompt"][0]["content"].split()[0])  # its number
    assert not instructions[SELECT] & instructions[HELD_OUT]
    counts = {
        (language, part): sum(row["language"] == language and row["part"] == part for row in pairs.to_pylist())
        for language in ("de", "en", "es")
        for part in (SELECT, HELD_OUT)
    }
    assert set(counts.values()) == {8, 4}
    for pair in tokenized_pairs(pairs, tokenizer, 100):
        assert len(pair.chosen_ids) == len(pair.rejected_ids) <= 12


def test_languages_that_drift_apart_are_refused(made_data: Path) -> None:
    rows, parallel = (
        [json.loads(line) for line in (made_data / f"{name}.jsonl").read_text().splitlines()]
        for name in ("preferences", "eval_prompts")
    )
    assert check_parallel(rows, parallel, 2) == 1
    with pytest.raises(StudyDataError, match=r"up to 1 rows apart.* alpaca.gap is 1"):
        check_parallel(rows, parallel, 1)


def test_a_table_is_in_one_part_in_all_languages(protocol: Protocol, made_data: Path, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model), TEMPLATE.read_text())
    rows = study_pairs("tata", protocol, made_data, tokenizer).to_pylist()
    tables = {
        part: {row["prompt"][0]["content"] for row in rows if row["part"] == part} for part in (SELECT, HELD_OUT)
    }
    assert tables[SELECT] and tables[HELD_OUT] and not tables[SELECT] & tables[HELD_OUT]
    assert {row["chosen_score"] for row in rows} == {2.0}
    assert table_of({"id": "AB-C1-en-12/mt5/other"}) == table_of({"id": "AB-C1-yo-12/x/y"}) == "AB-C1-12"
