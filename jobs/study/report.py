"""The study's results as one self-contained HTML file, in the style of a run's report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from markupsafe import Markup

from congrad_ray.stages.report.html import duration, page_environment
from study import analysis, pictures
from study.analysis import (
    NOTHING,
    RANDOM,
    Difference,
    Estimate,
    Group,
    Line,
    SelectionSummary,
    difference_text,
    keep_text,
    number_text,
    percent_text,
    seeds_text,
    signed_text,
)
from study.protocol import EVERYTHING, START
from study.results import Row

_MEASURES = {
    "seen": "score in languages trained on",
    "unseen": "score in languages never trained on",
    "held_out": "score in kinds of task not trained on",
}
_BASELINES = {EVERYTHING: "training on all pairs", RANDOM: "a random choice of as many pairs"}
_CHANCE = 0.5
_LETTER = 6.2  # width of a letter in pictures


@dataclass(frozen=True)
class Mark:
    """One line of an interval picture: a name, an estimate, the estimate in words, and a tooltip."""

    name: str
    estimate: Estimate
    text: str
    tip: str


@dataclass(frozen=True)
class KeepCurve:
    """A strategy's differences of the seen score to a baseline, by keep ratio."""

    strategy: str
    points: list[Difference]


@dataclass(frozen=True)
class Exact:
    """Selection from sketches against selection from exact gradients: means over seeds, and the worst seed.

    `rank_correlation` of the scores, share of kept pairs `in_common`, `error` of the scores.
    """

    variant: str
    strategy: str
    keep: float
    seeds: int
    rank_correlation: float
    rank_correlation_worst: float
    in_common: float
    in_common_worst: float
    error: float
    error_worst: float


def write_report(rows: Sequence[Row], path: str | Path, protocol_text: str = "") -> None:
    """Writes the page of `render_report` to `path`, whose folder is made. Raises OSError where that fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_report(rows, protocol_text), encoding="utf-8")


def render_report(rows: Sequence[Row], protocol_text: str = "") -> str:
    """The page: rows as `read_results` gives them, any kind of which may be missing; all texts are escaped."""
    environment = page_environment(Path(__file__).parent)
    environment.filters.update(
        difference=difference_text,
        keep=keep_text,
        number=number_text,
        percent=percent_text,
        seeds=seeds_text,
        interval=_interval_text,
    )
    tables = {group: analysis.table(rows, group) for group in analysis.groups(rows)}
    selections = analysis.selection_summaries(rows)
    return environment.get_template("study.html.jinja").render(
        tiles=_tiles(rows, tables),
        tables=tables,
        forests={group: forest_plots(lines) for group, lines in tables.items()},
        curves={group: keep_plots(lines) for group, lines in tables.items()},
        intervals=_intervals(tables),
        same_steps=_same_steps(tables),
        selections=selections,
        auc_plots=auc_plots(selections),
        exact=exact_checks(rows),
        protocol_text=protocol_text,
        measures=_MEASURES,
        baselines=_BASELINES,
        start=START,
        verdict=verdict,
    )


def verdict(estimate: Estimate | None, reference: float = 0.0) -> str:
    """The CSS class of an estimate: 'up' or 'down' only where its interval leaves out `reference`, else 'soft'."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return "soft"
    if estimate.low > reference:
        return "up"
    return "down" if estimate.high < reference else "soft"


def forest_plots(lines: Sequence[Line]) -> list[tuple[str, str, Markup]]:
    """(measure, baseline, picture) for everything that a group can be compared on, all on one scale."""
    several = len({line.keep for line in lines if line.strategy not in (START, EVERYTHING)}) > 1
    found = {
        (measure, baseline): [
            line.differences[baseline, measure] for line in lines if (baseline, measure) in line.differences
        ]
        for measure in _MEASURES
        for baseline in _BASELINES
    }
    span = _span([difference for some in found.values() for difference in some], 0.0)
    return [
        (
            measure,
            baseline,
            interval_plot(
                [_mark(difference, several) for difference in some],
                0.0,
                span,
                f"{_MEASURES[measure]}, against {baseline}",
            ),
        )
        for (measure, baseline), some in found.items()
        if some
    ]


def auc_plots(selections: Sequence[SelectionSummary]) -> list[tuple[str, Markup]]:
    """(variant, picture) of every strategy's AUC; all on one scale, the line is at chance."""
    by_variant: dict[str, list[SelectionSummary]] = defaultdict(list)
    for summary in selections:
        if summary.auc is not None:
            by_variant[summary.variant].append(summary)
    span = _span([s.auc for some in by_variant.values() for s in some if s.auc is not None], _CHANCE)
    return [
        (variant, interval_plot(_auc_marks(some), _CHANCE, span, f"AUC in {variant}"))
        for variant, some in by_variant.items()
    ]


