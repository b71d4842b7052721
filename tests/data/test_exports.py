"""Exports: what each trainer reads back is the same pairs, byte for byte; the files; the card; the push.

TRL reads with its own code. LLaMA-Factory, axolotl and OpenRLHF are not installed: their readers' rules are
restated here from their sources of July and August 2026.
"""

from __future__ import annotations

import http.server
import json
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import datasets
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings

from congrad_ray.config.names import ExportFormat, Trainer
from congrad_ray.config.recipe import Source
from congrad_ray.data.exports.card import ExportFacts
from congrad_ray.data.exports.push import PushError, check_push, push
from congrad_ray.data.exports.trainers import (
    LLAMA_FACTORY_TAGS,
    NotWritten,
    axolotl_config,
    json_text,
    llama_factory_info,
    trainer_row,
)
from congrad_ray.data.exports.write import Exported, ExportedRow, ExportError, Rows, write_export
from congrad_ray.data.preferences import ChatMessage, Preference
from congrad_ray.modeling.tokenization import load_tokenizer, tokenize_pair

FACTS = ExportFacts(
    model="my/model",
    sources=["pairs.jsonl"],
    keep="top 50 % of each language",
    direction="pcgrad",
    pairs_by_language={"de": (4, 2), "zh-Hans": (2, 1)},
    max_length=512,
    version="0.1.0",
)
TRAINERS: tuple[Trainer, ...] = get_args(Trainer)
FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Ko\u0308ln"}}}
PLAIN = Preference(" Wie geht's?\n", "  Gu\u0308t {so} \u2028", "Schlecht. ", "de")
CHAT = Preference(
    [
        {"role": "system", "content": " Sei ho\u0308flich. "},
        {"role": "user", "content": "Wie geht's?\n"},
        {"role": "assistant", "content": " Gut "},
        {"role": "user", "content": "Und sonst?"},
    ],
    [{"role": "assistant", "content": "Sehr gu\u0308t, danke."}],
    [{"role": "assistant", "content": "Lass mich in Ruhe!"}],
    "de",
)
TOOL_CHAT = Preference(
    [
        {"role": "user", "content": "Wetter?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": " 20 °C", "tool_call_id": "1", "name": "weather"},
    ],
    [{"role": "assistant", "content": " Warm. "}],
    [{"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}],
    "zh-Hans",
    tools=TOOLS,
)


@dataclass(frozen=True)
class Row:
    """A pair, the row that it came from, and what became of it."""

    preference: Preference
    own: dict[str, Any]
    score: float
    kept: bool


def exported_rows(preferences: list[Preference]) -> list[Row]:
    """Every third is a dropped pair."""
    return [
        Row(
            preference,
            {"id": number, "prompt": preference.prompt, "note": f"{number} e\u0301 \u2028", "maybe": None},
            number / 7,
            number % 3 != 2,
        )
        for number, preference in enumerate(preferences)
    ]


def rows_of(rows: list[Row], folder: Path, all_rows: bool = False) -> Rows:
    """As the filter makes them of a file of the rows."""
    path = folder.parent / "own.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(row.own) for row in rows))
    written = [number for number, row in enumerate(rows) if all_rows or row.kept]
    added = {"congrad_score": pa.array([rows[number].score for number in written])}
    if all_rows:
        added["congrad_language"] = pa.array([row.preference.language for row in rows])
        added["congrad_kept"] = pa.array([row.kept for row in rows])

    def pairs() -> Iterator[ExportedRow]:
        return (ExportedRow(row.preference, row.score, row.kept) for row in rows)

    return Rows(pairs, [Source(name=str(path))], np.array(written, dtype=np.int64), added)


def export(rows: list[Row], to: ExportFormat, folder: Path, all_rows: bool = False) -> Exported:
    return write_export(rows_of(rows, folder, all_rows), to, folder, FACTS, all_rows=all_rows)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


# What the readers make of a row.


def chatml(messages: list[ChatMessage], ask: bool = False) -> str:
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + ("<|im_start|>assistant\n" if ask else "")


def trimmed(messages: list[ChatMessage], ask: bool = False) -> str:
    """A template that trims, as Llama 3's and Gemma's."""
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    text = "".join(header.format(m["role"]) + m["content"].strip() + "<|eot_id|>" for m in messages)
    return "<|begin_of_text|>" + text + (header.format("assistant") if ask else "")


TEMPLATES = (chatml, trimmed)


def read_by_llama_factory(row: dict[str, Any], entry: dict[str, Any]) -> Preference | None:
    """Its converters' rules: columns and tags by dataset_info; None for a row that it skips."""
    columns, tags = entry["columns"], entry.get("tags", {})
    assert entry["ranking"] is True
    if entry["formatting"] == "alpaca":
        return Preference(row[columns["prompt"]], row[columns["chosen"]], row[columns["rejected"]], "")
    sides = (tags["user_tag"], tags["observation_tag"]), (tags["assistant_tag"], tags["function_tag"])
    turns = row[columns["messages"]]
    for number, turn in enumerate(turns):
        if turn[tags["role_tag"]] not in sides[number % 2]:
            return None
    answers = [row[columns[side]] for side in ("chosen", "rejected")]
    if len(turns) % 2 == 0 or any(answer[tags["role_tag"]] not in sides[1] for answer in answers):
        return None
    system = [{"role": "system", "content": row[columns["system"]]}] if row[columns["system"]] else []
    messages = [message_of(turn, tags) for turn in turns]
    chosen, rejected = ([message_of(answer, tags)] for answer in answers)
    tools = json.loads(row[columns["tools"]]) if row[columns["tools"]] else None
    return Preference(system + messages, chosen, rejected, "", tools)


def message_of(turn: dict[str, str], tags: dict[str, str]) -> ChatMessage:
    role, value = turn[tags["role_tag"]], turn[tags["content_tag"]]
    if role == tags["function_tag"]:  # its formatter reads JSON, and writes the arguments as JSON
        calls = json.loads(value)
        return {"role": "assistant", "calls": [(call["name"], json.dumps(call["arguments"])) for call in calls]}
    roles = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["observation_tag"]: "tool"}
    return {"role": roles[role], "content": value}


def as_llama_factory_sees(preference: Preference) -> Preference:
    """The pair with what that reader has a place for; calls by name and JSON arguments."""

    def message(found: ChatMessage) -> ChatMessage:
        if found.get("tool_calls"):
            calls = [call["function"] for call in found["tool_calls"]]
            assert not found.get("content")
            return {"role": found["role"], "calls": [(c["name"], json.dumps(c["arguments"])) for c in calls]}
        return {"role": found["role"], "content": found["content"]}

    if isinstance(preference.prompt, str):
        return replace(preference, language="")
    assert not preference.chat_template_kwargs
    sides: list[Any] = [
        [message(m) for m in side] for side in (preference.prompt, preference.chosen, preference.rejected)
    ]
    return Preference(*sides, "", preference.tools or None)


def read_by_axolotl(row: dict[str, Any], config: dict[str, Any], template: Any) -> tuple[str, str]:
    """Prompt + chosen and prompt + rejected as text, by the rules of chat_template.default and user_defined."""
    dataset = config["datasets"][0]
    if isinstance(dataset["type"], dict):
        kind = dataset["type"]
        prompt, chosen, rejected = (
            kind[f"{name}_format"].format(**{name: row[kind[f"field_{name}"]]})
            for name in ("prompt", "chosen", "rejected")
        )
        assert prompt and chosen and rejected
        return prompt + chosen, prompt + rejected
    names = dataset["message_property_mappings"]
    roles = {"user": "user", "assistant": "assistant", "system": "system", "tool": "tool"}

    def taken(message: ChatMessage) -> ChatMessage:
        return {"role": roles[message[names["role"]]], "content": message[names["content"]]}

    def answer(message: ChatMessage) -> str:
        text: str = template([{"role": "user", "content": "[[dummy_message]]"}, taken(message)])
        return text[text.find(message["content"]) :].rstrip()

    prompt = template([taken(message) for message in row[dataset["field_messages"]]], ask=True)
    return prompt + answer(row[dataset["field_chosen"]]), prompt + answer(row[dataset["field_rejected"]])


def read_by_openrlhf(row: dict[str, Any], template: Any, end: str) -> tuple[str, str]:
    """Prompt + chosen and prompt + rejected as text, with --data.apply_chat_template if there is a template."""
    prompt = template(row["prompt"], ask=True) if template else row["prompt"]

    def answered(side: str) -> str:
        answer = template(row["prompt"] + row[side])[len(prompt) :] if template else row[side]
        text: str = (prompt + answer).rstrip("\n")
        return text if text.endswith(end) else f"{text} {end}"

    return answered("chosen"), answered("rejected")


def whole_texts(preference: Preference, template: Any) -> tuple[str, str]:
    prompt: Any = preference.prompt
    sides: tuple[Any, Any] = (preference.chosen, preference.rejected)
    if isinstance(prompt, str):
        return prompt + sides[0], prompt + sides[1]
    assert not preference.tools and not preference.chat_template_kwargs
    said = [{name for name, value in m.items() if value is not None} for m in (*prompt, *sides[0], *sides[1])]
    assert all(names == {"role", "content"} for names in said)
    return template(prompt + sides[0]), template(prompt + sides[1])


# Pairs of all kinds, most of them such as some reader cannot take.

texts = st.one_of(
    st.sampled_from(["a", "user", "1", "e\u0301", " x", "x \n", "{prompt}", '"', "\u2028", "\\n", "Gut, danke."]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
calls = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    texts,
    st.dictionaries(texts, texts | st.integers(-9, 9), max_size=2),
)
extras = st.one_of(
    st.just({}),
    st.just({"name": None}),
    st.just({"reasoning_content": "hm"}),
    st.builds(lambda c: {"tool_calls": [c]}, calls),
)


def messages_of(roles: list[str], longest: int) -> st.SearchStrategy[list[ChatMessage]]:
    message = st.builds(
        lambda role, content, more: {"role": role, "content": content, **more},
        st.sampled_from(roles),
        texts | st.none(),
        extras,
    )
    simple = st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(roles), texts)
    return st.lists(simple, min_size=1, max_size=longest) | st.lists(message, min_size=1, max_size=longest)


chats = st.builds(
    Preference,
    messages_of(["user", "user", "assistant", "system", "tool", "developer"], 3),
    messages_of(["assistant", "assistant", "user"], 2),
    messages_of(["assistant"], 1),
    st.just("de"),
    tools=st.none() | st.just(TOOLS),
    chat_template_kwargs=st.none() | st.just({"enable_thinking": False}),
)
likely = st.builds(
    lambda pairs, chosen, rejected: Preference(
        [
            message
            for asked, answered in pairs
            for message in ({"role": "assistant", "content": answered}, {"role": "user", "content": asked})
        ][1:],
        [{"role": "assistant", "content": chosen}],
        [{"role": "assistant", "content": rejected}],
        "de",
    ),
    st.lists(st.tuples(texts, texts), min_size=1, max_size=3),
    texts,
    texts,
)
plains = st.builds(Preference, texts, texts, texts, st.just("de"))
preferences = plains | chats | likely


@pytest.mark.parametrize("trainer", [trainer for trainer in TRAINERS if trainer != "trl"])
@given(preference=preferences)
@settings(max_examples=300)
def test_what_is_written_is_read_as_the_same_pair(trainer: Trainer, preference: Preference) -> None:
    try:
        row = json.loads(json_text(trainer_row(trainer, preference)))
    except NotWritten:
        return
    shape: Any = "plain" if isinstance(preference.prompt, str) else "chat"
    if trainer == "llama-factory":
        read = read_by_llama_factory(row, llama_factory_info(shape)["congrad"])
        assert read == as_llama_factory_sees(preference)
    for template in TEMPLATES:
        expected = whole_texts(preference, template) if trainer != "llama-factory" else ("", "")
        if trainer == "axolotl":
            found = read_by_axolotl(row, axolotl_config(shape, "x", 9), template)
            assert found == (expected if shape == "plain" else tuple(text.rstrip() for text in expected))
        if trainer == "openrlhf":
            end = (
                "</s>"
                if shape == "plain"
                else template([])[:0] or ("<|im_end|>" if template is chatml else "<|eot_id|>")
            )
            found = read_by_openrlhf(row, template if shape == "chat" else None, end)
            for text, whole in zip(found, expected, strict=True):
                assert text in (whole.rstrip("\n") if shape == "chat" else whole, f"{whole} {end}")


def chat(prompt: list[ChatMessage], answer: ChatMessage | None = None, **more: Any) -> Preference:
    chosen = answer or {"role": "assistant", "content": "Sehr gut, danke."}
    return Preference(prompt, [chosen], [{"role": "assistant", "content": "Lass mich!"}], "de", **more)


USER: ChatMessage = {"role": "user", "content": "Wie geht's?"}
BOTH: ChatMessage = {"role": "assistant", "content": "x", "tool_calls": [CALL]}
THOUGHT: ChatMessage = {"role": "assistant", "content": "x", "reasoning_content": "y"}


@pytest.mark.parametrize(
    "trainer, reason, preference",
    [
        ("llama-factory", "turns_do_not_alternate", chat([USER, USER])),
        ("llama-factory", "turns_do_not_alternate", chat([USER, {"role": "assistant", "content": "Gut"}])),
        ("llama-factory", "empty_system_message", chat([{"role": "system", "content": ""}, USER])),
        ("llama-factory", "role_not_known", chat([{"role": "developer", "content": "?"}])),
        ("llama-factory", "answer_not_of_assistant", chat([USER], {"role": "user", "content": "Gut"})),
        ("llama-factory", "answer_of_several_messages", replace(CHAT, chosen=[*CHAT.chosen, *CHAT.chosen])),
        ("llama-factory", "text_beside_tool_calls", chat([USER], BOTH)),
        ("llama-factory", "other_message_fields", chat([USER], THOUGHT)),
        ("llama-factory", "chat_template_kwargs", chat([USER], chat_template_kwargs={"enable_thinking": False})),
        ("llama-factory", "content_not_text", chat([{"role": "user", "content": ["?"]}])),
        ("axolotl", "tool_calls", replace(TOOL_CHAT, tools=None)),
        ("axolotl", "tools", TOOL_CHAT),
        ("axolotl", "space_around_answer", chat([USER], {"role": "assistant", "content": " Gut"})),
        ("axolotl", "answer_not_found_again", chat([USER], {"role": "assistant", "content": "user"})),
        ("axolotl", "role_not_known", chat([{"role": "developer", "content": "?"}])),
        ("axolotl", "answer_not_of_assistant", chat([USER], {"role": "user", "content": "Sehr gut, danke."})),
        ("openrlhf", "answer_not_of_assistant", chat([USER], {"role": "user", "content": "Gut"})),
        ("openrlhf", "tools", TOOL_CHAT),
        ("openrlhf", "ends_with_newline", Preference("a", "b\n", "c", "de")),
        ("trl", "empty_text", Preference("", "b", "c", "de")),
    ],
)  # fmt: skip
def test_pairs_that_a_reader_would_misread_are_counted_by_reason(
    trainer: Trainer, reason: str, preference: Preference, tmp_path: Path
) -> None:
    good = CHAT if isinstance(preference.prompt, list) else PLAIN
    rows = exported_rows([good, preference])
    exported = export(rows, trainer, tmp_path / "x")
    assert (exported.rows, exported.not_written) == (1, Counter({reason: 1}))
    assert reason in (tmp_path / "x" / "README.md").read_text()
    with pytest.raises(ExportError, match=rf"no row to write for {trainer}.*{reason}: 1"):
        export(rows[1:], trainer, tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_llama_factory_gets_tool_calls_and_results_in_its_own_roles(tmp_path: Path) -> None:
    exported = export(exported_rows([TOOL_CHAT]), "llama-factory", tmp_path / "x")
    info = json.loads((tmp_path / "x" / "dataset_info.json").read_text())["congrad"]
    assert set(info["tags"]) == set(LLAMA_FACTORY_TAGS)  # one that is left out would be none
    (row,) = lines_of(tmp_path / "x" / info["file_name"])
    assert [turn["from"] for turn in row["conversations"]] == ["human", "function_call", "observation"]
    assert read_by_llama_factory(row, info) == as_llama_factory_sees(TOOL_CHAT)
    text = replace(TOOL_CHAT, rejected=[{**TOOL_CHAT.rejected[0], "tool_calls": [with_text_arguments(CALL)]}])  # type: ignore[dict-item]
    assert json.loads(trainer_row("llama-factory", text)["rejected"]["value"])[0]["arguments"] == {
        "city": "Ko\u0308ln"
    }
    assert '"ranking": true' in exported.snippet


def with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """As OpenAI writes them."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}


def test_the_snippet_of_axolotl_is_its_yaml(tmp_path: Path) -> None:
    for preference in (PLAIN, CHAT):
        exported = write_export(
            rows_of(exported_rows([preference]), tmp_path / "x"), "axolotl", tmp_path / "x", FACTS, place="/data/x"
        )
        config = yaml.safe_load(exported.snippet)
        assert config["sequence_len"] == FACTS.max_length
        assert config["datasets"][0]["path"] == "/data/x/train.jsonl"
        (row,) = lines_of(tmp_path / "x" / "train.jsonl")
        found = read_by_axolotl(row, config, chatml)
        assert found[0].rstrip() == whole_texts(preference, chatml)[0].rstrip()


# TRL itself.

TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if enable_thinking is defined %}({{ enable_thinking }}){% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{% for key, value in message | dictsort %}"
    "{{ key }}={{ value }};{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def trained(folder: Path, model: Path, template: str | None, length: int = 512) -> list[dict[str, Any]]:
    """The rows as TRL made them after one step on the export."""
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    tokenizer = load_tokenizer(str(model), template)
    dataset = datasets.load_dataset(str(folder), split="train", cache_dir=str(folder.parent / "cache"))
    arguments = DPOConfig(
        output_dir=str(folder.parent / "trained"),
        max_steps=1,
        per_device_train_batch_size=2,
        max_length=length,
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        save_strategy="no",
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.global_step == 1
    return [trainer.train_dataset[number] for number in range(len(trainer.train_dataset))]


@pytest.mark.parametrize("preference", [PLAIN, CHAT], ids=["plain", "chat"])
def test_trl_trains_on_the_ids_that_the_pairs_were_scored_by(
    preference: Preference, tiny_model: Path, tmp_path: Path
) -> None:
    pairs = [preference, replace(preference, chosen=preference.rejected, rejected=preference.chosen)]
    export(exported_rows(pairs), "trl", tmp_path / "x")
    tokenizer = load_tokenizer(str(tiny_model))
    for row, pair in zip(trained(tmp_path / "x", tiny_model, None), pairs, strict=True):
        expected = tokenize_pair(tokenizer, pair.prompt, pair.chosen, pair.rejected, 512)
        assert row["prompt_ids"] == expected.prompt_ids
        assert (row["chosen_ids"], row["rejected_ids"]) == (expected.chosen_ids, expected.rejected_ids)


@pytest.mark.parametrize("pairs", [[PLAIN], [CHAT], [TOOL_CHAT, CHAT]], ids=["plain", "chat", "tools"])
def test_trl_is_given_the_same_pairs(pairs: list[Preference], tmp_path: Path) -> None:
    export(exported_rows(pairs), "trl", tmp_path / "x")
    rows = datasets.load_dataset(str(tmp_path / "x"), split="train", cache_dir=str(tmp_path / "cache"))
    for row, pair in zip(rows, pairs, strict=True):
        assert [row[side] for side in ("prompt", "chosen", "rejected")] == [
            pair.prompt,
            pair.chosen,
            pair.rejected,
        ]
        assert json.loads(row.get("tools") or "null") == pair.tools
        assert not [name for name in row if name.startswith("ref_")]  # TRL would take them for its own
    if pairs == [CHAT]:  # what every version of datasets reads
        text = datasets.Value("string")
        assert rows.features["prompt"] == datasets.List({"role": text, "content": text})


def test_trl_renders_tool_calls_as_in_the_users_own_rows(tiny_model: Path, tmp_path: Path) -> None:
    """No message gets a field with null that it had not, and no row tools or arguments of the template."""
    pairs = [TOOL_CHAT, replace(CHAT, chat_template_kwargs={"enable_thinking": False})]
    export(exported_rows(pairs), "trl", tmp_path / "x")
    tokenizer = load_tokenizer(str(tiny_model), TOOL_TEMPLATE)
    for row, pair in zip(trained(tmp_path / "x", tiny_model, TOOL_TEMPLATE), pairs, strict=True):
        more = {"tools": pair.tools, **(pair.chat_template_kwargs or {})}
        for side in ("chosen", "rejected"):
            messages: Any = [*pair.prompt, *getattr(pair, side)]
            expected = tokenizer.apply_chat_template(messages, return_dict=True, **more)["input_ids"]
            assert row["prompt_ids"] + row[f"{side}_ids"] == expected


# Files.


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("all_rows", [False, True], ids=["kept", "all"])
def test_every_export_is_loaded_by_its_folder(to: ExportFormat, all_rows: bool, tmp_path: Path) -> None:
    rows = exported_rows([CHAT] * 8)
    exported = export(rows, to, tmp_path / "x", all_rows)
    kept = [row for row in rows if row.kept]
    assert (exported.rows, exported.dropped) == (len(kept), len(rows) - len(kept) if all_rows else 0)
    cache = str(tmp_path / "cache")
    if to == "dataset":  # from a folder on a disk `load_dataset` refuses it, from the hub it reads the card
        front = yaml.safe_load((tmp_path / "x" / "README.md").read_text().split("---\n")[1])
        (files,) = front["configs"][0]["data_files"]
        found = datasets.load_dataset(
            "arrow", data_files={files["split"]: str(tmp_path / "x" / files["path"])}, cache_dir=cache
        )
        assert list(datasets.load_from_disk(str(tmp_path / "x"))["id"]) == list(found["train"]["id"])
    else:
        found = datasets.load_dataset(str(tmp_path / "x"), cache_dir=cache)
    if to in TRAINERS:
        assert set(found) == ({"train", "dropped"} if all_rows else {"train"})
        assert found["train"]["congrad_score"] == [row.score for row in kept]
        assert set(found["train"]["language"]) == {"de"}
        if all_rows:
            assert found["train"]["kept"] == [True] * len(kept) and not any(found["dropped"]["kept"])
    else:
        written = rows if all_rows else kept
        assert found["train"]["congrad_score"] == [row.score for row in written]
        for name in ("id", "note", "prompt"):
            assert list(found["train"][name]) == [row.own[name] for row in written]
        if all_rows:
            assert found["train"]["congrad_kept"] == [row.kept for row in written]
            assert set(found["train"]["congrad_language"]) == {"de"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_jsonl_holds_the_users_rows_as_they_are(tmp_path: Path) -> None:
    own = {
        "z": 1,
        "a": "e\u0301 \u2028 \ud800",
        "nested": {"b": [None, 1.5, {}]},
        "big": 2**70,
        "congrad_score": "old",
    }
    export([Row(CHAT, own, 0.5, True)], "jsonl", tmp_path / "x")
    (row,) = lines_of(tmp_path / "x" / "train.jsonl")
    assert list(row.items()) == list({**own, "congrad_score": 0.5}.items())
    export([Row(CHAT, {"a": "é\u2028ö"}, 0.5, True)], "jsonl", tmp_path / "x")
    assert "é\u2028ö".encode() in (tmp_path / "x" / "train.jsonl").read_bytes()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_both_shapes_in_one_export_are_refused_with_their_counts(trainer: Trainer, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "before").touch()
    with pytest.raises(ExportError, match=r"1 of the pairs are plain text and 3 are chat messages.*--chat"):
        export(exported_rows([CHAT, CHAT, PLAIN, PLAIN, CHAT]), trainer, tmp_path / "x")
    assert [path.name for path in tmp_path.rglob("*") if path.suffix != ".jsonl"] == ["x", "before"]


@pytest.mark.parametrize("to", FORMATS)
def test_rows_pass_in_chunks(to: ExportFormat, tmp_path: Path) -> None:
    """The memory for many rows is not that of all rows."""
    count, text = 10000, "x" * 4000
    pair = Preference(text, "Gut.", "Nein!", "de")
    path = tmp_path / "own.jsonl"
    path.write_text(f'{{"text": "{text}"}}\n' * count)
    score = {"congrad_score": pa.array([0.5] * count)}
    export(exported_rows([PLAIN]), to, tmp_path / "first" / "x")  # what is imported at first use

    def stream() -> Iterator[ExportedRow]:
        return (ExportedRow(replace(pair, prompt=f"{number} {text}"), 0.5, True) for number in range(count))

    tracemalloc.start()
    rows = Rows(stream, [Source(name=str(path))], np.arange(count), score)
    exported = write_export(rows, to, tmp_path / "x", FACTS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert exported.rows == count
    assert peak < count * len(text) / 2


# The card.


def test_the_card_says_what_was_filtered_and_no_secret(tmp_path: Path) -> None:
    facts = replace(
        FACTS,
        model=str(tmp_path / "secret-place" / "my-model"),
        sources=[
            "s3://key:password@bucket/a.parquet?token=abc",
            str(tmp_path / "secret-place" / "b.jsonl"),
            "org/pairs",
        ],
        settings={"beta": "0.1", "odd|name": "a\x1bb"},
    )
    write_export(rows_of(exported_rows([CHAT]), tmp_path / "x"), "trl", tmp_path / "x", facts)
    text = (tmp_path / "x" / "README.md").read_text()
    for secret in ("password", "abc", "secret-place", str(tmp_path), "\x1b"):
        assert secret not in text
    for said in (
        "`s3://bucket/a.parquet`",
        "`b.jsonl`",
        "`org/pairs`",
        "`my-model`",
        "2503.23777",
        "| zh-Hans | 2 | 1 |",
    ):
        assert said in text
    assert "3 of 6 preference pairs" in text and "top 50 % of each language" in text
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["language"] == ["de", "zh"]
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "train.parquet"}]


# The push, against a stand-in of the hub.


class StandIn(http.server.ThreadingHTTPServer):
    """A stand-in of the hub's API for what an upload asks: it keeps the commit and answers as the hub does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.private: bool | None = None
        self.role = "write"
        self.files: dict[str, bytes] = {}
        self.fails = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(http.server.BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        if self.headers.get("authorization") != "Bearer hf_right":
            self._answer({"error": "Invalid user token."}, 401)
        elif self.path == "/api/whoami-v2":
            self._answer({"name": "me", "auth": {"accessToken": {"role": self.server.role}}})
        elif self.path.startswith("/api/datasets/me/pairs"):
            self._answer({"id": "me/pairs", "private": self.server.private, "sha": "0" * 40, "siblings": []})
        else:
            self._answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        import base64

        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.server.fails:
            self._answer({"error": "broken"}, 400)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            if self.server.private is None:
                self.server.private = asked["visibility"] == "private"
                self._answer({"url": f"{self.server.address}/datasets/me/pairs", "id": "me/pairs"})
            else:
                self._answer({"error": "already there", "url": f"{self.server.address}/datasets/me/pairs"}, 409)
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif self.path.endswith("/commit/main"):
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._answer(
                {"commitUrl": f"{self.server.address}/datasets/me/pairs/commit/{'1' * 40}", "commitOid": "1" * 40}
            )
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        else:
            self._answer({"error": "not found"}, 404)

    def _answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_export_is_pushed_as_it_lies_in_its_folder(hub: StandIn, tmp_path: Path) -> None:
    export(exported_rows([CHAT] * 3), "llama-factory", tmp_path / "x")
    check_push("me/pairs", hub.address)
    address = push(tmp_path / "x", "me/pairs", endpoint=hub.address)
    assert address.endswith("datasets/me/pairs")
    assert hub.private is True
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}


def test_only_on_request_is_an_export_public(hub: StandIn, tmp_path: Path) -> None:
    export(exported_rows([PLAIN]), "trl", tmp_path / "x")
    push(tmp_path / "x", "me/pairs", public=True, endpoint=hub.address)
    assert hub.private is False
    hub.files.clear()
    with pytest.raises(PushError, match="there and public"):
        push(tmp_path / "x", "me/pairs", endpoint=hub.address)
    assert not hub.files


def test_a_push_that_cannot_work_is_refused_before_the_work(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PushError, match="USER/DATASET"):
        check_push("pairs", hub.address)
    with pytest.raises(PushError, match="no name of a dataset"):
        check_push("me/../pairs", hub.address)
    hub.role = "read"
    with pytest.raises(PushError, match="may only read"):
        check_push("me/pairs", hub.address)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_and_secret")
    with pytest.raises(PushError, match="does not accept us") as refused:
        check_push("me/pairs", hub.address)
    assert "hf_wrong" not in str(refused.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(PushError, match=r"no Hugging Face token.*hf auth login"):
        check_push("me/pairs", hub.address)


def test_a_push_that_fails_says_how_to_try_again(hub: StandIn, tmp_path: Path) -> None:
    export(exported_rows([PLAIN]), "trl", tmp_path / "x")
    hub.fails = True
    with pytest.raises(PushError, match="hf upload me/pairs"):
        push(tmp_path / "x", "me/pairs", endpoint=hub.address)
