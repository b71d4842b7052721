"""What happens to a row around the engine, without an engine."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from congrad_ray.config.recipe import Model
from congrad_ray.data.tables import FAILURE, Message
from congrad_ray.modeling.source import ModelSource
from congrad_ray.modeling.tokenization import MissingChatTemplate
from congrad_ray.runtime import engines as engine
from congrad_ray.runtime.engines import (
    Completion,
    Request,
    Task,
    end_of_turn_ids,
    load_chat_tokenizer,
    sampling_seed,
)
from congrad_ray.runtime.vllm_engine import Answered

SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("text", pa.string(), nullable=False)])


def _source(folder: Path, **settings: Any) -> ModelSource:
    return ModelSource(str(folder), Model(name=str(folder), dtype="float32", max_length=64, **settings))


def _prepare(folder: Path, content: Any, max_tokens: int) -> dict[str, Any]:
    source = _source(folder)
    tokenizer = load_chat_tokenizer(source)
    row = {"id": "r", "content": content}

    def request(row: dict[str, Any]) -> Request:
        return Request([{"role": "user", "content": row["content"]}], max_tokens, 0.7, 0.9, 5)

    task = Task(request, lambda row, completion: row, SCHEMA, max_tokens, [7, 8])
    return engine._prepare(row, task, tokenizer, source.settings.max_length, [1])


def test_a_prepared_row_has_one_beginning_of_sequence_and_its_sampling(tiny_model: Path) -> None:
    prepared = _prepare(tiny_model, "The quick brown fox", 8)
    assert prepared["failure"] == ""
    assert prepared["ids"].count(0) == 1
    assert json.loads(prepared["sampling"]) == {
        "max_tokens": 8,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 5,
        "stop_token_ids": [1],
        "logprob_token_ids": [7, 8],
        "allowed_token_ids": [7, 8],
    }


def test_a_prompt_fits_to_the_last_token_and_not_beyond(tiny_model: Path) -> None:
    tokens = len(_prepare(tiny_model, "The quick brown fox", 1)["ids"])
    assert _prepare(tiny_model, "The quick brown fox", 64 - tokens)["failure"] == ""
    failed = json.loads(_prepare(tiny_model, "The quick brown fox", 65 - tokens)["failure"])
    assert failed["reason"] == "prompt_too_long"
    assert failed["detail"] == f"{tokens} prompt tokens + {65 - tokens} to generate > model.max_length 64"


def test_messages_that_cannot_be_rendered_fail_alone(tiny_model: Path) -> None:
    source = _source(tiny_model)
    tokenizer = load_chat_tokenizer(source)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"

    def request(row: dict[str, Any]) -> Request:
        return Request([{"role": "user", "content": "fox"}], 8)

    task = Task(request, lambda row, completion: row, SCHEMA, 8)
    prepared = engine._prepare({"id": "r"}, task, tokenizer, 64, [1])
    failed = json.loads(prepared["failure"])
    assert failed["reason"] == "bad_request"
    assert "roles must alternate" in failed["detail"]


def test_only_sampling_that_differs_from_the_default_goes_to_vllm(tiny_model: Path) -> None:
    source = _source(tiny_model)
    tokenizer = load_chat_tokenizer(source)
    messages: list[Message] = [{"role": "user", "content": "fox"}]

    def sampling(asked: Request) -> dict[str, Any]:
        task = Task(lambda row: asked, lambda row, completion: row, SCHEMA, 8)
        found: dict[str, Any] = json.loads(engine._prepare({"id": "r"}, task, tokenizer, 64, [1])["sampling"])
        return found

    plain = sampling(Request(messages, 8))
    assert plain.keys() == {"max_tokens", "temperature", "top_p", "seed", "stop_token_ids"}
    further = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "stop": ["END"]}
    assert sampling(Request(messages, 8, **further)) == plain | further  # type: ignore[arg-type]


def test_finished_rows_have_one_type_whether_they_failed_or_not() -> None:
    def answered(*values: Any, **named: Any) -> str:
        return json.dumps(asdict(Answered(*values, **named)))

    good = {
        "row": json.dumps({"id": "a"}),
        "failure": "",
        "answer": answered("answered", "hi", 1, 1, False, {7: -1.0}),
    }
    too_long = {
        "row": json.dumps({"id": "b"}),
        "failure": json.dumps({"reason": "r", "detail": "d"}),
        "answer": "",
    }
    broken = {"row": json.dumps({"id": "c"}), "failure": "", "answer": answered("failed", error="ValueError: x")}

    def answer(row: dict[str, Any], completion: Completion) -> dict[str, Any]:
        assert completion.first_logprobs == {7: -1.0}
        return {**row, "text": completion.text}

    task = Task(lambda row: Request([], 8), answer, SCHEMA, 8)
    tables = [engine._finish([row], task) for row in (good, too_long, broken)]
    assert len({table.schema for table in tables}) == 1
    rows = pa.concat_tables(tables).to_pylist()
    assert rows == [
        {"id": "a", "text": "hi", FAILURE: None},
        {"id": "b", "text": None, FAILURE: {"reason": "r", "detail": "d"}},
        {"id": "c", "text": None, FAILURE: {"reason": "inference_error", "detail": "ValueError: x"}},
    ]


def test_end_of_turn_joins_tokenizer_and_generation_configuration(tiny_model: Path, tmp_path: Path) -> None:
    source = _source(tiny_model)
    tokenizer = load_chat_tokenizer(source)
    assert end_of_turn_ids(source, tokenizer) == [1]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 4]}')
    assert end_of_turn_ids(_source(tmp_path), tokenizer) == [1, 4]


def test_a_missing_chat_template_is_reported_on_the_driver(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = None
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(copy)
    with pytest.raises(MissingChatTemplate, match="chat template"):
        load_chat_tokenizer(_source(copy))


def test_seeds_are_stable_and_of_31_bits() -> None:
    seeds = {sampling_seed(0, str(number)) for number in range(1000)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sampling_seed(0, "a") == sampling_seed(0, "a") != sampling_seed(1, "a")
