"""One way to ask a model: a Ray dataset of rows in, the rows with the model's completions out.

The engines are those of `runtime.pools`. Chat templates and tokenisation run in Ray Data's own map tasks with
the tokeniser of training (`chat_prompt_ids`), so what a model is asked and what it is trained on are the same ids,
with the beginning-of-sequence token exactly once. One light actor of Ray Data sends the batches to the engines.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from congrad_ray.config.profile import PoolName, Profile
from congrad_ray.config.recipe import Model, Recipe
from congrad_ray.data.tables import FAILURE, FAILURE_FIELD, Message, failure, row_id, table_of
from congrad_ray.modeling.source import ModelSource, named_model, settings_of
from congrad_ray.modeling.tokenization import MissingChatTemplate, chat_prompt_ids
from congrad_ray.runtime.attempts import attempts, killed_worker
from congrad_ray.runtime.driver_actors import driver_actor
from congrad_ray.runtime.notices import Notify
from congrad_ray.runtime.pools import ENGINE_RESTARTS, engine_spec, engines_for
from congrad_ray.runtime.resources import pool_sizes
from congrad_ray.runtime.vllm_engine import Answered, Asked, EngineLog

if TYPE_CHECKING:
    from ray.data import Dataset
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]

# Rows travel as JSON text, so that no column of theirs can change its Arrow type from one block to the next.
_REQUESTS = pa.schema(
    [
        pa.field("row", pa.large_string()),
        pa.field("failure", pa.string()),  # JSON; "" in a row that goes to an engine
        pa.field("ids", pa.list_(pa.int32())),
        pa.field("sampling", pa.string()),
    ]
)
# Ray Data fuses maps that ask for the same resources, and would merge the blocks of the repartitioning again.
_PREPARE: dict[str, Any] = {"num_cpus": 0.5}
# In a row, of one engine; one more and it is given up.
_FAILED_STARTS = 2
_LOOK_AGAIN = 1.0


@dataclass(frozen=True)
class Request:
    """What to ask: chat messages (the last one the user's) and how to sample. Temperature 0 is greedy."""

    messages: list[Message]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    json_schema: str | None = None
    """The answer can be nothing but JSON of this schema."""


@dataclass(frozen=True)
class Completion:
    """What came back.

    `truncated`: generation stopped at `max_tokens` and not by an end of turn or a text of `stop`.
    `first_logprobs`: natural log-probabilities, before temperature and top_p, of the scored tokens as the first
    generated one.
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
    scored_texts: Sequence[str] = ()
    """`scored_tokens` for a server, whose ids nobody knows: `first_logprobs` are by the places of these texts."""


class EngineFailed(ValueError):
    """The cluster could not do the work: engines, reward models or others that do not start or do not last."""


@contextmanager
def engine_failures() -> Iterator[None]:
    """Around the execution of a dataset of `complete`: turns Ray's errors into EngineFailed with a way out."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        raise EngineFailed(
            f"{str(error).strip()[-1500:]}\n\n"
            f"The stage stopped in the cluster; an engine that ends is started again {ENGINE_RESTARTS} times. "
            "What it said (vLLM, or whatever else judges) is in the worker-*.out and worker-*.err files of its "
            "node, by default in /tmp/ray/session_latest/logs. If vLLM ran out of memory, lower "
            "engines.max_num_seqs, gpu_memory_utilization or kv_cache_gib in the profile, or model.max_length in "
            "the recipe. Rows that were written are kept: run the stage again to resume."
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


def judge_source(name: str, recipe: Recipe) -> ModelSource:
    """A model that judges, by folder, hub name or builtin-world; with its own chat template and revision.

    What the recipe says of `model` besides (dtype, max_length, trust_remote_code) holds for the judge too.
    """
    source = named_model(name, settings_of(name, recipe), recipe.seed)
    return replace(source, longest=recipe.longest_asked(name))


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
    *,
    pool: PoolName = "engines",
) -> Dataset:
    """Asks the model about all `rows`; the result has the columns of the task's schema and FAILURE, in any order.

    A row that fails keeps the columns of the schema that it already has, the others are null, and its FAILURE is
    one of 'bad_request' (its messages cannot be rendered), 'prompt_too_long' (prompt tokens + max_tokens exceed
    the source's `max_length`; it is not sent to an engine), 'inference_error' and 'killed_worker' (its engines
    died repeatedly).

    The engines are those of the profile's section `pool`, and stay up as `runtime.pools` says.

    Raises MissingChatTemplate or ModelError before any engine starts.
    """
    import ray
    from ray.data import ActorPoolStrategy

    engines = profile.engines_of(pool)
    batch = engines.rows_per_batch(task.max_tokens)
    tokenizer = load_chat_tokenizer(source)
    stop_ids = end_of_turn_ids(source, tokenizer)
    max_length = source.settings.max_length

    def prepare(batch: pa.Table) -> pa.Table:
        of_worker = _cached_tokenizer(source)
        prepared = [_prepare(row, task, of_worker, max_length, stop_ids) for row in batch.to_pylist()]
        return table_of(prepared, _REQUESTS)

    def finish(batch: pa.Table) -> pa.Table:
        return _finish(batch.to_pylist(), task)

    sizes = pool_sizes(engines, profile, math.ceil(rows / max(batch, engines.max_num_seqs)))
    log = driver_actor(EngineLog)
    up = engines_for(engine_spec(source, profile, engines), *sizes, profile)
    for engine in up.engines.values():
        engine.begin.remote(notify, log)
    # A batch is done when its last row is; meanwhile the rows of others fill the engine, which decodes
    # max_num_seqs at once.
    each = math.ceil(2 * engines.max_num_seqs / batch) + 1
    at_once = each * len(up.engines)
    # Blocks of one engine batch: otherwise a small table is one block, and all of it goes to one engine as one
    # task whose rows come back together at the end.
    requests = dataset.repartition(target_num_rows_per_block=batch).map_batches(
        prepare, batch_format="pyarrow", batch_size=None, **_PREPARE
    )
    answers = requests.map_batches(
        AskEngines,
        fn_constructor_args=(up.engines, each, log, attempts(), notify),
        batch_format="pyarrow",
        batch_size=None,
        compute=ActorPoolStrategy(
            size=1, max_tasks_in_flight_per_actor=at_once, max_concurrent_calls_per_actor=at_once
        ),
        num_cpus=0,
        # It waits for engines on nodes that come and go.
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
    )
    return answers.map_batches(finish, batch_format="pyarrow", batch_size=None)


