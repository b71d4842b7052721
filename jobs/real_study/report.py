"""The results as Markdown tables, between the markers of a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from real_study.measuring import over
from real_study.protocol import ALL, DATASETS, DatasetName, Protocol
from study.analysis import (
    NOTHING,
    RANDOM,
    Estimate,
    difference_text,
    estimate,
    number_text,
    percent_text,
    rate_text,
)
from study.results import Row

# <!-- table NAME --> what is written <!-- end -->
_PLACE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_EMPTY = "*No results yet.*"

_PREFERENCE = ("accuracy", "margin")
_ELSEWHERE = ("in unseen languages", "chosen likelier at the start", "chosen less likely at the start")
_TAX = ("TaTA accuracy", "XCOPA accuracy", "XCOPA log p of right", "log p of plain text")

Values = Sequence[float | None] | None


def write_tables(rows: Sequence[Row], protocol: Protocol, page: Path) -> None:
    """Writes every table between its markers. Raises ValueError for a place whose table there is not."""
    known = tables(rows, protocol)
    text = page.read_text(encoding="utf-8")
    unknown = sorted({name for _, name, _ in _PLACE.findall(text)} - set(known))
    if unknown:
        raise ValueError(f"{page}: no such table: {', '.join(unknown)}; there are {', '.join(known)}")
    page.write_text(
        _PLACE.sub(lambda found: f"{found[1]}\n{known[found[2]]}\n\n{found[3]}", text), encoding="utf-8"
    )


def tables(rows: Sequence[Row], protocol: Protocol) -> dict[str, str]:
    """Every table by its name."""
    found = {"subset": _subset(rows), "tuning": _tuning(rows, protocol), "start": _start(rows)}
    for dataset in DATASETS:
        found |= {
            f"labels-{dataset}": _labels(rows, dataset),
            f"cosines-{dataset}": _cosines(rows, dataset),
            f"blocks-of-cosines-{dataset}": _cosines_by_block(rows, dataset),
            f"auc-{dataset}": _auc(rows, protocol, dataset),
            f"blocks-{dataset}": _blocks(rows, protocol, dataset),
            f"agreement-{dataset}": _agreement(rows, dataset),
            f"planted-{dataset}": _planted(rows, protocol, dataset),
        }
        for rule in protocol.selection.rules:
            found[f"{rule}-{dataset}"] = _kept(rows, protocol, dataset, rule)
    for variant in protocol.training.variants:
        found[f"trained-on-{variant}"] = _trained_on(rows, protocol, variant)
        found[f"training-{variant}"] = _training(rows, protocol, variant, _PREFERENCE)
        found[f"held-out-{variant}"] = _training(rows, protocol, variant, _ELSEWHERE)
        found[f"tax-{variant}"] = _training(rows, protocol, variant, _TAX)
        found[f"languages-{variant}"] = _by_language(rows, protocol, variant)
    return found


def _labels(rows: Sequence[Row], dataset: DatasetName) -> str:
    row = _one(rows, kind="labels", dataset=dataset)
    if row is None:
        return _EMPTY
    names = ("longer", "likelier", "likelier_per_token")
    body = [
        ["all" if language == "*" else language, str(count), *(number_text(row[name][language]) for name in names)]
        for language, count in row["pairs"].items()
    ]
    return _table(["language", "pairs", "longer", "likelier", "likelier per token"], body)


def _cosines(rows: Sequence[Row], dataset: DatasetName) -> str:
    row = _one(rows, kind="cosines", dataset=dataset)
    if row is None:
        return _EMPTY
    body = [
        [language, *(number_text(value, 2) for value in line)]
        for language, line in zip(row["languages"], row["matrix"], strict=True)
    ]
    return _table(["", *row["languages"]], body)


def _cosines_by_block(rows: Sequence[Row], dataset: DatasetName) -> str:
    """The languages' cosines without those of a language with itself, of every block of layers."""
    row = _one(rows, kind="cosines", dataset=dataset)
    if row is None:
        return _EMPTY
    body = []
    for number, (matrix, share) in enumerate(zip(row["blocks"], row["block_shares"], strict=True)):
        values = [line[place] for at, line in enumerate(matrix) for place in range(at)]
        body.append([str(number), percent_text(share), *(number_text(f(values), 2) for f in (fmean, min, max))])
    return _table(["block of layers", "share of the squared norm", "mean cosine", "least", "largest"], body)


