"""What the study's results say: means over seeds, paired differences with Student intervals, and their tables.

A seed is the unit: prompts of one seed share a model, so only seeds count as independent repetitions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from scipy.special import stdtrit

from study.protocol import EVERYTHING, ORACLE, START
from study.results import Row

RANDOM = "random"
CONFIDENCE = 0.95
MEASURES = ("seen", "unseen", "held_out", "held_out_unseen", "tokens")
NOTHING = "–"  # in tables, where there is no number

_DIAGNOSTICS = (
    *("pairs", "kept", "better_kept", "better_all", "auc", "auc_biased", "auc_healthy", "conflicting_pairs"),
    *("cosine_before", "cosine_after", "negative_before", "negative_after"),
)
_KEY = {"seed": int, "variant": str, "strategy": str, "keep": (int, float)}
_TRAINING = {"learning_rate": (int, float), "iterations": int}
KEYS: dict[str, dict[str, Any]] = {"cell": {**_KEY, **_TRAINING}, "selection": _KEY, "exact": _KEY}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds with its two-sided 95 % Student interval; no bounds with fewer than two seeds."""

    seeds: int
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """Mean over seeds of `measure` of the strategy's model minus that of the baseline's model of the same seed.

    Scores lie in 0..1, `tokens` are tokens of a response. `wins`: seeds with a difference above 0.
    """

    variant: str
    strategy: str
    keep: float
    learning_rate: float
    iterations: int
    baseline: str
    measure: str
    wins: int


@dataclass(frozen=True, kw_only=True)
class Summary(Estimate):
    """One measure of one kind of cell over its seeds; starting models have variant '' and strategy 'start'."""

    variant: str
    strategy: str
    keep: float
    learning_rate: float
    iterations: int
    measure: str


@dataclass(frozen=True, kw_only=True)
class SelectionSummary:
    """What a selection is like before anything is trained: means over seeds, None where undefined in every seed.

    `better_*`: share of pairs whose chosen answer is truly better, among the kept and all; `auc`: the probability
    that such a pair has a higher score than one that is truly worse, over all pairs, over languages with a biased
    judge, and over the others; `conflicting_pairs`: share with a negative cosine with the direction; `cosine_*`
    and `negative_*`: mean cosine between languages' gradients and share of negative ones, around the surgery.
    """

    variant: str
    strategy: str
    keep: float
    seeds: int
    pairs: float | None
    kept: float | None
    better_kept: Estimate | None
    better_all: float | None
    auc: Estimate | None
    auc_biased: float | None
    auc_healthy: float | None
    conflicting_pairs: float | None
    cosine_before: float | None
    cosine_after: float | None
    negative_before: float | None
    negative_after: float | None


@dataclass(frozen=True)
class Group:
    """Cells that may be compared with each other."""

    variant: str
    learning_rate: float
    iterations: int

    @property
    def title(self) -> str:
        """'inverted, learning rate 1e-4', and the iterations where there are several."""
        several = f", {self.iterations} iterations" if self.iterations > 1 else ""
        return f"{self.variant}, learning rate {rate_text(self.learning_rate)}{several}"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A strategy at a keep ratio within a group; `kept` pairs and optimiser `steps` are means over seeds.

    `scores` by measure, `differences` by (baseline, measure); a missing key means there was nothing to compare.
    """

    strategy: str
    keep: float
    seeds: int
    kept: float
    steps: float
    selection: SelectionSummary | None
    scores: dict[str, Summary]
    differences: dict[tuple[str, str], Difference]


def without_seeds(rows: Iterable[Row], seeds: Iterable[int]) -> list[Row]:
    """The rows of other seeds: leaves out those that hyperparameters were chosen on."""
    left_out = set(seeds)
    return [row for row in rows if row["seed"] not in left_out]


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student interval of the seeds' values, (seeds,). Raises ValueError where there is none."""
    if not values:
        raise ValueError("an estimate needs at least one seed")
    array = np.asarray(values, dtype=np.float64)
    mean, count = float(array.mean()), len(array)
    if count < 2:
        return Estimate(seeds=count, mean=mean, low=None, high=None)
    margin = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2) * array.std(ddof=1) / math.sqrt(count))
    return Estimate(seeds=count, mean=mean, low=mean - margin, high=mean + margin)


