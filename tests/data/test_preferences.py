"""Rows as people have them give the token ids that TRL's DPOTrainer makes of the raw rows."""

from __future__ import annotations

import copy
import csv
import gzip
import json
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from congrad_ray.config.recipe import Source
from congrad_ray.config.settings import SettingsError
from congrad_ray.data.preferences import Columns, Preference, preference_in, stored, tokenize_arguments
from congrad_ray.data.reading import read_records
from congrad_ray.data.records import BadRow, Record
from congrad_ray.modeling.tokenization import TokenizedPair, load_tokenizer, tokenize_pair
from tiny_models import CHAT_TEMPLATE

Row = dict[str, Any]
Folders = pytest.TempPathFactory


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    """With a template that renders tools, thoughts and tool calls."""
    return load_tokenizer(str(tiny_model), (files("trl") / "chat_templates" / "qwen3.jinja").read_text())


def trl_ids(tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> list[TokenizedPair]:
    """The ids of TRL's own dataset preparation, of rows of one shape."""
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    given = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    made = DPOTrainer._prepare_dataset(trainer, given, tokenizer, arguments, "train")
    return [TokenizedPair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in made]


def read(row: Row, columns: Columns | None = None, chat: bool = False) -> Preference:
    return preference_in(Record("rows:1", row), columns or Columns(), "en", chat)


def our_ids(tokenizer: PreTrainedTokenizerBase, preference: Preference) -> TokenizedPair:
    """As the sketch stage makes them of what the filter stores."""
    return tokenize_pair(tokenizer, max_length=10**6, **tokenize_arguments(stored(preference, 0)))


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> Row:
    return {"role": "assistant", "content": content, **more}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Kraków", "days": None}}}
ANSWERED = [assistant("", tool_calls=[CALL]), {"role": "tool", "content": '{"°C": 21}', "name": "weather"}]
ANSWERS = {"chosen": [assistant("Blue.")], "rejected": [assistant("Lisbon.")]}

SHAPES: dict[str, Row] = {
    "plain": {"prompt": "The sky is", "chosen": " blue.", "rejected": " Lisbon."},
    "white space at the ends": {"prompt": "\n\nHuman: 2?\n", "chosen": "  2\n\n", "rejected": "\t3 "},
    "only white space differs": {"prompt": "def f():\n", "chosen": "    return 1\n", "rejected": "  return 1\n"},
    "decomposed": {"prompt": "Cafe\u0301", "chosen": "e\u0301", "rejected": "\u00e9"},
    "nukta": {"prompt": "\u0921\u093c", "chosen": "\u095c", "rejected": "\u0921\u093c"},
    "with the end token": {"prompt": "<s>The sky is", "chosen": " blue.</s>", "rejected": " red.</s>"},
    "plain, implicit": {"chosen": "The sky is blue.", "rejected": "The sky is red."},
    "plain, one begins the other": {"chosen": "The sky is blue", "rejected": "The sky is blue and red"},
    "chat": {"prompt": [user(" What? ")], **ANSWERS},
    "chat, implicit": {
        "chosen": [user("What?"), *ANSWERS["chosen"]],
        "rejected": [user("What?"), *ANSWERS["rejected"]],
    },
    "system": {"prompt": [{"role": "system", "content": "Be brief."}, user("What?")], **ANSWERS},
    "empty system": {"prompt": [{"role": "system", "content": ""}, user("What?")], **ANSWERS},
    "several turns": {"prompt": [user("a"), assistant("b"), user("c")], **ANSWERS},
    "several turns in the responses": {
        "prompt": [user("a")],
        "chosen": [assistant("b"), user("c"), assistant("d")],
        "rejected": [assistant("e"), user("f"), assistant("g")],
    },
    "tools": {"prompt": [user("Weather?")], **ANSWERS, "tools": [WEATHER]},
    "tools as text": {"prompt": [user("Weather?")], **ANSWERS, "tools": json.dumps([WEATHER])},
    "tool turns": {
        "prompt": [user("Weather?"), *ANSWERED],
        "chosen": [assistant("21 °C")],
        "rejected": [assistant("I do not know.")],
        "tools": [WEATHER],
    },
    "tool calls that are preferred": {
        "prompt": [user("Weather?")],
        "chosen": [assistant("", tool_calls=[CALL])],
        "rejected": [assistant("Look outside.")],
    },
    "thoughts": {
        "prompt": [user("2 + 2?")],
        "chosen": [assistant("4", reasoning_content="Two and two.")],
        "rejected": [assistant("5", reasoning_content="Hm.")],
    },
    "arguments of a row": {
        "prompt": [user("What?")],
        **ANSWERS,
        "chat_template_kwargs": {"enable_thinking": False},
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_are_those_of_trl_on_the_raw_row(tokenizer: PreTrainedTokenizerBase, shape: str) -> None:
    row = SHAPES[shape]
    before = copy.deepcopy(row)
    assert our_ids(tokenizer, read(row)) == trl_ids(tokenizer, [row])[0]
    assert row == before


def test_the_arguments_of_a_row_go_before_those_of_the_recipe(tiny_model: Path) -> None:
    template = (files("trl") / "chat_templates" / "qwen3.jinja").read_text()
    off = load_tokenizer(str(tiny_model), template, chat_template_kwargs={"enable_thinking": False})
    on = load_tokenizer(str(tiny_model), template)
    bare = read(SHAPES["chat"])
    with_own = read({**SHAPES["chat"], "chat_template_kwargs": {"enable_thinking": True}})
    assert (
        our_ids(off, bare)
        == trl_ids(on, [{**SHAPES["chat"], "chat_template_kwargs": {"enable_thinking": False}}])[0]
    )
    assert our_ids(off, with_own) == our_ids(on, bare) != our_ids(off, bare)


CHAT = {"prompt": [user("What?")], **ANSWERS}


def part(text: str) -> Row:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("row", "columns", "taken"),
    [
        ({**CHAT, "prompt": "What?"}, {}, "column"),
        ({"prompt": "What?", "chosen": "Blue.", "rejected": [assistant("Lisbon.")]}, {}, "column"),
        ({"prompt": "What?", "chosen": assistant("Blue."), "rejected": assistant("Lisbon.")}, {}, "column"),
        (
            {**CHAT, "prompt": [user([{"type": "text", "text": "Wh"}, {"type": "text", "text": "at?"}])]},
            {},
            "column",
        ),
        ({**CHAT, "prompt": [{"role": "system", "content": None}, user("What?")]}, {}, "column"),
        ({**CHAT, "prompt": [{**user("What?"), "tool_calls": None, "name": None}]}, {}, "column"),
        ({**CHAT, "tools": None, "chat_template_kwargs": None}, {}, "column"),
        ({**CHAT, "tools": "", "chat_template_kwargs": {"a": None}}, {}, "column"),
        ({name: [user("What?"), *ANSWERS[name]] for name in ANSWERS} | {"prompt": "What?"}, {}, "both"),
        ({name: [user("What?"), *ANSWERS[name]] for name in ANSWERS} | {"prompt": [user("What?")]}, {}, "both"),
        ({name: [user("What?"), *ANSWERS[name]] for name in ANSWERS} | {"prompt": None}, {}, "responses"),
        (
            {
                "conversations": [{"from": "human", "value": "What?"}],
                "chosen": {"from": "gpt", "value": "Blue."},
                "rejected": {"from": "gpt", "value": "Lisbon."},
            },
            {"prompt": "conversations"},
            "column",
        ),
        (
            {
                "instruction": "What?",
                "completions": [
                    {"response": text, "score": {"all": score}}
                    for text, score in [("Red.", 3), ("Blue.", 4.5), ("Late.", "N/A"), ("Lisbon.", "1"), ("?", 1)]
                ],
            },
            {
                "prompt": "instruction",
                "responses": "completions.response",
                "ratings": "completions.score.all",
            },
            "column",
        ),
    ],
)
def test_rows_that_mean_the_same_are_the_same(row: Row, columns: dict[str, str], taken: str) -> None:
    chat = "completions" in row
    assert read(row, Columns.of(columns), chat) == Preference(**CHAT, language="en", prompt_from=taken)  # type: ignore[arg-type]


def test_strings_are_a_chat_where_asked() -> None:
    row = {"prompt": " What?", "chosen": "Blue. ", "rejected": "e\u0301", "about": "Be brief."}
    found = read(row, Columns.of({"system": "about"}), chat=True)
    assert found.prompt == [{"role": "system", "content": "Be brief."}, user(" What?")]
    assert (found.chosen, found.rejected) == ([assistant("Blue. ")], [assistant("e\u0301")])


def test_a_function_call_of_sharegpt_becomes_a_tool_call() -> None:
    turns = [("human", "Weather?"), ("function_call", '{"name": "weather", "arguments": {"city": "x"}}')]
    turns.append(("observation", "21"))
    prompt = [{"from": role, "value": value} for role, value in turns]
    found = read({"prompt": prompt, **ANSWERS}).prompt
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "x"}}}
    assert found == [user("Weather?"), assistant("", tool_calls=[call]), {"role": "tool", "content": "21"}]


