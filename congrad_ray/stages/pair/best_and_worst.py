"""From judged responses to preference pairs: best against worst, by stated rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class JudgedResponse:
    """A response with all that the pairing rules look at."""

    response_id: str
    sample: int
    text: str
    score: float | None
    truncated: bool
    wrong_language: bool


@dataclass(frozen=True)
class BestAndWorst:
    """The pair made of a prompt's responses."""

    chosen: JudgedResponse
    rejected: JudgedResponse


# Why a prompt gave no pair, in the order in which they are looked at; judges_disagree: see judge.disagreement.
NoPair = Literal["judges_disagree", "too_few_judged", "all_identical", "none_may_be_chosen", "tie_or_small_margin"]


def best_and_worst(
    responses: Sequence[JudgedResponse],
    min_margin: float,
    truncated: Literal["drop", "reject_only", "keep"],
    wrong_language: Literal["drop", "reject_only"],
) -> BestAndWorst | NoPair:
    """The best-scored response that may be chosen against the worst-scored one, or why there is no pair.

    1. Responses without a finite score, and empty ones, do not take part.
    2. Truncated and wrong-language responses do not take part ('drop'), or may be rejected but never chosen
       ('reject_only'), or take part freely ('keep').
    3. Of responses with the same text the one with the lowest sample number stays.
    4. Equal scores are ordered by sample number, so the outcome does not depend on the order of the input.
    5. The scores must differ by more than `min_margin`.
    """
    usable = [r for r in responses if r.score is not None and math.isfinite(r.score) and r.text.strip()]
    usable = [r for r in usable if not (r.truncated and truncated == "drop")]
    usable = [r for r in usable if not (r.wrong_language and wrong_language == "drop")]
    if len(usable) < 2:
        return "too_few_judged"
    by_text: dict[str, JudgedResponse] = {}
    for response in sorted(usable, key=lambda r: r.sample):
        by_text.setdefault(response.text.strip(), response)
    distinct = list(by_text.values())
    if len(distinct) < 2:
        return "all_identical"
    may_be_chosen = [
        r for r in distinct if not r.wrong_language and not (r.truncated and truncated == "reject_only")
    ]
    if not may_be_chosen:
        return "none_may_be_chosen"
    chosen = max(may_be_chosen, key=lambda r: (_score(r), -r.sample))
    rejected = min((r for r in distinct if r is not chosen), key=lambda r: (_score(r), r.sample))
    if _score(chosen) - _score(rejected) <= min_margin:
        return "tie_or_small_margin"
    return BestAndWorst(chosen, rejected)


def _score(response: JudgedResponse) -> float:
    assert response.score is not None
    return response.score