@dataclass
class _Engine:
    """What the actor that sends batches knows of an engine."""

    name: str
    actor: Any
    batches: int = 0  # that it is at
    ready: bool = False
    life: int = 0  # one more each time that it is found to be gone


class AskEngines:
    """Sends batches to the engines that are up, to the least busy one first; for Ray Data's map_batches.

    A batch whose engine ended is sent again, to whichever is ready next. Raises what the last engine ended by when
    none is left.
    """

    def __init__(self, engines: Mapping[str, Any], each: int, log: Any, of_driver: Any, notify: Notify) -> None:
        self._engines = [_Engine(name, actor) for name, actor in engines.items()]
        self._each, self._log, self._of_driver, self._notify = each, log, of_driver, notify
        self._changed: asyncio.Condition | None = None
        self._error: Exception | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """The rows with a column `answer`, an `Answered` as JSON; of a row with a failure it is empty."""
        if self._changed is None:
            self._changed = asyncio.Condition()
            for engine in self._engines:
                self._wake(engine)
        rows = batch.select(["row", "failure", "ids", "sampling"]).to_pylist()
        asked = [
            Asked(row_id("request", row["row"]), row["ids"], row["sampling"]) for row in rows if not row["failure"]
        ]
        answers = iter(await self._ask(asked) if asked else [])
        texts = ["" if row["failure"] else json.dumps(asdict(next(answers))) for row in rows]
        kept = batch.select(["row", "failure"])
        yield kept.append_column("answer", pa.array(texts, pa.large_string()))

    async def _ask(self, asked: list[Asked]) -> list[Answered]:
        from ray.exceptions import RayError, RayTaskError

        while True:
            engine = await self._free()
            life = engine.life
            try:
                answers: list[Answered] = await engine.actor.ask.remote(asked, self._notify, self._of_driver)
                return answers
            except RayTaskError:  # an error in the code, not the end of an engine
                raise
            except RayError:
                if engine.life == life:  # the first of its batches to find out
                    engine.life, engine.ready = life + 1, False
                    self._wake(engine)
            finally:
                engine.batches -= 1
                await self._tell()

    async def _free(self) -> _Engine:
        """An engine with room for one more batch, which is counted as there."""
        assert self._changed is not None
        async with self._changed:
            while True:
                if not self._engines:
                    assert self._error is not None
                    raise self._error
                ready = [engine for engine in self._engines if engine.ready and engine.batches < self._each]
                if ready:
                    engine = min(ready, key=lambda engine: engine.batches)
                    engine.batches += 1
                    return engine
                await self._changed.wait()

    async def _tell(self) -> None:
        assert self._changed is not None
        async with self._changed:
            self._changed.notify_all()

    def _wake(self, engine: _Engine) -> None:
        task = asyncio.get_running_loop().create_task(self._until_ready(engine))
        self._tasks.add(task)  # the loop itself does not keep it
        task.add_done_callback(self._tasks.discard)

    async def _until_ready(self, engine: _Engine) -> None:
        """Waits until an engine is up, or gives it up: one that does not start, or is not started again."""
        from ray.exceptions import ActorDiedError, RayError

        dead = 0
        while not engine.ready:
            try:
                await engine.actor.ready.remote(self._notify, self._log)
                engine.ready = True
            except RayError as error:
                # While Ray starts an actor again, calls may fail either way.
                dead = dead + 1 if isinstance(error, ActorDiedError) else 0
                if dead > _FAILED_STARTS or await self._log.failed_starts.remote(engine.name) > _FAILED_STARTS:
                    self._error = error
                    self._engines.remove(engine)
                    if self._engines:
                        said = str(error).strip().splitlines()
                        self._notify(f"an engine is given up: {said[-1] if said else type(error).__name__}", 30)
                    break
                await asyncio.sleep(_LOOK_AGAIN)
        await self._tell()


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
            **_further(asked),
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
        "ids": ids,
        "sampling": json.dumps(sampling),
    }