@pytest.mark.parametrize(
    ("row", "columns", "reason"),
    [
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, {}, "identical_responses"),
        ({"prompt": "x", "chosen": " ", "rejected": "a"}, {}, "chosen_empty"),
        ({"prompt": "x", "chosen": None, "rejected": "a"}, {}, "chosen_not_text"),
        ({"prompt": 3, "chosen": "b", "rejected": "a"}, {}, "prompt_not_text"),
        ({"prompt": "x", "chosen": "b"}, {}, "missing_column"),
        ({"prompt": "x", "chosen": "\ud800", "rejected": "a"}, {}, "chosen_not_unicode"),
        ({"prompt": [user({"type": "image"})], **ANSWERS}, {}, "prompt_not_text"),
        ({"prompt": [user([{"type": "image", "url": "x"}])], **ANSWERS}, {}, "prompt_not_text"),
        ({"prompt": ["x"], **ANSWERS}, {}, "prompt_not_messages"),
        ({"prompt": [], **ANSWERS}, {}, "prompt_empty"),
        ({"prompt": [{"from": "clown", "value": "x"}], **ANSWERS}, {}, "prompt_unknown_role"),
        ({"prompt": None, **ANSWERS}, {}, "prompt_missing"),
        ({**CHAT, "chosen": [user("Who?"), assistant("Blue.")]}, {}, "prompt_not_at_head"),
        ({**CHAT, **{name: [user("Who?"), *ANSWERS[name]] for name in ANSWERS}}, {}, "prompt_not_at_head"),
        ({**CHAT, "chosen": [user("What?")], "rejected": [user("What?"), assistant("x")]}, {}, "chosen_empty"),
        ({**CHAT, "tools": "{"}, {}, "tools_not_json"),
        ({**CHAT, "tools": {"a": 1}}, {}, "tools_not_a_list"),
        ({**CHAT, "chat_template_kwargs": [1]}, {}, "chat_template_kwargs_not_a_mapping"),
        ({"prompt": "x", "r": ["a", "b"], "s": [1, 1.0]}, {"responses": "r", "ratings": "s"}, "equal_ratings"),
        ({"prompt": "x", "r": ["a", "b"], "s": [1, None]}, {"responses": "r", "ratings": "s"}, "too_few_ratings"),
        ({"prompt": "x", "r": ["a", "b"], "s": [1]}, {"responses": "r", "ratings": "s"}, "ratings_not_lists"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "s": "y"}, {"system": "s"}, "system_of_plain_text"),
    ],
)
def test_rows_that_cannot_be_used_have_a_reason(row: Row, columns: dict[str, str], reason: str) -> None:
    with pytest.raises(BadRow) as error:
        read(row, Columns.of(columns))
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"promt": "x"}, "there is no 'promt'; there are prompt, chosen"),
        ({"ratings": "x"}, "go together"),
        ({"ratings": "x", "responses": "y", "chosen": "z"}, "chosen and rejected, or responses and ratings"),
    ],
)
def test_columns_that_cannot_be_are_refused(columns: dict[str, str], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        Columns.of(columns)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
SPACED = st.tuples(st.sampled_from(["", " ", "\n", "\t", "\u3000"]), TEXT, st.sampled_from(["", " ", "\n\n"])).map(
    "".join
)
ANSWERS_OF = st.tuples(SPACED, SPACED).filter(lambda pair: pair[0] != pair[1])


def plain(prompt: str, answers: tuple[str, str]) -> Row:
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}


