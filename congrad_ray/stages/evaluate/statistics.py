"""Tables of an evaluation: answers by model and language, changes of the true score, win rates."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

Row = Mapping[str, Any]

EVERY_LANGUAGE = "*"
# Numbers that a bootstrap holds at once; how many does not change the draws.
_NUMBERS_AT_A_TIME = 2**20


@dataclass(frozen=True)
class AnswerSummary:
    """Answers of one model in one language: means over its answers; `true_score` in 0..1 where there is one."""

    model: str
    language: str
    seen: bool
    decoding: str
    count: int
    true_score: float | None
    mean_tokens: float
    truncated_share: float


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
    """Share of prompts won against the baseline, a tie counting half; None of too few prompts.

    `prompts`: those with a verdict that could be read. `asked`: comparisons, of which `readable` have a verdict
    and the others are counted in `unreadable` by reason. `consistent`: share of prompts with the same verdict in
    both orders.
    """

    language: str
    seen: bool
    prompts: int
    asked: int
    readable: int
    unreadable: dict[str, int]
    win_rate: float | None
    low: float | None
    high: float | None
    consistent: float | None


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, confidence: float = 0.95, resamples: int = 1000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979). Raises ValueError where there is no value."""
    if not values:
        raise ValueError("a bootstrap interval needs at least one value")
    if len(values) == 1:  # which scipy refuses
        return float(values[0]), float(values[0])
    from scipy.stats import bootstrap

    interval = bootstrap(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _NUMBERS_AT_A_TIME // len(values)),
        confidence_level=confidence,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return float(interval.low), float(interval.high)


def summarise_answers(answers: Sequence[Row]) -> list[AnswerSummary]:
    """ANSWERS by model, decoding, language and whether it is trained on."""
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


def win_rates(comparisons: Sequence[Row], seed: int = 0, min_prompts: int = 1) -> list[WinRate]:
    """COMPARISONS of one model with one baseline, by language and over all (language '*').

    A prompt's win is the mean over the orders that could be read; the rate is the mean over prompts with a win,
    its interval a bootstrap over prompts. There is none where fewer than `min_prompts` have one.
    """
    prompts = []
    for _, rows in _grouped(comparisons, lambda row: (row["prompt_id"],)):
        wins = [row["win"] for row in rows if row["win"] is not None]
        prompts.append(
            {
                **rows[0],
                "win": fmean(wins) if wins else None,
                "asked": len(rows),
                "readable": len(wins),
                "reasons": [row["unreadable"] for row in rows if row["win"] is None],
                "consistent": float(len(set(wins)) == 1) if len(wins) > 1 else None,
            }
        )
    rates = []
    for (_, unseen, language), group in _by_language_and_all(prompts, lambda row: ""):
        wins = [row["win"] for row in group if row["win"] is not None]
        consistent = [row["consistent"] for row in group if row["consistent"] is not None]
        enough = len(wins) >= max(1, min_prompts)
        low, high = bootstrap_interval(wins, seed) if enough else (None, None)
        reasons = Counter(reason for row in group for reason in row["reasons"])
        rates.append(
            WinRate(
                language,
                not unseen,
                len(wins),
                sum(row["asked"] for row in group),
                sum(row["readable"] for row in group),
                dict(reasons.most_common()),
                fmean(wins) if enough else None,
                low,
                high,
                fmean(consistent) if consistent else None,
            )
        )
    return rates


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