def keep_plots(lines: Sequence[Line]) -> list[tuple[str, str, Markup]]:
    """(baseline, strategy, picture): the difference of the seen score by keep ratio, where there are several."""
    curves: dict[str, list[KeepCurve]] = {}
    for baseline in _BASELINES:
        points: dict[str, list[Difference]] = defaultdict(list)
        for line in lines:
            if (baseline, "seen") in line.differences:
                points[line.strategy].append(line.differences[baseline, "seen"])
        curves[baseline] = [KeepCurve(strategy, some) for strategy, some in points.items() if len(some) > 1]
    span = _span([point for some in curves.values() for curve in some for point in curve.points], 0.0)
    return [
        (baseline, curve.strategy, keep_plot(curve, span, f"{curve.strategy} against {baseline}, by keep ratio"))
        for baseline, some in curves.items()
        for curve in some
    ]


def exact_checks(rows: Sequence[Row]) -> list[Exact]:
    """The rows of kind 'exact' by variant, strategy and keep ratio."""
    found: dict[tuple[str, str, float], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row["kind"] == "exact":
            found[row["variant"], row["strategy"], row["keep"]][row["seed"]] = row
    checks = []
    for (variant, strategy, keep), by_seed in sorted(found.items()):
        correlations = [row["rank_correlation"] for row in by_seed.values()]
        common = [row["kept_in_common"] for row in by_seed.values()]
        errors = [row["error"] for row in by_seed.values()]
        checks.append(
            Exact(
                variant,
                strategy,
                keep,
                len(by_seed),
                fmean(correlations),
                min(correlations),
                fmean(common),
                min(common),
                fmean(errors),
                max(errors),
            )
        )
    return checks


def interval_plot(marks: Sequence[Mark], reference: float, span: tuple[float, float], label: str) -> Markup:
    """Dots with intervals, one line each, and a dashed line at `reference`; `span` is what the scale encloses.

    An interval that leaves out the reference is coloured; a hollow dot has no interval.
    """
    ticks = pictures.round_ticks(*span)
    low, high = ticks[0], ticks[-1]
    left = 12 + _LETTER * max((len(mark.name) for mark in marks), default=0)
    wide, row, top = 170, 19, 8
    width = left + wide + 16 + _LETTER * max((len(mark.text) for mark in marks), default=0)
    base = top + row * len(marks)

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * wide

    def upright(value: float, name: str) -> Markup:
        return pictures.svg_element("line", name=name, x1=place(value), x2=place(value), y1=top, y2=base)

    parts = [upright(tick, "grid") for tick in ticks]
    ends = [end for end in (low, high) if abs(place(end) - place(reference)) > 40]  # else numbers overlap
    parts += [
        pictures.svg_text(place(value), base + 14, _tick_text(value, reference), "middle")
        for value in (*ends, reference)
    ]
    parts.append(upright(reference, "zero"))
    for number, mark in enumerate(marks):
        y, found = top + row * (number + 0.5), mark.estimate
        name = verdict(found, reference)
        parts.append(pictures.svg_text(left - 10, y + 4, mark.name, "end"))
        if found.low is not None and found.high is not None:
            across = {"x1": place(found.low), "x2": place(found.high), "y1": y, "y2": y}
            parts.append(pictures.svg_element("line", mark.tip, f"span {name}", **across))
        hollow = " hollow" if found.low is None else ""
        parts.append(
            pictures.svg_element("circle", mark.tip, f"point {name}{hollow}", cx=place(found.mean), cy=y, r=4)
        )
        parts.append(pictures.svg_text(left + wide + 12, y + 4, mark.text, "start", "label value"))
    return pictures.svg_picture(width, base + 20, label, parts, natural=True)


def keep_plot(curve: KeepCurve, span: tuple[float, float], label: str) -> Markup:
    """Differences with their intervals over the keep ratio, from 0 to everything; a dashed line at 0."""
    width, height, left, right, top, bottom = 300, 160, 54, 12, 10, 32
    ticks = pictures.round_ticks(*span)
    low, high = ticks[0], ticks[-1]

    def place(keep: float, value: float) -> tuple[float, float]:
        across = left + keep * (width - left - right)
        return across, top + (high - value) / (high - low) * (height - top - bottom)

    parts = []
    for tick in ticks:
        _, y = place(0, tick)
        parts.append(pictures.svg_element("line", name="grid", x1=left, x2=width - right, y1=y, y2=y))
        parts.append(pictures.svg_text(left - 6, y + 4, _tick_text(tick), "end"))
    _, zero = place(0, 0)
    parts.append(pictures.svg_element("line", name="zero", x1=left, x2=width - right, y1=zero, y2=zero))
    points = [place(point.keep, point.mean) for point in curve.points]
    parts.append(
        pictures.svg_element("polyline", name="curve", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))
    )
    for point, (x, y) in zip(curve.points, points, strict=True):
        tip, name, hollow = _tip(point), verdict(point), " hollow"
        if point.low is not None and point.high is not None:
            ends = {"x1": x, "x2": x, "y1": place(0, point.low)[1], "y2": place(0, point.high)[1]}
            parts.append(pictures.svg_element("line", tip, f"span {name}", **ends))
            hollow = ""
        parts.append(pictures.svg_element("circle", tip, f"point {name}{hollow}", cx=x, cy=y, r=3.5))
        parts.append(pictures.svg_text(x, height - 5, f"{100 * point.keep:g}", "middle"))
    parts.append(pictures.svg_text(left - 6, height - 5, "kept, %", "end"))
    return pictures.svg_picture(width, height, label, parts)


