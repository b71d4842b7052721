"""Asking a server, a double on loopback: what is sent, what comes back, and all the ways in which it does not."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from pydantic import SecretStr, ValidationError

from congrad_ray.config.endpoint import Endpoint
from congrad_ray.config.settings import SettingsError
from congrad_ray.runtime.endpoint import (
    Asker,
    EndpointError,
    Turns,
    arguments_of,
    check_endpoint,
    endpoint_key,
)
from congrad_ray.runtime.engines import Completion, Request, Row, Task
from congrad_ray.runtime.notices import Notify
from judge_server import KEY, Reply, chat, serving

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("tokens", pa.list_(pa.int32())),
        pa.field("truncated", pa.bool_()),
        pa.field("first", pa.string()),
    ]
)


def _task(scored_texts: tuple[str, ...] = (), **sampling: Any) -> Task:
    def request(row: Row) -> Request:
        if row["id"] == "unaskable":
            raise KeyError("no prompt")
        return Request([{"role": "user", "content": row["id"]}], 8, **sampling)

    def answer(row: Row, completion: Completion) -> Row:
        return {
            **row,
            "text": completion.text,
            "tokens": [completion.prompt_tokens, completion.response_tokens],
            "truncated": completion.truncated,
            "first": json.dumps(dict(completion.first_logprobs)),
        }

    return Task(request, answer, SCHEMA, 8, scored_texts=scored_texts)


def _ask(endpoint: Endpoint, ids: list[str], task: Task | None = None, key: str = KEY) -> dict[str, Row]:
    """What comes of rows with these ids; the double's actor in this process."""
    asker = Asker(endpoint, SecretStr(key), task or _task(), Notify())

    async def collect() -> list[Row]:
        return [row async for part in asker(pa.table({"id": ids})) for row in part.to_pylist()]

    rows = asyncio.run(collect())
    assert [row["id"] for row in rows] == ids
    return {row["id"]: row for row in rows}


def _asked(request: dict[str, Any]) -> str:
    return str(request["messages"][0]["content"])


def test_answers_their_tokens_and_what_was_sent() -> None:
    with serving(lambda request, before: Reply(body=chat(f"to {_asked(request)}"))) as server:
        endpoint = Endpoint(url=server.url, model="m", max_concurrency=3)
        rows = _ask(endpoint, [f"q{number}" for number in range(12)])
    assert {name: row["text"] for name, row in rows.items()} == {f"q{n}": f"to q{n}" for n in range(12)}
    assert all(row["failure"] is None and row["tokens"] == [7, 3] for row in rows.values())
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert server.most_at_once <= 3
    expected = {"model": "m", "max_tokens": 8, "temperature": 0.0}
    assert all({k: v for k, v in request.items() if k != "messages"} == expected for request in server.asked)


def test_a_request_holds_what_was_set_and_nothing_else() -> None:
    endpoint = Endpoint(url="http://localhost/v1", model="m")
    messages = [{"role": "user", "content": "?"}]
    schema = json.dumps({"type": "object"})
    request = Request(
        messages, 8, 0.5, 0.9, 3, top_k=5, min_p=0.1, repetition_penalty=1.2, stop=["###"], json_schema=schema
    )
    assert arguments_of(endpoint, _task(("0", "1")), request) == {
        "model": "m",
        "messages": messages,
        "max_tokens": 8,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["###"],
        "logprobs": True,
        "top_logprobs": 20,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
        },
        "extra_body": {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2},
    }