def _further(asked: Request) -> dict[str, Any]:
    """vLLM's names and values of what is not as vLLM has it by default."""
    found: dict[str, Any] = {}
    if asked.top_k is not None:
        found["top_k"] = asked.top_k
    if asked.min_p:
        found["min_p"] = float(asked.min_p)
    if asked.repetition_penalty != 1:
        found["repetition_penalty"] = float(asked.repetition_penalty)
    if asked.stop:
        found["stop"] = list(asked.stop)
    if asked.json_schema is not None:
        found["structured_outputs"] = {"json": asked.json_schema}
    return found


def _finish(rows: Sequence[Row], task: Task) -> pa.Table:
    results = []
    for result in rows:
        row = json.loads(result["row"])
        failed = json.loads(result["failure"]) if result["failure"] else None
        answered = None if failed else Answered(**json.loads(result["answer"]))
        if answered and answered.outcome != "answered":
            killed = answered.outcome == "killed"
            failed = killed_worker() if killed else failure("inference_error", answered.error)
        if failed:
            results.append({name: row.get(name) for name in task.schema.names} | {FAILURE: failed})
            continue
        assert answered is not None
        results.append(task.answer(row, _completion(answered)) | {FAILURE: None})
    nullable = [column.with_nullable(True) for column in task.schema]
    return table_of(results, pa.schema([*nullable, FAILURE_FIELD]))


def _completion(answered: Answered) -> Completion:
    # JSON has no numbers as names.
    first = {int(token): value for token, value in answered.first_logprobs.items()}
    return Completion(answered.text, answered.prompt_tokens, answered.response_tokens, answered.truncated, first)


_tokenizers: dict[tuple[str, str, Model], PreTrainedTokenizerBase] = {}


def _cached_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of this worker process. Its template comes along: the recipe holds its text or name."""
    key = (source.name, source.fingerprint, source.settings)
    if key not in _tokenizers:
        _tokenizers.clear()  # a stage uses one model at a time
        _tokenizers[key] = source.load_tokenizer()
    return _tokenizers[key]