def _mark(difference: Difference, several_keeps: bool) -> Mark:
    name = difference.strategy + (f", {keep_text(difference.keep)}" if several_keeps else "")
    return Mark(name, difference, difference_text(difference), _tip(difference))


def _tip(difference: Difference) -> str:
    return (
        f"{difference.strategy}, {keep_text(difference.keep)} kept, against {difference.baseline}: "
        f"{difference_text(difference)}, higher in {difference.wins} of {seeds_text(difference.seeds)}"
    )


def _auc_marks(summaries: Sequence[SelectionSummary]) -> list[Mark]:
    """One line a strategy; where its AUC differs between keep ratios, one line each."""
    by_strategy: dict[str, list[SelectionSummary]] = defaultdict(list)
    for summary in summaries:
        by_strategy[summary.strategy].append(summary)
    marks = []
    for strategy, some in by_strategy.items():
        # A score is as good whatever share is kept by it; only missing seeds make a difference.
        several = len({summary.auc for summary in some}) > 1
        for summary in some if several else some[:1]:
            if summary.auc is not None:
                name = f"{strategy}, {keep_text(summary.keep)}" if several else strategy
                text = _interval_text(summary.auc)
                marks.append(Mark(name, summary.auc, text, f"{name}: {text}, {seeds_text(summary.auc.seeds)}"))
    return marks


def _interval_text(estimate: Estimate | None, digits: int = 3) -> str:
    """'0.710 (0.680..0.740)', without an interval where there is none."""
    if estimate is None:
        return NOTHING
    mean, low, high = (number_text(v, digits) for v in (estimate.mean, estimate.low, estimate.high))
    return mean if estimate.low is None else f"{mean} ({low}..{high})"


def _tick_text(value: float, reference: float = 0.0) -> str:
    """Differences have a sign, other numbers none."""
    return f"{value:.3g}" if reference else signed_text(value, 3) if value else "0"


def _span(estimates: Sequence[Estimate], reference: float) -> tuple[float, float]:
    """The range that holds the reference and every interval."""
    ends = [v for e in estimates for v in (e.mean, e.low, e.high) if v is not None]
    return min([reference, *ends]), max([reference, *ends])


def _tiles(rows: Sequence[Row], tables: dict[Group, list[Line]]) -> list[tuple[str, str, str]]:
    """The study in a few numbers: (number, what it is, small print)."""
    cells = [row for row in rows if row["kind"] == "cell" and row["strategy"] != START]
    starts = [row for row in rows if row["kind"] == "cell" and row["strategy"] == START]
    seconds = sum(row.get("seconds") or 0.0 for row in cells)
    return [
        (str(len({row["seed"] for row in cells})), "seeds", "a world and a starting model each"),
        (str(len(cells)), "cells", f"trained models; {len(starts)} starting models"),
        (str(len({row["variant"] for row in cells})), "variants of the world", f"{len(tables)} groups of cells"),
        (str(len({row["strategy"] for row in cells})), "strategies", ""),
        (duration(seconds), "of training and sampling", "all cells together"),
    ]


def _intervals(tables: dict[Group, list[Line]]) -> tuple[int, int]:
    """How many intervals of differences the pictures show, and how many of them leave out zero."""
    found = [
        verdict(difference)
        for lines in tables.values()
        for line in lines
        for (baseline, measure), difference in line.differences.items()
        if baseline in _BASELINES and measure in _MEASURES and difference.low is not None
    ]
    return len(found), sum(name != "soft" for name in found)


def _same_steps(tables: dict[Group, list[Line]]) -> bool:
    """Whether all trained models of every group took as many optimiser steps."""
    return all(len({line.steps for line in lines if line.strategy != START}) <= 1 for lines in tables.values())