def differences(rows: Sequence[Row], baseline: str, measure: str) -> list[Difference]:
    """Every other strategy's cells against the baseline's cells of the same seed, variant and training.

    The keep ratio has to be the same as well, but not for `all`, which keeps everything, nor for `start`, which is
    matched by the seed alone. Seeds without either cell, or without the measure, are left out; nothing is compared
    with itself. Raises ValueError for an unknown measure.
    """
    _check(measure)
    cells = _cells(rows)
    against = {
        _match(row, baseline): row[measure]
        for row in cells
        if row["strategy"] == baseline and row.get(measure) is not None
    }
    found: dict[tuple[Any, ...], dict[int, float]] = defaultdict(dict)
    for row in cells:
        other = against.get(_match(row, baseline))
        if row["strategy"] == baseline or row.get(measure) is None or other is None:
            continue
        found[_kind(row)][row["seed"]] = row[measure] - other
    return [
        Difference(
            **_kind_fields(kind),
            baseline=baseline,
            measure=measure,
            wins=sum(value > 0 for value in by_seed.values()),
            **vars(estimate(list(by_seed.values()))),
        )
        for kind, by_seed in _ordered(found, rows)
    ]


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """Every measure of every kind of cell over its seeds; none where a measure is nowhere."""
    found: dict[tuple[Any, ...], dict[int, Row]] = defaultdict(dict)
    for row in _cells(rows):
        found[_kind(row)][row["seed"]] = row
    result = []
    for kind, by_seed in _ordered(found, rows):
        for measure in MEASURES:
            values = _values(by_seed.values(), measure)
            if values:
                result.append(Summary(**_kind_fields(kind), measure=measure, **vars(estimate(values))))
    return result