@pytest.mark.parametrize(
    "first",
    [
        Reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.01"}),
        Reply(500, {"error": {"message": "oh"}}, {"Retry-After": "0.01"}),
        Reply(503, b"<html>busy</html>", {"Retry-After": "0.01"}),
        Reply(200, chat("late"), after_s=1.0),
    ],
    ids=["429", "500", "503", "timeout"],
)
def test_what_is_refused_for_now_is_asked_again(first: Reply) -> None:
    def reply(request: dict[str, Any], before: int) -> Reply:
        return first if before == 0 and _asked(request) == "bad" else Reply(body=chat("fine"))

    with serving(reply) as server:
        endpoint = Endpoint(url=server.url, model="m", max_retries=1, timeout_s=0.3)
        rows = _ask(endpoint, ["good", "bad"])
    assert {row["text"] for row in rows.values()} == {"fine"}
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("answer", "reason", "words"),
    [
        (Reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.01"}), "inference_error", "slow down"),
        (Reply(500, {"error": {"message": f"oh {KEY}"}}, {"Retry-After": "0.01"}), "inference_error", "oh ***"),
        (Reply(401, {"error": {"message": f"wrong key {KEY}"}}), "inference_error", "wrong key ***"),
        (Reply(400, {"error": {"message": "maximum context length is 5"}}), "bad_request", "context length is 5"),
        (Reply(200, b"<html>hello</html>", {"Content-Type": "text/html"}), "inference_error", "hello"),
        (Reply(200, b"{not json"), "inference_error", ""),
        (Reply(200, {"choices": []}), "inference_error", "no choices"),
        (Reply(200, {"choices": [{}]}), "inference_error", ""),
        (Reply(200, chat(None, finish="content_filter")), "refused", "content_filter"),
        (Reply(200, chat(None, message={"refusal": "I won't"})), "refused", "I won't"),
        (Reply(200, chat("late"), after_s=0.6), "inference_error", "APITimeoutError"),
    ],
    ids=[
        "429",
        "500",
        "401",
        "400",
        "html",
        "no-json",
        "no-choices",
        "empty-choice",
        "filter",
        "refusal",
        "timeout",
    ],
)
def test_a_row_that_gets_no_answer_costs_no_other(answer: Reply, reason: str, words: str) -> None:
    def reply(request: dict[str, Any], before: int) -> Reply:
        return answer if _asked(request) == "bad" else Reply(body=chat("fine"))

    with serving(reply) as server:
        endpoint = Endpoint(url=server.url, model="m", max_retries=1, timeout_s=0.3)
        rows = _ask(endpoint, ["good", "bad", "better", "unaskable"])
    assert rows["good"]["text"] == rows["better"]["text"] == "fine"
    assert rows["bad"]["text"] is None
    assert rows["bad"]["failure"]["reason"] == reason
    assert words in rows["bad"]["failure"]["detail"] and KEY not in json.dumps(rows)
    assert "no prompt" in rows["unaskable"]["failure"]["detail"]
    tries = sum(_asked(request) == "bad" for request in server.asked)
    assert tries == (2 if (reason == "inference_error" and answer.status in (429, 500)) or answer.after_s else 1)


def test_a_server_that_is_not_there() -> None:
    endpoint = Endpoint(url="http://127.0.0.1:9/v1", model="m", max_retries=0)
    assert _ask(endpoint, ["q"])["q"]["failure"]["reason"] == "inference_error"
    with pytest.raises(EndpointError, match=r"(?s)127\.0\.0\.1:9.*Is the server there\?"):
        check_endpoint(endpoint, SecretStr(""), _task(), Request([{"role": "user", "content": "?"}], 1))


def _logprobs(**tokens: float) -> dict[str, Any]:
    top = [{"token": token, "logprob": value, "bytes": None} for token, value in tokens.items()]
    return {"content": [{"token": "x", "logprob": 0.0, "bytes": None, "top_logprobs": top}]}


def test_log_probabilities_of_the_first_token() -> None:
    body = chat("4", finish="length", logprobs=_logprobs(**{"4": math.log(0.5), " 4": math.log(0.2), "x": -1.0}))
    with serving(lambda request, before: Reply(body=body)) as server:
        endpoint = Endpoint(url=server.url, model="m")
        row = _ask(endpoint, ["q"], _task(("3", "4", " 4")))["q"]
        check_endpoint(endpoint, SecretStr(KEY), _task(("3",)), Request([{"role": "user", "content": "?"}], 1))
    assert json.loads(row["first"]) == {"1": pytest.approx(math.log(0.5)), "2": pytest.approx(math.log(0.2))}
    assert row["truncated"]
    with (
        serving(lambda request, before: Reply(body=chat("4"))) as server,
        pytest.raises(EndpointError, match=r"no log-probabilities.*judge\.method: sampled"),
    ):
        endpoint = Endpoint(url=server.url, model="m")
        check_endpoint(endpoint, SecretStr(KEY), _task(("3",)), Request([{"role": "user", "content": "?"}], 1))


