"""What a judge is asked about responses, and how its answers become rows of JUDGEMENT_SAMPLES."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from congrad_ray.config.judging import OneJudge, compared
from congrad_ray.data.tables import row_id
from congrad_ray.runtime.engines import Completion, Request, Task, sampling_seed
from congrad_ray.stages.generate.schema import RESPONSES
from congrad_ray.stages.judge.pairwise import ORDERS, fill_pairwise, pairwise_template, read_win
from congrad_ray.stages.judge.rubric import load_rubric
from congrad_ray.stages.judge.schema import JUDGEMENT_SAMPLES
from congrad_ray.stages.judge.scores import MAXIMUM, expected_score, read_score

Row = dict[str, Any]

_COLUMNS = ("response_id", "prompt_id", "language", "prompt", "response")


@dataclass(frozen=True)
class Questions:
    """All that one judge is asked. `expand` makes requests of rows of responses, of one or all of a prompt's.

    A request is a row of `schema`, its id first; `task` has what is asked and how the answer is read.
    """

    name: str
    judge: OneJudge
    schema: pa.Schema
    expand: Callable[[Sequence[Row]], Iterator[Row]]
    task: Task

    @property
    def together(self) -> bool:
        """Whether `expand` has to see all responses of a prompt at once."""
        return self.judge.method == "pairwise"


def questions_for(
    name: str,
    judge: OneJudge,
    first: bool,
    seed: int,
    length_setting: str,
    score_tokens: Sequence[Sequence[int]] = (),
    score_texts: Sequence[Sequence[str]] = (),
) -> Questions:
    """What the judge of this name is asked.

    `first`: the recipe's first judge, whose judgements have the ids that they had before there could be several.
    For 'expected_score' the spellings of every score from 0 as token ids of an engine's model, or as a server's
    texts. Raises RubricError.
    """
    if judge.method == "pairwise":
        return _comparisons(name, judge, first, length_setting)
    own = () if first else (name,)
    rubric = load_rubric(judge.rubric)
    texts = [text for spellings in score_texts for text in spellings]
    # A server's tokens go by the places of their texts.
    places = iter(range(len(texts)))
    spelt = score_tokens or [[next(places) for _ in spellings] for spellings in score_texts]
    schema_text = json.dumps(judgement_schema(judge)) if judge.structured else None

    def expand(responses: Sequence[Row]) -> Iterator[Row]:
        for response in responses:
            for sample in range(judge.judgements_of(1)):
                identifier = row_id("judgement", response["response_id"], sample, *own)
                columns = {column: response[column] for column in _COLUMNS}
                yield {"judgement_id": identifier, **columns, "judge": name}

    def request(row: Row) -> Request:
        text = rubric.fill(row["language"], judge.ending, row["prompt"], row["response"])
        messages = [{"role": "user", "content": text}]
        if judge.method == "expected_score":
            return Request(messages, max_tokens=1)
        return Request(
            messages,
            judge.max_tokens,
            judge.temperature,
            judge.top_p,
            sampling_seed(seed, row["judgement_id"]),
            top_k=judge.top_k,
            min_p=judge.min_p,
            repetition_penalty=judge.repetition_penalty,
            stop=judge.stop,
            json_schema=schema_text,
        )

    def answer(row: Row, completion: Completion) -> Row:
        mass = why = None
        if judge.method == "expected_score":
            score, mass = expected_score(completion.first_logprobs, spelt)
            if score is None or mass < judge.min_probability_mass:
                score, why = None, "low_mass"
        elif completion.truncated:  # the score was still to come, or another one
            score, why = None, "truncated"
        else:
            score = read_score(completion.text, row["language"])
            why = "no_score" if score is None else None
        return {**row, "compared_with": None} | _read(completion, score, mass, why)

    schema = pa.schema(
        [
            JUDGEMENT_SAMPLES.field("judgement_id"),
            *(RESPONSES.field(column) for column in _COLUMNS),
            JUDGEMENT_SAMPLES.field("judge"),
        ]
    )
    scored = [token for spellings in score_tokens for token in spellings]
    task = Task(request, answer, JUDGEMENT_SAMPLES, judge.writes, scored, length_setting, texts)
    return Questions(name, judge, schema, expand, task)


def judgement_schema(judge: OneJudge) -> dict[str, Any]:
    """The JSON schema of a structured judgement, reasons first.

    An engine here also bounds the reasons, at two characters a token: in most scripts the score has room left.
    Servers need not know such a bound.
    """
    reasons: dict[str, Any] = {"type": "string"}
    if judge.endpoint is None:
        reasons["maxLength"] = 2 * judge.max_tokens
    score = {"type": "integer", "enum": list(range(MAXIMUM + 1))}
    return {
        "type": "object",
        "properties": {"reasons": reasons, "score": score},
        "required": ["reasons", "score"],
        "additionalProperties": False,
    }


def _comparisons(name: str, judge: OneJudge, first: bool, length_setting: str) -> Questions:
    """Comparisons of a prompt's responses, each pair in both orders; see `config.judging.compared` for which."""
    own = () if first else (name,)
    template = pairwise_template()

    def expand(responses: Sequence[Row]) -> Iterator[Row]:
        ordered = sorted(responses, key=lambda row: (row["sample"], row["response_id"]))
        for one, two in compared(len(ordered), judge.comparisons):
            for order in ORDERS:
                ids = (ordered[one]["response_id"], ordered[two]["response_id"])
                yield {
                    "judgement_id": row_id("judgement", *ids, order, *own),
                    **{column: ordered[one][column] for column in _COLUMNS},
                    "compared_with": ids[1],
                    "other": ordered[two]["response"],
                    "order": order,
                    "judge": name,
                }

    def request(row: Row) -> Request:
        texts = [row["response"], row["other"]]
        ahead, behind = texts if row["order"] == "model_first" else reversed(texts)
        text = fill_pairwise(template, row["prompt"], ahead, behind)
        return Request(
            [{"role": "user", "content": text}],
            judge.max_tokens,
            repetition_penalty=judge.repetition_penalty,
            stop=judge.stop,
        )

    def answer(row: Row, completion: Completion) -> Row:
        # A verdict that is cut off may have been followed by another.
        win = None if completion.truncated else read_win(completion.text, row["order"])
        why = "truncated" if completion.truncated else "no_verdict" if win is None else None
        return row | _read(completion, None if win is None else MAXIMUM * win, None, why)

    schema = pa.schema(
        [
            JUDGEMENT_SAMPLES.field("judgement_id"),
            *(RESPONSES.field(column) for column in _COLUMNS),
            JUDGEMENT_SAMPLES.field("compared_with"),
            pa.field("other", pa.string()),
            pa.field("order", pa.string()),
            JUDGEMENT_SAMPLES.field("judge"),
        ]
    )
    task = Task(request, answer, JUDGEMENT_SAMPLES, judge.max_tokens, length_setting=length_setting)
    return Questions(name, judge, schema, expand, task)


def _read(completion: Completion, score: float | None, mass: float | None, why: str | None) -> Row:
    return {
        "score": score,
        "mass": mass,
        "output": completion.text,
        "unreadable": why,
        "prompt_tokens": completion.prompt_tokens,
        "output_tokens": completion.response_tokens,
    }
