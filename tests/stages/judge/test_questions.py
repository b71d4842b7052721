"""What judges are asked, and how their answers become rows; no engine and no server."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from congrad_ray.config.judging import OneJudge
from congrad_ray.data.tables import row_id, table_of
from congrad_ray.runtime.engines import Completion, Request
from congrad_ray.stages.judge.questions import Questions, judgement_schema, questions_for
from congrad_ray.stages.judge.schema import JUDGEMENT_SAMPLES
from congrad_ray.stages.judge.scores import read_score, score_texts

MESSAGES = [{"role": "user", "content": "Name a {river}."}]


def _responses(count: int, language: str = "de") -> list[dict[str, Any]]:
    return [
        {
            "response_id": f"r{sample}",
            "prompt_id": "p",
            "language": language,
            "prompt": MESSAGES,
            "sample": sample,
            "response": f"text {sample}",
        }
        for sample in range(count)
    ]


def _questions(first: bool = True, **settings: Any) -> Questions:
    judge = OneJudge.model_validate(settings)
    texts = score_texts() if judge.method == "expected_score" else ()
    return questions_for("the judge", judge, first, 7, "judge.max_length", score_texts=texts)


def test_ids_of_the_first_judge_are_those_of_a_judge_alone_and_others_have_their_own() -> None:
    first, other = _questions(samples=2), _questions(first=False, samples=2)
    rows = list(first.expand(_responses(2)))
    assert [row["judgement_id"] for row in rows] == [
        row_id("judgement", f"r{sample}", number) for sample in range(2) for number in range(2)
    ]
    others = {row["judgement_id"] for row in other.expand(_responses(2))}
    assert len(others) == 4 and not others & {row["judgement_id"] for row in rows}
    table_of(rows, first.schema)
    seeds = {first.task.request(row).seed for row in rows}
    assert len(seeds) == 4


def test_sampling_settings_reach_the_request() -> None:
    settings = {"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "stop": ["##"], "max_tokens": 9}
    asked = _questions(**settings)
    request = asked.task.request(next(iter(asked.expand(_responses(1)))))
    assert (request.temperature, request.top_p, request.max_tokens) == (0.7, 0.9, 9)
    assert (request.top_k, request.min_p, request.repetition_penalty, request.stop) == (4, 0.1, 1.1, ["##"])
    assert request.json_schema is None and "Punktzahl: <" in request.messages[0]["content"]
    assert "Name a {river}." in request.messages[0]["content"]


@pytest.mark.parametrize(("language", "words"), [("de", "JSON-Objekt"), ("th", "JSON object"), ("zh", "JSON")])
def test_structured_judgements(language: str, words: str) -> None:
    asked = _questions(structured=True, max_tokens=50)
    row = next(iter(asked.expand(_responses(1, language))))
    request = asked.task.request(row)
    text = request.messages[0]["content"]
    assert words in text and '"reasons"' in text and "Score: <" not in text and "Punktzahl: <" not in text
    assert request.json_schema is not None
    schema = json.loads(request.json_schema)
    assert list(schema["properties"]) == ["reasons", "score"] == schema["required"]
    assert schema["properties"]["score"]["enum"] == [0, 1, 2, 3, 4, 5]
    assert schema["properties"]["reasons"]["maxLength"] == 100
    written = json.dumps({"reasons": "Score: 1 would be harsh {really}", "score": 4})
    answer = asked.task.answer(row, Completion(written, 5, 6, False))
    assert (answer["score"], answer["unreadable"], answer["judge"]) == (4.0, None, "the judge")
    cut = asked.task.answer(row, Completion('{"reasons": "Score: 4', 5, 50, True))
    assert (cut["score"], cut["unreadable"]) == (None, "truncated")
    table_of([answer, cut], JUDGEMENT_SAMPLES)


def test_servers_need_not_know_a_bound_on_texts() -> None:
    endpoint = {"url": "http://localhost/v1", "model": "m"}
    schema = judgement_schema(OneJudge.model_validate({"endpoint": endpoint, "structured": True}))
    assert schema["properties"]["reasons"] == {"type": "string"} and schema["additionalProperties"] is False


def test_scores_of_a_servers_tokens() -> None:
    endpoint = {"url": "http://localhost/v1", "model": "m"}
    asked = _questions(endpoint=endpoint, method="expected_score")
    texts = list(asked.task.scored_texts)
    assert len(set(texts)) == len(texts) and {"0", " 5", "٣"} <= set(texts) and "6" not in texts
    row = next(iter(asked.expand(_responses(1))))
    assert asked.task.request(row) == Request(asked.task.request(row).messages, 1)
    found = {texts.index("4"): math.log(0.3), texts.index(" 4"): math.log(0.1), texts.index("1"): math.log(0.1)}
    answer = asked.task.answer(row, Completion("4", 5, 1, True, found))
    assert answer["score"] == pytest.approx((4 * 0.4 + 1 * 0.1) / 0.5)
    assert answer["mass"] == pytest.approx(0.5)
    nothing = asked.task.answer(row, Completion("Well", 5, 1, True, {}))
    assert (nothing["score"], nothing["unreadable"]) == (None, "low_mass")


def test_comparisons_go_both_ways() -> None:
    asked = _questions(method="pairwise", comparisons=2)
    rows = list(asked.expand(_responses(3)[::-1]))
    pairs = [(row["response_id"], row["compared_with"], row["order"]) for row in rows]
    orders = ("model_first", "baseline_first")
    assert pairs == [(*ids, order) for ids in (("r0", "r1"), ("r1", "r2")) for order in orders]
    assert len({row["judgement_id"] for row in rows}) == 4
    table_of(rows, asked.schema)
    texts = [asked.task.request(row).messages[0]["content"] for row in rows[:2]]
    assert [text.index("text 0") < text.index("text 1") for text in texts] == [True, False]
    for row, verdict, score in (
        (rows[0], "A", 5.0),
        (rows[1], "A", 0.0),
        (rows[1], "B", 5.0),
        (rows[0], "tie", 2.5),
    ):
        answer = asked.task.answer(row, Completion(f"Well.\nVerdict: {verdict}", 5, 6, False))
        assert (answer["score"], answer["unreadable"]) == (score, None)
    assert asked.task.answer(rows[0], Completion("Verdict: C", 5, 6, False))["unreadable"] == "no_verdict"
    assert asked.task.answer(rows[0], Completion("Verdict: A", 5, 6, True))["unreadable"] == "truncated"
    table_of([answer], JUDGEMENT_SAMPLES)


def test_a_structured_judgement_is_read_by_its_score_alone() -> None:
    assert read_score('{"reasons": "Punktzahl: 2, no: 3", "score": 5}', "de") == 5.0
    assert read_score('{"reasons": "fine", "score": 6}', "en") is None