def _auc(rows: Sequence[Row], protocol: Protocol, dataset: DatasetName) -> str:
    plantings = [name for name in _plantings(protocol, dataset) if name != "clean"]
    found = _selections(rows, dataset, plain=True)
    strategies = _strategies(found)
    if not strategies:
        return _EMPTY
    detailed = protocol.selection.detailed
    head = ["strategy", *plantings, f"{detailed}, in its languages", "within each language"]
    head += [f"{detailed}, to `congrad`", "± over pairs"]
    rated = any(row.get("auc_rating") for row in found.values())
    body = []
    for strategy in strategies:
        two: Row = found.get((detailed, strategy), {})
        paper: Row = found.get((detailed, "congrad"), {})
        line = [_code(strategy), *(_interval(found.get((name, strategy), {}).get("auc")) for name in plantings)]
        line += [_interval(two.get("auc_planted")), _interval(two.get("auc_within"))]
        line += [_difference(two.get("auc"), paper.get("auc"))]
        line.append(number_text(_normal(two.get("auc_se"))))
        if rated:
            line.append(_interval(found.get(("clean", strategy), {}).get("auc_rating")))
        if any(cell != NOTHING for cell in line[1:]):
            body.append(line)
    return _table([*head, "clean: 2 over 0 against 2 over 1"] if rated else head, body)


def _planted(rows: Sequence[Row], protocol: Protocol, dataset: DatasetName) -> str:
    """Cosines between languages by planting, of `congrad`'s draws."""
    found = _selections(rows, dataset, plain=True)
    body = []
    for name in _plantings(protocol, dataset):
        row = found.get((name, "congrad"), {})
        least = _numbers(row.get("least_cosine"))
        if least:
            values = [_mean(row.get(f"{which}_cosine")) for which in ("healthy", "planted", "least")]
            negative = percent_text(sum(value < 0 for value in least) / len(least), 0)
            body.append([name, *(number_text(value, 2) for value in values), negative])
    head = [
        "planting",
        "among the others",
        "between them and the planted",
        "the least",
        "draws with a negative one",
    ]
    return _table(head, body) if body else _EMPTY


def _kept(rows: Sequence[Row], protocol: Protocol, dataset: DatasetName, rule: str) -> str:
    """The share of flipped pairs among the kept; of a threshold the share kept as well."""
    plantings = [name for name in _plantings(protocol, dataset) if name != "clean"]
    found = _selections(rows, dataset, plain=True)
    body = []
    for strategy in _strategies(found):
        line = [_code(strategy)]
        for name in plantings:
            row = found.get((name, strategy), {})
            text = _interval(row.get(f"{rule}_flipped"), percent=True)
            if rule == "threshold" and text != NOTHING:
                text += f" of {percent_text(_mean(row.get('threshold_kept')), 0)}"
            line.append(text)
        if any(cell != NOTHING for cell in line[1:]):
            body.append(line)
    return _table(["strategy", *plantings], body) if body else _EMPTY


def _blocks(rows: Sequence[Row], protocol: Protocol, dataset: DatasetName) -> str:
    """AUC of the same strategy from some blocks of layers alone."""
    found = _selections(rows, dataset, plain=False)
    names = protocol.selection.block_strategies
    if not found:
        return _EMPTY
    plantings = protocol.selection.block_plantings
    body = []
    for blocks in (None, *protocol.selection.blocks):
        suffix = "" if blocks is None else f"@{'+'.join(map(str, blocks))}"
        values = [found.get((of, f"{name}{suffix}"), {}).get("auc") for of in plantings for name in names]
        body.append([suffix.removeprefix("@") or "all", *map(_interval, values)])
    return _table(["blocks", *(f"{of}: {_code(name)}" for of in plantings for name in names)], body)


def _agreement(rows: Sequence[Row], dataset: DatasetName) -> str:
    """Whether it is the quota or the conflict that drops pairs, where no label is planted."""
    found = _selections(rows, dataset, plain=True)
    body = []
    for strategy in _strategies(found):
        row = found.get(("clean", strategy), {})
        if row.get("threshold_kept"):
            names = (
                "conflicting",
                "per_language_kept_agreeing",
                "per_language_dropped_agreeing",
                "threshold_kept",
            )
            body.append([_code(strategy), *(percent_text(_mean(row.get(name))) for name in names)])
    head = [
        "strategy",
        "in conflict",
        "top half: agreeing among kept",
        "agreeing among dropped",
        "kept by threshold 0",
    ]
    return _table(head, body) if body else _EMPTY


