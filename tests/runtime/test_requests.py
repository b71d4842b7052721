"""What happens to a row around the engine, without an engine."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Model
from congrad_ray.data.tables import FAILURE
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
    assert prepared["tokenized_prompt"].count(0) == 1
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
    tokens = len(_prepare(tiny_model, "The quick brown fox", 1)["tokenized_prompt"])
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


@pytest.mark.parametrize(
    ("tokens", "truncated"), [([5, 6, 7], True), ([5, 6, 1], False), ([5, 1], False), ([1], False)]
)
def test_truncated_means_stopped_by_the_limit(tokens: list[int], truncated: bool) -> None:
    row = {
        "generated_tokens": tokens,
        "generated_text": "x",
        "num_input_tokens": 4,
        "sampling": json.dumps({"max_tokens": 3}),
        "logprobs": [{7: {"logprob": -0.5, "rank": 1, "decoded_token": "a"}}, {8: {"logprob": -9.0}}],
    }
    completion = engine._completion(row, [1])
    assert completion["truncated"] is truncated
    assert completion["response_tokens"] == len(tokens)
    assert completion["first_logprobs"] == {"7": -0.5}


def test_finished_rows_have_one_type_whether_they_failed_or_not() -> None:
    good = {
        "row": json.dumps({"id": "a"}),
        "failure": "",
        "completion": json.dumps(
            {
                "text": "hi",
                "prompt_tokens": 1,
                "response_tokens": 1,
                "truncated": False,
                "first_logprobs": {"7": -1.0},
            }
        ),
    }
    too_long = {"row": json.dumps({"id": "b"}), "failure": json.dumps({"reason": "r", "detail": "d"})}
    broken = {"row": json.dumps({"id": "c"}), "failure": "", "__inference_error__": "ValueError: x"}

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


def test_engines_on_a_cpu_compute_whole_prompts(tiny_model: Path) -> None:
    config = engine._processor_config(_source(tiny_model), Profile(name="local", threads=3), 1000, 8)
    assert config.engine_kwargs["enable_chunked_prefill"] is False
    assert config.engine_kwargs["max_num_batched_tokens"] >= config.engine_kwargs["max_model_len"] == 64
    assert config.runtime_env is not None
    assert config.runtime_env["env_vars"]["OMP_NUM_THREADS"] == "3"
    # Not the waiting that replicas are configured with: decoding would take a third longer and more.
    assert int(config.runtime_env["env_vars"]["GOMP_SPINCOUNT"]) > 0


def test_engine_settings_on_gpus_share_the_bundle_over_tensor_parallel_workers(tiny_model: Path) -> None:
    gpu = {"min_actors": 1, "max_actors": 2, "cpus": 8.0, "gpus": 4.0, "tensor_parallel_size": 4}
    profile = Profile.model_validate(
        {
            "name": "x",
            "device": "cuda",
            "engines": gpu,
            "sketchers": {"gpus": 1.0},
            "trainers": {"gpus": 1.0},
        }
    )
    config = engine._processor_config(_source(tiny_model), profile, 1000, 64)
    assert config.placement_group_config is not None
    assert config.placement_group_config["bundles"] == [{"CPU": 2.0, "GPU": 1.0}] * 4
    assert config.engine_kwargs["tensor_parallel_size"] == 4
    assert config.engine_kwargs["enforce_eager"] is False
    assert config.concurrency == (1, 2)
    assert config.runtime_env is None
