"""Asking a model behind HTTP, one with OpenAI's chat completions; the same rows and failures as of engines.

By its source, `ray.data.llm.HttpRequestProcessorConfig` raises for a row that is out of tries, which ends the
stage, tries no 500 again, does not look at Retry-After, counts requests per second within each batch, forgets the
status of an answer (a 400 looks like an answer without choices), and takes the key as a header in its
configuration. Here the `openai` client does all of that in one actor of Ray Data's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import SecretStr

from congrad_ray.config.endpoint import Endpoint
from congrad_ray.config.printable import printable
from congrad_ray.config.settings import SettingsError
from congrad_ray.data.tables import FAILURE, FAILURE_FIELD, failure, table_of
from congrad_ray.runtime.engines import Completion, Request, Row, Task
from congrad_ray.runtime.notices import Notify

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from ray.data import Dataset

# Rows that come back, and are written, together.
_BATCH = 16
# The most that servers with OpenAI's interface give of a token's alternatives.
_TOP_LOGPROBS = 20


class EndpointError(SettingsError):
    """A server cannot be used as the recipe asks; the text has its words and the way out."""


def endpoint_key(endpoint: Endpoint) -> SecretStr:
    """The key in this process's environment; empty where the endpoint needs none.

    Raises SettingsError naming the variable that is not set.
    """
    name = endpoint.api_key_env
    if name is None:
        return SecretStr("")
    key = os.environ.get(name, "").strip()
    if not key:
        raise SettingsError(
            f"endpoint {endpoint.url}: the environment has no {name}, which api_key_env names: set it to the "
            "server's key where this command runs"
        )
    return SecretStr(key)


def ask_endpoint(
    dataset: Dataset, rows: int, endpoint: Endpoint, key: SecretStr, task: Task, notify: Notify
) -> Dataset:
    """Asks the server about all `rows`; the result has the columns of the task's schema and FAILURE, in any order.

    A row's failure is one of 'bad_request' (the server does not take it), 'refused' (its answer was withheld or
    refused) and 'inference_error' (no answer after all tries), with the server's words. `max_retries` tries more
    follow 408, 409, 429, 500 and above, timeouts and lost connections, after the server's Retry-After (up to two
    minutes) or a pause that doubles. Tokens are the server's `usage`.
    """
    from ray.data import ActorPoolStrategy

    at_once = max(2, math.ceil(endpoint.max_concurrency / _BATCH) + 1)
    strategy = ActorPoolStrategy(
        size=1, max_tasks_in_flight_per_actor=at_once, max_concurrent_calls_per_actor=at_once
    )
    return dataset.repartition(target_num_rows_per_block=_BATCH).map_batches(
        Asker,
        fn_constructor_args=(endpoint, key, task, notify),
        batch_format="pyarrow",
        batch_size=None,
        compute=strategy,
        num_cpus=0,
    )


def check_endpoint(endpoint: Endpoint, key: SecretStr, task: Task, request: Request) -> None:
    """Asks the server `request`, so that what concerns all rows is known before any work.

    Raises EndpointError with its words where it does not answer, or not in the way that the task needs.
    """

    async def probe() -> None:
        async with _client(endpoint, key, None) as client:
            await _ask(client, endpoint, task, request)

    try:
        asyncio.run(probe())
    except Refused:  # it answers
        return
    except EndpointError:
        raise
    except Exception as error:  # whatever the client and what it is built on raise
        raise EndpointError(
            f"endpoint {endpoint.url}, model {endpoint.model}: {_words(error, key).rstrip('.')}. "
            f"{_way_out(error, endpoint, request)}"
        ) from None


class Refused(Exception):
    """The server answered, but without the answer: it was refused, or a filter took it."""


class Asker:
    """Asks a server about batches of rows; of several at once, in one actor, so that its limits hold for all."""

    def __init__(self, endpoint: Endpoint, key: SecretStr, task: Task, notify: Notify) -> None:
        logging.getLogger("httpx").setLevel(logging.WARNING)
        self._endpoint, self._key, self._task, self._notify = endpoint, key, task, notify
        self._places: asyncio.Semaphore | None = None
        self._client: AsyncOpenAI | None = None

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """The batch's rows with their answers, together."""
        if self._places is None:  # made where the loop is
            self._places = asyncio.Semaphore(self._endpoint.max_concurrency)
            self._client = _client(self._endpoint, self._key, self._notify)
        rows = await asyncio.gather(*(self._row(row) for row in batch.to_pylist()))
        self._notify.computed(0, last=True)
        nullable = [column.with_nullable(True) for column in self._task.schema]
        yield table_of(list(rows), pa.schema([*nullable, FAILURE_FIELD]))

    async def _row(self, row: Row) -> Row:
        assert self._places is not None and self._client is not None
        try:
            async with self._places:
                completion = await _ask(self._client, self._endpoint, self._task, self._task.request(row))
        except Exception as error:  # one row's matter, whatever it is
            failed = failure(_reason(error), _words(error, self._key))
            return {name: row.get(name) for name in self._task.schema.names} | {FAILURE: failed}
        finally:
            self._notify.computed(1)
        if not completion.prompt_tokens:
            self._notify(
                f"{self._endpoint.url} says nothing of the tokens used: they and the cost count 0", logging.WARNING
            )
        return self._task.answer(row, completion) | {FAILURE: None}