def _subset(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        if row["kind"] == "against":
            names = ("cosines_rank_correlation", "rank_correlation", "rank_correlation_without_pair")
            line = [row["against"], _code(row["strategy"]), str(row["pairs"]), number_text(row["languages_error"])]
            line += [number_text(row[name]) for name in names]
            line += [percent_text(row["kept_in_common"]), percent_text(row["kept_in_common_without_pair"])]
            line += [_interval(row["auc"]), _interval(row["auc_other"]), _difference(row["auc_other"], row["auc"])]
            line.append(percent_text(row.get("embedding_share")))
            body.append(line)
    head = ["against exact", "strategy", "pairs", "largest difference of languages' cosines"]
    head += ["rank correlation of pairs' cosines", "of scores"]
    head += ["of scores without the pair", "kept in common", "without the pair"]
    return (
        _table([*head, "AUC exact", "AUC", "difference", "embedding's share of the squared norm"], body)
        if body
        else _EMPTY
    )


def _start(rows: Sequence[Row]) -> str:
    row = _one(rows, kind="start")
    if row is None:
        return _EMPTY
    names = ("held_out_likelier", "tata_likelier", "xcopa_accuracy", "xcopa_right", "plain_logp")
    return _table([name.replace("_", " ") for name in names], [[number_text(over(row[name])) for name in names]])


def _tuning(rows: Sequence[Row], protocol: Protocol) -> str:
    seeds = set(protocol.training.tuning_seeds)
    by_rate: dict[float, list[Row]] = {}
    for row in rows:
        if row["kind"] == "cell" and row["seed"] in seeds:
            by_rate.setdefault(row["learning_rate"], []).append(row)
    measures = {name: of for name, of in _measures(protocol).items() if name in (*_PREFERENCE, *_TAX)}
    body = [
        [
            rate_text(rate),
            str(len(of_rate)),
            *(number_text(_mean([measure(row) for row in of_rate])) for measure in measures.values()),
        ]
        for rate, of_rate in sorted(by_rate.items())
    ]
    return _table(["learning rate", "seeds", *measures], body) if body else _EMPTY


def _training(rows: Sequence[Row], protocol: Protocol, variant: str, names: Sequence[str]) -> str:
    """Means over seeds, and differences to `all` and `random` of the same seed with 95 % Student intervals."""
    cells = _cells(rows, protocol, variant)
    if not cells:
        return _EMPTY
    measures = {name: measure for name, measure in _measures(protocol).items() if name in names}
    head = ["strategy", *(text for name in measures for text in (name, "to `all`", "to `random`"))]
    body = []
    for strategy in protocol.training.strategies:
        of = cells.get(strategy, {})
        if not of:
            continue
        line = [_code(strategy)]
        for measure in measures.values():
            line.append(number_text(_mean([measure(row) for row in of.values()])))
            for baseline in (ALL, RANDOM):
                other = {} if strategy == baseline else cells.get(baseline, {})
                both = sorted(set(of) & set(other))
                line.append(
                    _difference([measure(of[seed]) for seed in both], [measure(other[seed]) for seed in both])
                )
        body.append(line)
    return _table(head, body)


def _trained_on(rows: Sequence[Row], protocol: Protocol, variant: str) -> str:
    """What each strategy was trained on, means over seeds, and how far other held-out pairs would move it."""
    cells = _cells(rows, protocol, variant)
    if not cells:
        return _EMPTY
    seen, train = protocol.training.languages, protocol.training.train
    body = []
    for strategy in protocol.training.strategies:
        of = cells.get(strategy, {})
        if not of:
            continue
        first = next(iter(of.values()))
        kept = [_mean([row["kept_by_language"].get(language, 0) for row in of.values()]) for language in seen]
        line = [_code(strategy), str(len(of)), *(number_text(count, 0) for count in kept)]
        line.append(
            number_text(_mean([first["steps"] * train.batch_size / row["kept"] for row in of.values()]), 2)
        )
        line.append(percent_text(_mean([row["flipped_kept"] for row in of.values()])))
        other = {} if strategy == RANDOM else cells.get(RANDOM, {})
        line.append(number_text(_normal([_error_over_pairs(of, other, seen)])))
        body.append(line)
    head = ["strategy", "seeds", *(f"{language} kept" for language in seen), "passes", "flipped among kept"]
    return _table([*head, "± over held-out pairs of its accuracy to `random`"], body)


def _error_over_pairs(of: Mapping[int, Row], other: Mapping[int, Row], languages: Sequence[str]) -> float | None:
    """Standard error over held-out pairs of the difference in accuracy, itself the mean over common seeds."""

    def right(row: Row) -> NDArray[np.float64]:
        margins = [margin for language in languages for margin in row["held_out_margins"][language]]
        return (np.array(margins) > 0).astype(np.float64)

    both = set(of) & set(other)
    if not both:
        return None
    differences = np.mean([right(of[seed]) - right(other[seed]) for seed in both], axis=0)
    return float(differences.std(ddof=1) / len(differences) ** 0.5)


def _by_language(rows: Sequence[Row], protocol: Protocol, variant: str) -> str:
    """Held-out accuracy in every language: means over seeds."""
    cells = _cells(rows, protocol, variant)
    if not cells:
        return _EMPTY
    measures = ("held_out_accuracy", "tata_accuracy")
    languages = {name: list(next(iter(next(iter(cells.values())).values()))[name]) for name in measures}
    head = [
        "strategy",
        *(
            f"{name.removesuffix('_accuracy').replace('_', ' ')} {one}"
            for name in measures
            for one in languages[name]
        ),
    ]
    body = [
        [
            _code(strategy),
            *(
                number_text(_mean([row[name][one] for row in of.values()]))
                for name in measures
                for one in languages[name]
            ),
        ]
        for strategy in protocol.training.strategies
        if (of := cells.get(strategy))
    ]
    return _table(head, body)


def _measures(protocol: Protocol) -> dict[str, Any]:
    """What a trained model is judged by: names, and functions of a cell's row."""
    seen = protocol.training.languages

    def unseen(row: Row, name: str) -> float | None:
        return over(row[name], [language for language in row[name] if language not in seen])

    return {
        "accuracy": lambda row: over(row["held_out_accuracy"], seen),
        "margin": lambda row: over(row["held_out_margin"], seen),
        "in unseen languages": lambda row: unseen(row, "held_out_accuracy"),
        "chosen likelier at the start": lambda row: row["held_out_by_start"]["likelier"],
        "chosen less likely at the start": lambda row: row["held_out_by_start"]["less likely"],
        "TaTA accuracy": lambda row: over(row["tata_accuracy"]),
        "XCOPA accuracy": lambda row: over(row["xcopa_accuracy"]),
        "XCOPA log p of right": lambda row: over(row["xcopa_right"]),
        "log p of plain text": lambda row: over(row["plain_logp"]),
    }


def _cells(rows: Sequence[Row], protocol: Protocol, variant: str) -> dict[str, dict[int, Row]]:
    """The cells of the comparison by strategy and seed; those that the learning rate was chosen on are not."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if (
            row["kind"] == "cell"
            and row["variant"] == variant
            and row["learning_rate"] == protocol.training.learning_rate
            and row["seed"] not in protocol.training.tuning_seeds
        ):
            found.setdefault(row["strategy"], {})[row["seed"]] = row
    return found


def _one(rows: Sequence[Row], **key: object) -> Row | None:
    return next((row for row in rows if all(row.get(name) == value for name, value in key.items())), None)


def _selections(rows: Sequence[Row], dataset: DatasetName, plain: bool) -> dict[tuple[str, str], Row]:
    """Rows by planting and strategy; `plain`: of all layers only."""
    return {
        (row["planting"], row["strategy"]): row
        for row in rows
        if row["kind"] == "selection" and row["dataset"] == dataset and not (plain and "@" in row["strategy"])
    }


def _strategies(found: Iterable[tuple[str, str]]) -> list[str]:
    return list(dict.fromkeys(strategy for _, strategy in found))


def _plantings(protocol: Protocol, dataset: DatasetName) -> list[str]:
    return [name for name, planting in protocol.plantings.items() if dataset in planting.datasets]


def _numbers(values: Values) -> list[float]:
    return [value for value in values or () if value is not None]


def _mean(values: Values) -> float | None:
    some = _numbers(values)
    return fmean(some) if some else None


def _normal(errors: Values) -> float | None:
    """Half of a 95 % interval, from standard errors."""
    mean = _mean(errors)
    return None if mean is None else 1.959963984540054 * mean


def _interval(values: Values, percent: bool = False) -> str:
    """'0.612 (0.604..0.620)': mean and 95 % Student interval."""
    some = _numbers(values)
    if not some:
        return NOTHING

    def text(value: float) -> str:
        return number_text(100 * value, 1) if percent else number_text(value)

    found: Estimate = estimate(some)
    within = "" if found.low is None or found.high is None else f" ({text(found.low)}..{text(found.high)})"
    return f"{text(found.mean)}{' %' if percent else ''}{within}"


def _difference(values: Values, others: Values) -> str:
    """The mean of paired differences with its 95 % Student interval; nothing of a strategy with itself."""
    if not values or not others or values is others:
        return NOTHING
    both = [
        one - other for one, other in zip(values, others, strict=True) if one is not None and other is not None
    ]
    return difference_text(estimate(both), len(both)) if both else NOTHING


def _code(name: str) -> str:
    return f"`{name}`"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *body)]
    return "\n".join([lines[0], "|---" + "|--:" * (len(head) - 1) + "|", *lines[1:]])