@pytest.mark.parametrize(
    ("reply", "schema", "words"),
    [
        (Reply(401, {"error": {"message": f"bad {KEY}"}}), None, r"bad \*\*\*.*api_key_env names \(JUDGE_KEY\)"),
        (Reply(404, {"error": {"message": "no model m"}}), None, r"no model m.*Look at url"),
        (Reply(400, {"error": {"message": "response_format?"}}), "{}", r"judge\.structured: false"),
        (Reply(400, {"error": {"message": "top_k?"}}), None, r"top_k\?.*left out"),
    ],
)
def test_what_concerns_all_rows_is_known_before_any(reply: Reply, schema: str | None, words: str) -> None:
    with serving(lambda request, before: reply) as server, pytest.raises(EndpointError, match=words) as found:
        endpoint = Endpoint(url=server.url, model="m", max_retries=0, api_key_env="JUDGE_KEY")
        request = Request([{"role": "user", "content": "?"}], 1, json_schema=schema)
        check_endpoint(endpoint, SecretStr(KEY), _task(), request)
    assert KEY not in str(found.value)


def test_a_refusal_of_the_probe_is_an_answer() -> None:
    with serving(lambda request, before: Reply(body=chat(None, finish="content_filter"))) as server:
        endpoint = Endpoint(url=server.url, model="m")
        check_endpoint(endpoint, SecretStr(""), _task(), Request([{"role": "user", "content": "?"}], 1))


def test_tokens_that_the_server_does_not_tell_are_none_and_said(warned: Callable[[], list[str]]) -> None:
    with serving(lambda request, before: Reply(body=chat("fine", usage=False))) as server:
        row = _ask(Endpoint(url=server.url, model="m"), ["q"])["q"]
    assert row["tokens"] == [0, 0] and row["text"] == "fine"
    assert any("nothing of the tokens" in line for line in warned())


def test_turns_never_exceed_the_rate() -> None:
    turns = Turns(30)
    waits = [turns.after(now) for now in (0.0, 0.0, 0.5, 20.0, 20.0)]
    assert waits == [0.0, 2.0, 3.5, 0.0, 2.0]
    free = Turns(None)
    assert [free.after(0.0) for _ in range(3)] == [0.0, 0.0, 0.0]


def test_the_key_is_the_environments_and_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint(url="https://example.org/v1", model="m", api_key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    key = endpoint_key(endpoint)
    assert key.get_secret_value() == KEY
    assert KEY not in f"{key} {key!r} {endpoint!r} {endpoint.model_dump_json()}"
    for empty in ("", " "):
        monkeypatch.setenv("JUDGE_KEY", empty)
        with pytest.raises(SettingsError, match="no JUDGE_KEY, which api_key_env names"):
            endpoint_key(endpoint)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(SettingsError, match=r"https://example\.org/v1: the environment has no JUDGE_KEY"):
        endpoint_key(endpoint)
    assert endpoint_key(Endpoint(url="http://localhost/v1", model="m")).get_secret_value() == ""


@pytest.mark.parametrize(
    "url",
    [
        "api.openai.com/v1",
        "ftp://a/v1",
        "https://",
        "https://me:secret@a/v1",
        "https://a/v1?key=x",
        "http://a:b/v1",
    ],
)
def test_urls_that_cannot_be_or_would_show_a_key(url: str) -> None:
    with pytest.raises(ValidationError, match=r"URL|no user, password or query"):
        Endpoint(url=url, model="m")


def test_dollars_by_the_prices() -> None:
    endpoint = Endpoint(url="http://a/v1", model="m", input_price=2.5, output_price=10.0)
    assert endpoint.dollars(1_000_000, 500_000) == 7.5
    assert Endpoint(url="http://a/v1", model="m", output_price=4.0).dollars(9, 250_000) == 1.0
    assert Endpoint(url="http://a/v1", model="m").dollars(1, 1) is None
