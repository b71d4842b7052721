"""Pairs of some prompts' responses: each with its score, prompt by prompt, in the order of the prompts' ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from congrad_ray.config.recipe import Pair
from congrad_ray.data.tables import pair_id, table_of
from congrad_ray.rundir.ids import keys_of
from congrad_ray.stages.pair.best_and_worst import BestAndWorst, JudgedResponse, NoPair, best_and_worst
from congrad_ray.stages.pair.schema import PAIRS

if TYPE_CHECKING:
    from congrad_ray.stages.pair.language_check import LanguageCheck

RESPONSE_COLUMNS = ["response_id", "prompt_id", "language", "prompt", "sample", "response", "truncated"]
_ROWS_AT_A_TIME = 4096


@dataclass
class Counts:
    """What became of prompts and responses; those of several tables add up."""

    responses: int = 0
    prompts: int = 0
    pairs: Counter[str] = field(default_factory=Counter)
    """By language."""
    no_pair: Counter[str] = field(default_factory=Counter)
    """Prompts by reason and language."""
    wrong_language: Counter[str] = field(default_factory=Counter)
    """Responses by language."""
    unknown_language: Counter[str] = field(default_factory=Counter)
    """Responses of which the language check cannot say, by language."""

    @classmethod
    def from_json(cls, text: bytes) -> Counts:
        values: dict[str, Any] = json.loads(text)
        for name, value in values.items():
            values[name] = Counter(value) if isinstance(value, dict) else value
        return cls(**values)

    def to_json(self) -> bytes:
        return json.dumps(vars(self)).encode()

    def add(self, other: Counts) -> None:
        self.responses += other.responses
        self.prompts += other.prompts
        self.pairs.update(other.pairs)
        self.no_pair.update(other.no_pair)
        self.wrong_language.update(other.wrong_language)
        self.unknown_language.update(other.unknown_language)


def pair_responses(
    responses: pa.Table,
    scores: pa.Table,
    settings: Pair,
    languages: Sequence[str],
    iteration: int,
    progressed: Callable[[], None] = lambda: None,
    left_out: Collection[str] = (),
) -> tuple[pa.Table, Counts]:
    """The pairs (PAIRS) of all prompts that have responses here, and what became of the others.

    `responses` has RESPONSE_COLUMNS, all responses of each of its prompts, in any order; `scores` has response_id
    and score, and a response that it lacks has no score. `languages` are those of the run,
    for the language check; no pairs are made of the languages `left_out`.
    """
    counts = Counts(responses=len(responses))
    pairs, found = [], []
    rows = _judged(responses, scores, settings, languages)
    for identifier, group in groupby(rows, key=lambda row: row["prompt_id"]):
        of_prompt = list(group)
        first = of_prompt[0]
        counts.prompts += 1
        for row in of_prompt:
            if row["verdict"] in ("wrong", "unknown"):
                said = counts.wrong_language if row["verdict"] == "wrong" else counts.unknown_language
                said[row["language"]] += 1
        pair: BestAndWorst | NoPair = "judges_disagree"
        if first["language"] not in left_out:
            pair = _best_and_worst(of_prompt, settings)
        if isinstance(pair, BestAndWorst):
            found.append(_row(pair, first, identifier, iteration))
            counts.pairs[first["language"]] += 1
        else:
            counts.no_pair[f"{pair} {first['language']}"] += 1
        if len(found) == _ROWS_AT_A_TIME:
            pairs.append(table_of(found, PAIRS))
            found = []
            progressed()
    return pa.concat_tables([*pairs, table_of(found, PAIRS)]), counts


def _judged(
    responses: pa.Table, scores: pa.Table, settings: Pair, languages: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Every response with its score and what the language check says of it, in the order of the prompts' ids."""
    check = None
    if settings.language_check:
        check = _language_check(tuple(languages), settings.language_confidence, settings.language_min_characters)
    score_of = _look_up(scores)
    order = pc.sort_indices(responses["prompt_id"])
    responses = responses.combine_chunks()  # taking rows from many chunks would copy all of them each time
    for start in range(0, len(order), _ROWS_AT_A_TIME):
        part = responses.take(order[start : start + _ROWS_AT_A_TIME])
        verdicts: Sequence[str | None] = [None] * len(part)
        if check:
            verdicts = check.verdicts(part["response"].to_pylist(), part["language"].to_pylist())
        found = score_of(part["response_id"])
        for row, score, verdict in zip(part.to_pylist(), found, verdicts, strict=True):
            yield {**row, "score": score, "verdict": verdict}


@cache
def _language_check(languages: tuple[str, ...], confidence: float, min_characters: int) -> LanguageCheck:
    """Once in a process: its tables take a while to load."""
    from congrad_ray.stages.pair.language_check import LanguageCheck

    return LanguageCheck(languages, confidence, min_characters)


def _look_up(scores: pa.Table) -> Callable[[pa.ChunkedArray], list[float | None]]:
    """Looks up the scores of response ids; None where there is none. Arrays take a fifth of a dictionary."""
    ids = keys_of(scores["response_id"])
    values: NDArray[Any] = scores["score"].to_numpy()  # NaN for null, which takes no part either
    order = np.argsort(ids)
    ids, values = ids[order], values[order]

    def look_up(wanted: pa.ChunkedArray) -> list[float | None]:
        asked = keys_of(wanted)
        places = np.minimum(np.searchsorted(ids, asked), len(ids) - 1)
        known = ids[places] == asked if len(ids) else np.zeros(len(asked), np.bool_)
        return [
            float(values[place]) if there else None for place, there in zip(places, known.tolist(), strict=True)
        ]

    return look_up


def _best_and_worst(group: Sequence[dict[str, Any]], settings: Pair) -> BestAndWorst | NoPair:
    return best_and_worst(
        [
            JudgedResponse(
                response_id=row["response_id"],
                sample=row["sample"],
                text=row["response"],
                score=row["score"],
                truncated=row["truncated"],
                wrong_language=row["verdict"] == "wrong",
            )
            for row in group
        ],
        settings.min_margin,
        settings.truncated,
        settings.wrong_language,
    )


def _row(pair: BestAndWorst, row: dict[str, Any], prompt_id: str, iteration: int) -> dict[str, Any]:
    return {
        "pair_id": pair_id(prompt_id, iteration),
        "prompt_id": prompt_id,
        "language": row["language"],
        "prompt": row["prompt"],
        "chosen": [{"role": "assistant", "content": pair.chosen.text}],
        "rejected": [{"role": "assistant", "content": pair.rejected.text}],
        "chosen_score": pair.chosen.score,
        "rejected_score": pair.rejected.score,
        "chosen_response_id": pair.chosen.response_id,
        "rejected_response_id": pair.rejected.response_id,
    }
