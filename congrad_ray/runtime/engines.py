"""One way to ask a model: a Ray dataset of rows in, the rows with the model's completions out.

The vLLM engines of `ray.data.llm` are the only actors. Chat templates and tokenisation run in Ray Data's own map
tasks with the tokeniser of training (`chat_prompt_ids`), so what a model is asked and what it is trained on
are the same ids, with the beginning-of-sequence token exactly once.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Model, Recipe
from congrad_ray.data.tables import FAILURE, FAILURE_FIELD, Message, failure, row_id, table_of
from congrad_ray.modeling.source import ModelSource, named_model, settings_of
from congrad_ray.modeling.tokenization import MissingChatTemplate, chat_prompt_ids
from congrad_ray.runtime.attempts import attempts, killed_worker
from congrad_ray.runtime.notices import Notify
from congrad_ray.runtime.resources import pool_sizes

if TYPE_CHECKING:
    from ray.data import Dataset
    from ray.data.llm import vLLMEngineProcessorConfig
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]

# What goes through Ray's processor, whose own columns are Python dictionaries without a schema: rows travel as
# JSON text, so that no column of theirs can change its Arrow type from one block to the next.
_REQUESTS = pa.schema(
    [
        pa.field("row", pa.large_string()),
        pa.field("failure", pa.string()),  # JSON; "" in a row that goes to the engine
        pa.field("tokenized_prompt", pa.list_(pa.int32())),
        pa.field("sampling", pa.string()),
    ]
)
# ray.data.llm: a row with this set bypasses the engine and the postprocess function.
_ERROR = "__inference_error__"
_KILLED = "killed_worker"  # its value in a row that must not be asked any more
_CPU_BATCHED_TOKENS = 4096
# Ray Data fuses maps that ask for the same resources, and would merge the blocks of the repartitioning again.
_PREPARE: dict[str, Any] = {"num_cpus": 0.5}
_ENGINE_RESTARTS = 20


@dataclass(frozen=True)
class Request:
    """What to ask: chat messages (the last one the user's) and how to sample. Temperature 0 is greedy."""

    messages: list[Message]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What came back.

    `truncated`: generation stopped at `max_tokens` and not by an end of turn. `first_logprobs`: natural
    log-probabilities, before temperature and top_p, of the scored tokens as the first generated one.
    """

    text: str
    prompt_tokens: int
    response_tokens: int
    truncated: bool
    first_logprobs: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What a model is asked about each row, and what becomes of its answers. Its functions run in Ray tasks."""

    request: Callable[[Row], Request]
    answer: Callable[[Row, Completion], Row]
    """Takes a row and its completion; returns a row of `schema`."""
    schema: pa.Schema
    max_tokens: int
    """The most that a request asks for, which decides how many rows go to an engine together."""
    scored_tokens: Sequence[int] = ()
    """Ids whose log-probabilities as the first generated token are wanted; only they are generated."""
    length_setting: str = "model.max_length"
    """Where the recipe has the source's `max_length`, for messages."""


class EngineFailed(ValueError):
    """The cluster could not do the work, engines that do not start or do not last above all."""


@contextmanager
def engine_failures() -> Iterator[None]:
    """Around the execution of a dataset of `complete`: turns Ray's errors into EngineFailed with a way out."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        raise EngineFailed(
            f"{str(error).strip()[-1500:]}\n\n"
            f"The stage stopped in the cluster; an engine that ends is started again {_ENGINE_RESTARTS} times. "
            "What vLLM said is in the worker-*.out and worker-*.err files of the engine's node, by default in "
            "/tmp/ray/session_latest/logs. If it ran out of memory, lower engines.max_num_seqs, "
            "gpu_memory_utilization or kv_cache_gib in the profile, or model.max_length in the recipe. Rows that "
            "were written are kept: run the stage again to resume."
        ) from error


def sampling_seed(seed: int, identifier: str) -> int:
    """A seed in 0..2**31-1 for one request: the same for the same recipe seed and row id, on every machine."""
    return int(row_id("seed", seed, identifier), 16) % 2**31


def load_chat_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that is to chat. Raises MissingChatTemplate, so call it before an engine starts."""
    tokenizer = source.load_tokenizer()
    chat_prompt_ids(tokenizer, [{"role": "user", "content": "?"}])
    return tokenizer


def with_length(source: ModelSource, max_length: int) -> ModelSource:
    """The model with another longest sequence (prompt and what it generates) than model.max_length."""
    return replace(source, settings=source.settings.model_copy(update={"max_length": max_length}))


def positions(source: ModelSource) -> int | None:
    """How many positions a model's configuration says it has, where it does."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.whole.files(), **source.whole.pretrained_arguments())
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def judge_source(name: str, recipe: Recipe) -> ModelSource:
    """A model that judges, by folder, hub name or builtin-world; with its own chat template and revision.

    What the recipe says of `model` besides (dtype, max_length, trust_remote_code) holds for the judge too.
    """
    return named_model(name, settings_of(name, recipe), recipe.seed)


def end_of_turn_ids(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a turn: the tokenizer's end of sequence and those of the generation configuration."""
    from transformers import GenerationConfig

    found = {tokenizer.eos_token_id}
    try:
        configured = GenerationConfig.from_pretrained(source.whole.files()).eos_token_id
    except OSError:  # a model without generation_config.json
        configured = None
    found.update(configured if isinstance(configured, list) else [configured])
    return sorted(identifier for identifier in found if identifier is not None)


def complete(
    dataset: Dataset,
    rows: int,
    source: ModelSource,
    profile: Profile,
    task: Task,
    notify: Notify,
) -> Dataset:
    """Asks the model about all `rows`; the result has the columns of the task's schema and FAILURE, in any order.

    A row that fails keeps the columns of the schema that it already has, the others are null, and its FAILURE is
    one of 'bad_request' (its messages cannot be rendered), 'prompt_too_long' (prompt tokens + max_tokens exceed
    the source's `max_length`; it is not sent to an engine), 'inference_error' and 'killed_worker' (its engines
    died repeatedly).

    Raises MissingChatTemplate or ModelError before any engine starts.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # otherwise importing it here reports what it lacks
    from ray.data.llm import build_processor

    batch = profile.engines.rows_per_batch(task.max_tokens)
    tokenizer = load_chat_tokenizer(source)
    stop_ids = end_of_turn_ids(source, tokenizer)
    max_length = source.settings.max_length

    def prepare(batch: pa.Table) -> pa.Table:
        of_worker = _cached_tokenizer(source)
        prepared = [_prepare(row, task, of_worker, max_length, stop_ids) for row in batch.to_pylist()]
        return table_of(prepared, _REQUESTS)

    def finish(batch: pa.Table) -> pa.Table:
        return _finish(batch.to_pylist(), task)

    processor = build_processor(
        _processor_config(source, profile, rows, batch),
        preprocess=lambda row: {"sampling_params": json.loads(row["sampling"]), _ERROR: row["failure"]},
        preprocess_map_kwargs=_PREPARE,
        postprocess=lambda row: {
            "row": row["row"],
            "failure": "",
            "completion": json.dumps(_completion(row, stop_ids)),
        },
    )
    name = "vLLMEngineStage"
    stage = processor.get_stage_by_name(name)
    # Ray would restart for ever an engine that ends whatever it is asked.
    stage.map_batches_kwargs["max_restarts"] = _ENGINE_RESTARTS
    # A copy: assigning to the stage's field works its resources out again, without the placement group.
    processor.stages[name] = stage.model_copy(update={"fn": _engine_class(stage.fn, source, attempts(), notify)})
    # Blocks of one engine batch: otherwise a small table is one block, and all of it goes to one engine as one
    # task whose rows come back together at the end.
    requests = dataset.repartition(target_num_rows_per_block=batch).map_batches(
        prepare, batch_format="pyarrow", batch_size=None, **_PREPARE
    )
    return processor(requests).map_batches(finish, batch_format="pyarrow", batch_size=None)


def _prepare(
    row: Row, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, stop_ids: Sequence[int]
) -> Row:
    """The row as one of `_REQUESTS`."""
    failed = None
    sampling: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    ids = [0]  # never sent: an empty list would have no Arrow type of its own in a block of failed rows
    try:
        asked = task.request(row)
        ids = chat_prompt_ids(tokenizer, asked.messages)
    except MissingChatTemplate:
        raise
    except Exception as error:  # a template may raise anything, Jinja's own errors among them
        failed = failure("bad_request", f"{type(error).__name__}: {error}")
    else:
        sampling = {
            "max_tokens": asked.max_tokens,
            "temperature": float(asked.temperature),
            "top_p": float(asked.top_p),
            "seed": asked.seed,
        }
        if len(ids) + asked.max_tokens > max_length:
            failed = failure(
                "prompt_too_long",
                f"{len(ids)} prompt tokens + {asked.max_tokens} to generate > {task.length_setting} {max_length}",
            )
    sampling["stop_token_ids"] = list(stop_ids)
    if task.scored_tokens:
        # vLLM gives log-probabilities before the restriction, so that what the others had is known too.
        sampling["logprob_token_ids"] = sampling["allowed_token_ids"] = list(task.scored_tokens)
    return {
        "row": json.dumps(row, ensure_ascii=False),
        "failure": json.dumps(failed) if failed else "",
        "tokenized_prompt": ids,
        "sampling": json.dumps(sampling),
    }


def _completion(row: Row, stop_ids: Sequence[int]) -> dict[str, Any]:
    """The fields of a Completion from an output row of ray.data.llm, which has no finish reason."""
    tokens = [int(token) for token in row["generated_tokens"]]
    first = row["logprobs"][0] if row.get("logprobs") is not None and len(row["logprobs"]) else {}
    max_tokens = json.loads(row["sampling"])["max_tokens"]
    return {
        "text": row["generated_text"],
        "prompt_tokens": int(row["num_input_tokens"]),
        "response_tokens": len(tokens),
        "truncated": len(tokens) >= max_tokens and tokens[-1] not in stop_ids,
        "first_logprobs": {str(token): float(entry["logprob"]) for token, entry in first.items()},
    }


def _finish(rows: Sequence[Row], task: Task) -> pa.Table:
    results = []
    for result in rows:
        row = json.loads(result["row"])
        failed = None
        if result.get("failure"):
            failed = json.loads(result["failure"])
        elif result.get(_ERROR):
            failed = killed_worker() if result[_ERROR] == _KILLED else failure("inference_error", result[_ERROR])
        if failed:
            results.append({name: row.get(name) for name in task.schema.names} | {FAILURE: failed})
            continue
        values = json.loads(result["completion"])
        values["first_logprobs"] = {int(token): value for token, value in values["first_logprobs"].items()}
        results.append(task.answer(row, Completion(**values)) | {FAILURE: None})
    nullable = [column.with_nullable(True) for column in task.schema]
    return table_of(results, pa.schema([*nullable, FAILURE_FIELD]))


_tokenizers: dict[tuple[str, str, Model], PreTrainedTokenizerBase] = {}


def _cached_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of this worker process. Its template comes along: the recipe holds its text or name."""
    key = (source.name, source.fingerprint, source.settings)
    if key not in _tokenizers:
        _tokenizers.clear()  # a stage uses one model at a time
        _tokenizers[key] = source.load_tokenizer()
    return _tokenizers[key]


def _processor_config(source: ModelSource, profile: Profile, rows: int, batch: int) -> vLLMEngineProcessorConfig:
    from ray.data.llm import vLLMEngineProcessorConfig

    engines, settings = profile.engines, source.settings
    on_cpu = profile.device == "cpu"
    engine_kwargs: dict[str, Any] = {
        "dtype": settings.dtype,
        "max_model_len": settings.max_length,
        "max_num_seqs": engines.max_num_seqs,
        "trust_remote_code": settings.trust_remote_code,
        "enable_prefix_caching": True,
        "enforce_eager": on_cpu or engines.enforce_eager,
        "load_format": "safetensors",
        "disable_log_stats": True,
        "seed": 0,
    }
    if "revision" in source.pretrained_arguments():
        engine_kwargs["revision"] = engine_kwargs["tokenizer_revision"] = settings.revision
    bundle: dict[str, float] = {"CPU": engines.cpus / engines.tensor_parallel_size, **engines.resources}
    if engines.memory_bytes:
        bundle["memory"] = engines.memory_bytes // engines.tensor_parallel_size
    environment: dict[str, str] = {}
    if on_cpu:
        environment = _cpu_environment(profile)
        # vLLM 0.29 dies on a CPU ("CPU Generator does not use offset") when the prompt of a request with a seed
        # is computed in chunks, which happens as soon as many requests arrive together.
        engine_kwargs["enable_chunked_prefill"] = False
        engine_kwargs["max_num_batched_tokens"] = max(_CPU_BATCHED_TOKENS, settings.max_length)
    else:
        engine_kwargs["tensor_parallel_size"] = engines.tensor_parallel_size
        engine_kwargs["gpu_memory_utilization"] = engines.gpu_memory_utilization
        bundle["GPU"] = engines.gpus / engines.tensor_parallel_size
    return vLLMEngineProcessorConfig(
        # Enough to read a configuration; engines put their node's own path in its place.
        model_source=source.whole.files(),
        engine_kwargs=engine_kwargs,
        concurrency=pool_sizes(engines, profile, math.ceil(rows / max(batch, engines.max_num_seqs))),
        batch_size=batch,
        # Enough batches at once to fill the engine, and one more to be at hand when the first is done.
        max_concurrent_batches=max(2, math.ceil(engines.max_num_seqs / batch) + 1),
        placement_group_config={
            "bundles": [dict(bundle) for _ in range(engines.tensor_parallel_size)],
            "strategy": engines.placement,
        },
        runtime_env={"env_vars": environment} if environment else None,
        should_continue_on_error=True,
        log_engine_metrics=False,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        prepare_multimodal_stage=False,
    )


def _cpu_environment(profile: Profile) -> dict[str, str]:
    """Variables of an engine's process on a CPU; each saves seconds at the start or time while running."""
    return {
        # vLLM would pin every engine of a node to the same cores; threads that wait for a busy core spin.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(profile.threads_of(profile.engines)),
        # Decoding is many small products, between which threads should not sleep: libgomp's own default, which
        # takes precedence over the waiting that session.connect sets for other workers.
        "GOMP_SPINCOUNT": "300000",
        # Without it the first request with log-probabilities waits for a C++ compilation of the sampler.
        "TORCH_COMPILE_DISABLE": "1",
    }


def _engine_class(engine: type[Any], source: ModelSource, of_driver: Any, notify: Notify) -> type[Any]:
    """The engine stage's class, for a node's own copy of the model and rows that may kill the engine.

    A model on an object store is copied, and an adapter merged, where the engine is. `of_driver` is the actor of
    `runtime.attempts`: rows that ended engines again and again are asked one at a time, and then no longer. Every
    answer is reported by `notify`.
    """

    class Engine(engine):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            if source.is_made_here:
                named["model"] = source.local_path()
            notify(f"starting vLLM for {source.name}")
            super().__init__(*arguments, **named)
            notify("vLLM is ready")
            self._one_at_a_time = asyncio.Lock()

        async def udf(self, batch: list[Row]) -> AsyncIterator[Row]:
            keys = [row_id("request", row["row"]) for row in batch]
            verdicts = await of_driver.begin.remote(keys)
            asked = list(zip(keys, batch, verdicts, strict=True))
            together = [row for _, row, verdict in asked if verdict == "together"]
            if together:
                async for output in super().udf(together):
                    notify.computed(1)
                    yield output
                notify.computed(0, last=True)
                await of_driver.end.remote([key for key, _, verdict in asked if verdict == "together"])
            for key, row, verdict in asked:
                if verdict == "alone":
                    async with self._one_at_a_time:
                        await of_driver.begin_alone.remote(key)
                        async for output in super().udf([row]):
                            yield output
                        await of_driver.end.remote([key])
                elif verdict == "never":
                    yield {self.IDX_IN_BATCH_COLUMN: row[self.IDX_IN_BATCH_COLUMN], _ERROR: _KILLED}

    Engine.__name__ = engine.__name__  # after which Ray names operator and actors
    return Engine