def chat(prompt: str, answers: tuple[str, str]) -> Row:
    chosen, rejected = answers
    return {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def implicit(prompt: str, answers: tuple[str, str]) -> Row:
    chosen, rejected = answers
    system = {"role": "system", "content": prompt[::-1]}
    return {
        name: [system, user(prompt), assistant(text)]
        for name, text in (("chosen", chosen), ("rejected", rejected))
    }


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8", newline="")
    return path


def write_gzip(path: Path, rows: list[Row]) -> Path:
    path = path.with_suffix(".jsonl.gz")
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return path


def write_array(path: Path, rows: list[Row]) -> Path:
    path = path.with_suffix(".json")
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), "utf-8", newline="")
    return path


def write_parquet(path: Path, rows: list[Row]) -> Path:
    path = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_csv(path: Path, rows: list[Row]) -> Path:
    if not isinstance(rows[0].get("prompt"), str):
        return write_jsonl(path, rows)
    path = path.with_suffix(".csv")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_dataset(path: Path, rows: list[Row]) -> Path:
    path = path.with_suffix("")
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize("shape", [plain, chat, implicit])
@pytest.mark.parametrize("write", [write_jsonl, write_gzip, write_array, write_parquet, write_csv, write_dataset])
@settings(max_examples=4, suppress_health_check=list(HealthCheck))
@given(data=st.lists(st.tuples(SPACED, ANSWERS_OF), min_size=1, max_size=12))
def test_random_texts_in_every_file_have_the_ids_of_trl(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: Folders,
    shape: Any,
    write: Any,
    data: list[tuple[str, tuple[str, str]]],
) -> None:
    rows = [shape(prompt, answers) for prompt, answers in data]
    path = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    records = list(read_records(Source(name=str(path)), ("chosen",), ("prompt", "chosen", "rejected")))
    found = [our_ids(tokenizer, preference_in(record, Columns(), "en")) for record in records]
    assert found == trl_ids(tokenizer, rows)


def test_a_template_that_refuses_system_turns_loses_no_row_for_an_empty_one(tiny_model: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    tokenizer = load_tokenizer(str(tiny_model), refusing)
    with_system = read({**CHAT, "prompt": [{"role": "system", "content": ""}, user("What?")]})
    assert our_ids(tokenizer, with_system) == our_ids(tokenizer, read(CHAT))
    with pytest.raises(ValueError, match="no system"):
        our_ids(tokenizer, read(SHAPES["system"]))