def selection_summaries(rows: Sequence[Row]) -> list[SelectionSummary]:
    """The diagnostics of every variant, strategy and keep ratio over the seeds."""
    found: dict[tuple[Any, ...], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row["kind"] == "selection":
            found[row["variant"], row["strategy"], row["keep"]][row["seed"]] = row
    result = []
    for (variant, strategy, keep), by_seed in _ordered(found, rows):
        values = {name: _values(by_seed.values(), name) for name in _DIAGNOSTICS}
        numbers: dict[str, Any] = {name: fmean(some) if some else None for name, some in values.items()}
        for name in ("better_kept", "auc"):
            numbers[name] = estimate(values[name]) if values[name] else None
        result.append(
            SelectionSummary(variant=variant, strategy=strategy, keep=keep, seeds=len(by_seed), **numbers)
        )
    return result


def groups(rows: Sequence[Row]) -> list[Group]:
    """The groups that have cells, in the order in which their variants first appear."""
    found = {_kind(row): None for row in _cells(rows) if row["strategy"] != START}
    kinds = [kind for kind, _ in _ordered(found, rows)]
    return list(dict.fromkeys(Group(variant, rate, iterations) for variant, rate, iterations, _, _ in kinds))


def table(rows: Sequence[Row], group: Group) -> list[Line]:
    """The group's strategies against `all`, `random` and `start`; first the starting models of the same seeds."""
    trained = [
        row
        for row in _cells(rows)
        if row["strategy"] != START
        and (row["variant"], row["learning_rate"], row["iterations"])
        == (group.variant, group.learning_rate, group.iterations)
    ]
    seeds = {row["seed"] for row in trained}
    cells = trained + [row for row in _cells(rows) if row["strategy"] == START and row["seed"] in seeds]
    selections = {(s.strategy, s.keep): s for s in selection_summaries(rows) if s.variant == group.variant}
    scores: dict[tuple[str, float], dict[str, Summary]] = defaultdict(dict)
    for summary in summaries(cells):
        scores[summary.strategy, summary.keep][summary.measure] = summary
    compared: dict[tuple[str, float], dict[tuple[str, str], Difference]] = defaultdict(dict)
    for baseline in (EVERYTHING, RANDOM, START):
        for measure in MEASURES:
            for difference in differences(cells, baseline, measure):
                compared[difference.strategy, difference.keep][baseline, measure] = difference
    by_line: dict[tuple[str, float], dict[int, Row]] = defaultdict(dict)
    for row in cells:
        by_line[row["strategy"], row["keep"]][row["seed"]] = row
    return [
        Line(
            strategy=strategy,
            keep=keep,
            seeds=len(by_seed),
            kept=fmean(row["kept"] for row in by_seed.values()),
            steps=fmean(row["steps"] for row in by_seed.values()),
            selection=selections.get((strategy, keep)) if strategy != START else None,
            scores=scores[strategy, keep],
            differences=compared[strategy, keep],
        )
        for (strategy, keep), by_seed in sorted(by_line.items(), key=lambda item: (_rank(item[0][0]), item[0][1]))
    ]


def markdown_table(
    rows: Sequence[Row], variants: Collection[str] | None = None, learning_rates: Collection[float] | None = None
) -> str:
    """The tables in Markdown: one for each group, or for those of these variants and learning rates."""
    chosen = [
        group
        for group in groups(rows)
        if (variants is None or group.variant in variants)
        and (learning_rates is None or group.learning_rate in learning_rates)
    ]
    return "\n\n".join(f"{_cell(group.title)}:\n\n{_markdown(rows, group)}" for group in chosen)


def signed_text(value: float, digits: int = 3) -> str:
    """'+0.012', '−0.012' with a minus sign, and '0.000' without any."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if text.strip("+-0.") else text[1:]


def difference_text(difference: Estimate | None, seeds: int | None = None) -> str:
    """'+0.012 (+0.004..+0.020)'; with the number of seeds if it is not `seeds`."""
    if difference is None:
        return NOTHING
    within = []
    if difference.low is not None and difference.high is not None:
        within.append(f"{signed_text(difference.low)}..{signed_text(difference.high)}")
    if not within or (seeds is not None and difference.seeds != seeds):
        within.append(seeds_text(difference.seeds))
    return f"{signed_text(difference.mean)} ({'; '.join(within)})"


def seeds_text(count: int) -> str:
    """'1 seed', '10 seeds'."""
    return f"{count} seed" if count == 1 else f"{count} seeds"


def rate_text(rate: float) -> str:
    """A learning rate as one writes it: 1e-4, 2.5e-5."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def percent_text(share: float | None, digits: int = 1) -> str:
    """'71.0 %'."""
    return NOTHING if share is None else f"{100 * share:.{digits}f} %"


def keep_text(keep: float) -> str:
    """'50 %', '12.5 %'."""
    return f"{100 * keep:g} %"


def number_text(value: float | None, digits: int = 3) -> str:
    """'0.830', with a minus sign where there is one."""
    return NOTHING if value is None else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _markdown(rows: Sequence[Row], group: Group) -> str:
    head = ["strategy", "kept", "seeds", "AUC", "better among kept", "score", "to `all`", "to `random`"]
    head += ["unseen languages, to `all`", "held-out tasks, to `all`", "tokens"]
    lines = [f"| {' | '.join(head)} |", "|---|--:|--:|" + "---|" * (len(head) - 3)]
    for line in table(rows, group):
        chosen, start = line.selection, line.strategy == START
        seen, tokens = line.scores.get("seen"), line.scores.get("tokens")
        cells = [
            _cell(line.strategy),
            NOTHING if start else keep_text(line.keep),
            str(line.seeds),
            number_text(chosen.auc.mean if chosen and chosen.auc else None),
            percent_text(chosen.better_kept.mean if chosen and chosen.better_kept else None),
            number_text(seen.mean if seen else None),
        ]
        for baseline, measure in (
            (EVERYTHING, "seen"),
            (RANDOM, "seen"),
            (EVERYTHING, "unseen"),
            (EVERYTHING, "held_out"),
        ):
            cells.append(difference_text(line.differences.get((baseline, measure)), line.seeds))
        cells.append(number_text(tokens.mean if tokens else None, 1))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Names come from a YAML file: a bar would end the cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def _check(measure: str) -> None:
    if measure not in MEASURES:
        raise ValueError(f"no such measure: {measure}; known are {', '.join(MEASURES)}")


def _cells(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "cell"]


def _values(rows: Iterable[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def _kind(row: Row) -> tuple[str, float, int, str, float]:
    return row["variant"], row["learning_rate"], row["iterations"], row["strategy"], row["keep"]


def _kind_fields(kind: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("variant", "learning_rate", "iterations", "strategy", "keep"), kind, strict=True))


def _match(row: Row, baseline: str) -> tuple[Any, ...]:
    """What a cell and its baseline have in common."""
    if baseline == START:
        return (row["seed"],)
    same = (row["seed"], row["variant"], row["learning_rate"], row["iterations"])
    return same if baseline == EVERYTHING else (*same, row["keep"])


def _rank(strategy: str) -> tuple[int, str]:
    """Baselines first, the oracles, which nobody has, last."""
    places = {START: 0, EVERYTHING: 1, RANDOM: 2, "congrad": 3}
    return 5 if strategy.startswith(ORACLE) else places.get(strategy, 4), strategy


def _ordered(found: Mapping[tuple[Any, ...], Any], rows: Sequence[Row]) -> list[tuple[tuple[Any, ...], Any]]:
    """Items by variant in order of appearance, learning rate, iterations, strategy, keep ratio."""
    variants = {variant: place for place, variant in enumerate(dict.fromkeys(row["variant"] for row in rows))}
    # Keys are (variant, ..., strategy, keep).
    return sorted(
        found.items(), key=lambda item: (variants[item[0][0]], item[0][1:-2], _rank(item[0][-2]), item[0][-1])
    )