def _client(endpoint: Endpoint, key: SecretStr, notify: Notify | None) -> AsyncOpenAI:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    turn = Turns(endpoint.requests_per_minute)

    async def before(request: Any) -> None:  # tries again count as well
        await turn.wait()

    async def after(response: Any) -> None:
        status = response.status_code
        if notify and (status in (408, 409, 429) or status >= 500):
            wait = response.headers.get("retry-after")
            asked = f" (Retry-After: {printable(wait)})" if wait else ""
            notify(f"{endpoint.url} answers {status}{asked}: asked again, up to {endpoint.max_retries} times")

    return AsyncOpenAI(
        base_url=endpoint.url,
        api_key=key.get_secret_value() or "none",
        timeout=endpoint.timeout_s,
        max_retries=endpoint.max_retries,
        http_client=DefaultAsyncHttpxClient(event_hooks={"request": [before], "response": [after]}),
    )


class Turns:
    """Spaces requests so that no minute has more than so many."""

    def __init__(self, per_minute: int | None) -> None:
        self._pause = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0

    def after(self, now: float) -> float:
        """Seconds until the turn of one that comes at `now`, which is taken."""
        turn = max(now, self._next)
        self._next = turn + self._pause
        return turn - now

    async def wait(self) -> None:
        """Returns when it is the caller's turn."""
        if self._pause:
            await asyncio.sleep(self.after(time.monotonic()))


async def _ask(client: AsyncOpenAI, endpoint: Endpoint, task: Task, request: Request) -> Completion:
    """One request. Raises openai's errors, Refused, and EndpointError for an answer without what is needed."""
    answer: Any = await client.chat.completions.create(**arguments_of(endpoint, task, request))
    return completion_of(answer, task.scored_texts)


def arguments_of(endpoint: Endpoint, task: Task, request: Request) -> dict[str, Any]:
    """The request as the client takes it, without settings that change nothing: not every server knows all."""
    arguments: dict[str, Any] = {
        "model": endpoint.model,
        "messages": request.messages,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
    }
    if request.temperature > 0:
        arguments |= {"top_p": request.top_p, "seed": request.seed}
    if request.stop:
        arguments["stop"] = list(request.stop)
    if task.scored_texts:
        arguments |= {"logprobs": True, "top_logprobs": _TOP_LOGPROBS}
    if request.json_schema is not None:
        schema = {"name": "answer", "schema": json.loads(request.json_schema), "strict": True}
        arguments["response_format"] = {"type": "json_schema", "json_schema": schema}
    # vLLM's and others', not OpenAI's own.
    more = {
        "top_k": request.top_k,
        "min_p": request.min_p or None,
        "repetition_penalty": None if request.repetition_penalty == 1.0 else request.repetition_penalty,
    }
    if known := {name: value for name, value in more.items() if value is not None}:
        arguments["extra_body"] = known
    return arguments


def completion_of(answer: Any, scored_texts: Sequence[str] = ()) -> Completion:
    """An answer of chat completions. Raises Refused, EndpointError, and ValueError for an answer without any."""
    if not getattr(answer, "choices", None):
        raise ValueError(f"the answer has no choices: {printable(str(answer)[:300])}")
    choice = answer.choices[0]
    refusal = getattr(choice.message, "refusal", None)
    if refusal or choice.finish_reason == "content_filter":
        raise Refused(str(refusal or "finish_reason content_filter"))
    found: dict[int, float] = {}
    if scored_texts:
        content = getattr(choice.logprobs, "content", None)
        if not content:
            raise EndpointError(
                "the server gives no log-probabilities, which judge.method expected_score reads: set "
                "judge.method: sampled (with judge.structured: true where the server has response_format)"
            )
        places = {text: place for place, text in enumerate(scored_texts)}
        for one in content[0].top_logprobs:
            if one.token in places:
                found[places[one.token]] = float(one.logprob)
    usage = answer.usage
    return Completion(
        text=choice.message.content or "",
        prompt_tokens=usage.prompt_tokens if usage else 0,
        response_tokens=usage.completion_tokens if usage else 0,
        truncated=choice.finish_reason == "length",
        first_logprobs=found,
    )


def _reason(error: Exception) -> str:
    from openai import APIStatusError

    if isinstance(error, Refused):
        return "refused"
    taken = isinstance(error, APIStatusError) and error.status_code in (400, 404, 413, 422)
    return "bad_request" if taken else "inference_error"


def _words(error: Exception, key: SecretStr) -> str:
    """What the server said, on one line, without the key."""
    from openai import APIStatusError

    text = str(error)
    if isinstance(error, APIStatusError):
        text = f"status {error.status_code}: {error.response.text or error.message}"
    text = " ".join(f"{type(error).__name__}: {text}".split())
    hidden = key.get_secret_value()
    return printable((text.replace(hidden, "***") if hidden else text)[:500])


def _way_out(error: Exception, endpoint: Endpoint, request: Request) -> str:
    from openai import APIConnectionError, AuthenticationError, NotFoundError, PermissionDeniedError

    if isinstance(error, AuthenticationError | PermissionDeniedError):
        return f"Look at the key in the variable that api_key_env names ({endpoint.api_key_env or 'null'})"
    if isinstance(error, NotFoundError):
        return "Look at url, which should end where /chat/completions begins (often /v1), and at model"
    if isinstance(error, APIConnectionError):
        return f"Is the server there? timeout_s is {endpoint.timeout_s:g}"
    if request.json_schema is not None:
        return "If it does not take response_format, set judge.structured: false"
    return "Settings that it does not take (top_k, min_p, repetition_penalty, logprobs) have to be left out"
