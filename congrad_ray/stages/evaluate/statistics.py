"""Tables of an evaluation: answers by model and language, changes of the true score, win rates."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from congrad_ray.stages.evaluate.bootstrap import bootstrap_interval
from congrad_ray.stages.evaluate.length_control import (
    in_deviations,
    length_controlled_interval,
    length_controlled_rate,
)

Row = Mapping[str, Any]

EVERY_LANGUAGE = "*"


@dataclass(frozen=True)
class AnswerSummary:
    """Answers of one model in one language: means over its answers; `true_score` in 0..1 where there is one.

    `wrong_language_share`: those surely in another language than their prompt. `repeated_share`: those of whose
    4-grams more than half are there before.
    """

    model: str
    language: str
    seen: bool
    decoding: str
    count: int
    true_score: float | None
    mean_tokens: float
    truncated_share: float
    wrong_language_share: float
    repeated_share: float


@dataclass(frozen=True)
class ScoreChange:
    """True scores of the same prompts before and after; the interval is that of the mean change."""

    language: str
    seen: bool
    decoding: str
    count: int
    before: float
    after: float
    change: float
    low: float
    high: float


@dataclass(frozen=True)
class WinRate:
    """Share of prompts won against a baseline, a tie counting half; None of too few prompts.

    `prompts`: those with a verdict that could be read. `asked`: comparisons, of which `readable` have a verdict,
    `ties` of them that neither is better, and the others are counted in `unreadable` by reason. `lc_*`: the
    length-controlled rate (`length_control`). `consistent`: share of prompts with the same verdict in both orders.
    """

    baseline: str
    language: str
    seen: bool
    prompts: int
    asked: int
    readable: int
    unreadable: dict[str, int]
    ties: int
    win_rate: float | None
    low: float | None
    high: float | None
    lc_win_rate: float | None
    lc_low: float | None
    lc_high: float | None
    consistent: float | None


def summarise_answers(answers: Sequence[Row]) -> list[AnswerSummary]:
    """ANSWERS with `wrong_language` and `repeated`, by model, decoding, language and whether it is trained on."""
    groups = _grouped(answers, lambda row: (row["model"], row["decoding"], not row["seen"], row["language"]))
    summaries = []
    for (model, decoding, unseen, language), rows in groups:
        scores = [row["true_score"] for row in rows if row["true_score"] is not None]
        summaries.append(
            AnswerSummary(
                model,
                language,
                not unseen,
                decoding,
                len(rows),
                fmean(scores) if scores else None,
                fmean(row["response_tokens"] for row in rows),
                fmean(row["truncated"] for row in rows),
                fmean(row["wrong_language"] for row in rows),
                fmean(row["repeated"] for row in rows),
            )
        )
    return summaries


def score_changes(answers: Sequence[Row], before: str, after: str, seed: int = 0) -> list[ScoreChange]:
    """True scores of model `before` and model `after` on the prompts that both answered with a score.

    By language, and over all languages trained on and all others under the language '*' (the mean over prompts).
    """
    scores: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    rows: dict[tuple[str, str], Row] = {}
    for row in answers:
        if row["true_score"] is not None and row["model"] in (before, after):
            key = (row["prompt_id"], row["decoding"])
            scores[key][row["model"]] = row["true_score"]
            rows[key] = row
    both = [
        {**rows[key], "before": found[before], "after": found[after]}
        for key, found in scores.items()
        if before in found and after in found
    ]
    changes = []
    for (decoding, unseen, language), group in _by_language_and_all(both, lambda row: str(row["decoding"])):
        differences = [row["after"] - row["before"] for row in group]
        low, high = bootstrap_interval(differences, seed)
        changes.append(
            ScoreChange(
                language,
                not unseen,
                decoding,
                len(group),
                fmean(row["before"] for row in group),
                fmean(row["after"] for row in group),
                fmean(differences),
                low,
                high,
            )
        )
    return changes


def win_rates(
    comparisons: Sequence[Row],
    lengths: Mapping[tuple[str, str], int],
    seed: int = 0,
    min_prompts: int = 1,
) -> list[WinRate]:
    """COMPARISONS of one model by baseline, for each by language and over all (language '*').

    `lengths`: characters of every answer by its model and prompt id. A prompt's win is the mean over the orders
    that could be read; the rate is the mean over prompts with a win, its interval a bootstrap over prompts. There
    is none where fewer than `min_prompts` have one. Lengths differ by language, so the differences are divided by
    the standard deviation of their language's own.
    """
    prompts: list[dict[str, Any]] = []
    for _, rows in _grouped(comparisons, lambda row: (row["baseline"], row["prompt_id"])):
        wins = [row["win"] for row in rows if row["win"] is not None]
        first = rows[0]
        of_model, of_baseline = (lengths[first[who], first["prompt_id"]] for who in ("model", "baseline"))
        prompts.append(
            {
                **first,
                "win": fmean(wins) if wins else None,
                "asked": len(rows),
                "readable": len(wins),
                "ties": wins.count(0.5),
                "reasons": [row["unreadable"] for row in rows if row["win"] is None],
                "consistent": float(len(set(wins)) == 1) if len(wins) > 1 else None,
                "longer": of_model - of_baseline,
            }
        )
    for kind in {(row["baseline"], row["seen"], row["language"]) for row in prompts}:
        read = [
            row
            for row in prompts
            if (row["baseline"], row["seen"], row["language"]) == kind and row["win"] is not None
        ]
        for row, deviation in zip(read, in_deviations([row["longer"] for row in read]), strict=True):
            row["longer"] = deviation
    return [
        _win_rate(baseline, language, not unseen, group, seed, max(1, min_prompts))
        for (baseline, unseen, language), group in _by_language_and_all(prompts, lambda row: row["baseline"])
    ]


def _win_rate(
    baseline: str, language: str, seen: bool, prompts: Sequence[Row], seed: int, min_prompts: int
) -> WinRate:
    read = [row for row in prompts if row["win"] is not None]
    wins, longer = [row["win"] for row in read], [row["longer"] for row in read]
    consistent = [row["consistent"] for row in prompts if row["consistent"] is not None]
    enough = len(wins) >= min_prompts
    low, high = bootstrap_interval(wins, seed) if enough else (None, None)
    lc_low, lc_high = length_controlled_interval(wins, longer, seed) if enough else (None, None)
    return WinRate(
        baseline=baseline,
        language=language,
        seen=seen,
        prompts=len(wins),
        asked=sum(row["asked"] for row in prompts),
        readable=sum(row["readable"] for row in prompts),
        unreadable=dict(Counter(reason for row in prompts for reason in row["reasons"]).most_common()),
        ties=sum(row["ties"] for row in prompts),
        win_rate=fmean(wins) if enough else None,
        low=low,
        high=high,
        lc_win_rate=length_controlled_rate(wins, longer) if enough else None,
        lc_low=lc_low,
        lc_high=lc_high,
        consistent=fmean(consistent) if consistent else None,
    )


def _grouped(
    rows: Sequence[Row], key: Callable[[Row], tuple[Any, ...]]
) -> list[tuple[tuple[Any, ...], list[Row]]]:
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return sorted(groups.items())


def _by_language_and_all(
    rows: Sequence[Row], kind: Callable[[Row], str]
) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Groups by (kind, unseen, language), those over all languages under EVERY_LANGUAGE first."""
    everything = _grouped(rows, lambda row: (kind(row), not row["seen"], EVERY_LANGUAGE))
    return everything + _grouped(rows, lambda row: (kind(row), not row["seen"], row["language"]))
