"""The report's charts: Vega-Lite specifications as plain functions of facts.

Colours are the page's CSS variables, `var(--kept)`, so that charts follow light, dark and print; `on_paper` puts
plain ones in their place. Texts from tables (language tags) are data or elements of a domain, never a part of an
expression.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from congrad_ray.stages.report.selection import FATES, LanguageScores
from congrad_ray.stages.train.metrics import Row

Spec = dict[str, Any]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
FATE_NAMES = {
    "kept": "kept",
    "quota": "dropped to the quota",
    "conflict": "dropped in conflict",
}
_FATE_COLOUR: Spec = {
    "field": "fate",
    "type": "nominal",
    "scale": {
        "domain": [FATE_NAMES[fate] for fate in FATES],
        "range": [f"var(--{fate})" for fate in FATES],
    },
    "legend": None,
}
_VERDICT_COLOURS = {
    "up": "var(--up)",
    "down": "var(--down)",
    "differs": "var(--accent)",
    "soft": "var(--soft)",
}
_SHAPES = ["circle", "diamond", "square", "triangle-up", "cross", "triangle-down"]
_TALL = 24  # lines of a forest, above which they stand closer
LABELLED_CELLS = 14
"""Up to so many languages a matrix has its numbers in the cells."""

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"
CONFIG: Spec = {
    "background": "transparent",
    "font": _FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--soft)",
        "titleColor": "var(--soft)",
        "gridColor": "var(--faint)",
        "domainColor": "var(--faint)",
        "tickColor": "var(--faint)",
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "labelLimit": 190,
    },
    "legend": {"labelColor": "var(--soft)", "titleColor": "var(--soft)", "orient": "top", "labelFontSize": 12},
    "title": {"color": "var(--ink)", "anchor": "start", "fontSize": 13},
}
LIGHT = {
    "ink": "#1b2430",
    "soft": "#5d6b7c",
    "faint": "#e3e7ed",
    "neutral": "#eef1f5",
    "surface": "#ffffff",
    "accent": "#2463c9",
    "agree": "#2f6fd0",
    "conflict": "#d9661f",
    "kept": "#2f6fd0",
    "quota": "#b6c1cf",
    "up": "#17805b",
    "down": "#c2412d",
    "on-strong": "#ffffff",
}
"""The page's light colours (report.css), for paper."""


@dataclass(frozen=True)
class Mark:
    """A line of a forest plot: a number between its bounds, which may be unknown."""

    label: str
    value: float
    low: float | None
    high: float | None
    verdict: str
    """'up', 'down', 'differs' (neither is better) or 'soft' (the interval holds no change)."""
    series: str = ""


def score_histogram(scores: LanguageScores, edges: Sequence[float], name: str = "score") -> Spec:
    """Counts of one language's pairs by score, stacked by what became of them, with the language's threshold."""
    bins = [
        {"from": _plain(low), "to": _plain(high), "fate": FATE_NAMES[fate], "pairs": count}
        for fate in FATES
        for low, high, count in zip(edges, edges[1:], scores.bins[fate], strict=False)
        if count
    ]
    across = {
        "field": "from",
        "type": "quantitative",
        "bin": {"binned": True},
        "scale": {"domain": [_plain(edges[0]), _plain(edges[-1])], "nice": False},
        "axis": {"tickCount": 5, "grid": False, "format": ".2~f"},
        "title": name,
    }
    layers: list[Spec] = [
        {
            "mark": {"type": "bar", "binSpacing": 0.5},
            "encoding": {
                "x": across,
                "x2": {"field": "to"},
                "y": {
                    "field": "pairs",
                    "type": "quantitative",
                    "stack": "zero",
                    "axis": {"tickCount": 3, "tickMinStep": 1, "domain": False, "ticks": False},
                    "title": "pairs",
                },
                "color": _FATE_COLOUR,
                "tooltip": [
                    {"field": "from", "title": "score from", "format": ".3~f"},
                    {"field": "to", "format": ".3~f"},
                    {"field": "fate"},
                    {"field": "pairs"},
                ],
            },
        },
        _line_at(0.0, "var(--soft)", [2, 3], "0: a pair below works against the common direction"),
    ]
    if scores.threshold is not None:
        text = f"threshold {scores.threshold:+.3f}: the lowest score that was kept"
        layers.append(_line_at(scores.threshold, "var(--ink)", [], text))
    return _spec(layers, bins, height=92)


def fates_by_language(languages: Sequence[LanguageScores]) -> Spec:
    """Of each language's pairs the share kept, dropped to the quota and dropped in conflict."""
    rows = [
        {
            "language": found.language,
            "fate": FATE_NAMES[fate],
            "order": number,
            "pairs": getattr(found, fate),
            "share": getattr(found, fate) / max(1, found.pairs),
        }
        for found in languages
        for number, fate in enumerate(FATES)
    ]
    layer = {
        "mark": {"type": "bar", "height": {"band": 0.72}},
        "encoding": {
            "y": _names("language", [found.language for found in languages]),
            "x": {
                "field": "share",
                "type": "quantitative",
                "stack": "zero",
                "scale": {"domain": [0, 1]},
                "axis": {"format": ".0%", "tickCount": 5},
                "title": None,
            },
            "color": _FATE_COLOUR,
            "order": {"field": "order"},
            "tooltip": [
                {"field": "language"},
                {"field": "fate"},
                {"field": "pairs", "format": ","},
                {"field": "share", "format": ".1%"},
            ],
        },
    }
    return _spec([layer], rows, height=18 * len(languages))


def matrix_scale(*matrices: Sequence[Sequence[float]]) -> float:
    """The largest cosine between two languages in any of the matrices, up to the next .05: the deepest colour."""
    largest = max(
        (abs(value) for rows in matrices for i, row in enumerate(rows) for j, value in enumerate(row) if i != j),
        default=0.0,
    )
    return min(1.0, max(0.05, math.ceil(largest * 20 - 1e-9) / 20))


def conflict_matrix(languages: Sequence[str], cosines: Sequence[Sequence[float]], scale: float) -> Spec:
    """The cosines (L, L) between languages' gradients, each two once: blue agree, orange pull against each other.

    `scale`: the cosine of the deepest colour, common to the matrices that are compared.
    """
    cells = [
        {"row": languages[i], "column": languages[j], "cosine": round(float(value), 3)}
        for i, row in enumerate(cosines)
        for j, value in enumerate(row[:i])
    ]
    # Steeper near 0, where the cosines of real gradients lie.
    derived = [
        {"calculate": "datum.cosine < 0 ? 'conflict' : 'agree'", "as": "sign"},
        {"calculate": f"pow(min(1, abs(datum.cosine) / {scale:.6g}), 0.7)", "as": "depth"},
    ]
    numbers = len(languages) <= LABELLED_CELLS
    small = {} if numbers else {"labelFontSize": 8, "labelPadding": 3}
    rows, columns = _names("row", languages[1:], padding=0.06), _names("column", languages[:-1], padding=0.06)
    rows["axis"] |= small
    columns["axis"] |= {**small, "labelAngle": 0 if numbers else -90}
    position = {"y": rows, "x": columns}
    layers: list[Spec] = [
        {
            "mark": {"type": "rect", "cornerRadius": 2},
            "encoding": {
                **position,
                "color": {
                    "field": "sign",
                    "type": "nominal",
                    "scale": {"domain": ["agree", "conflict"], "range": ["var(--agree)", "var(--conflict)"]},
                    "legend": None,
                },
                "opacity": {
                    "field": "depth",
                    "type": "quantitative",
                    "scale": {"domain": [0, 1], "range": [0.04, 1], "nice": False},
                    "legend": None,
                },
                "tooltip": [
                    {"field": "row", "title": "language"},
                    {"field": "column", "title": "with"},
                    {"field": "cosine", "format": "+.3f"},
                ],
            },
        }
    ]
    if numbers:
        layers.append(
            {
                "mark": {"type": "text", "fontSize": 11, "tooltip": False},
                "encoding": {
                    **position,
                    "color": {
                        "condition": {"test": "datum.depth > 0.75", "value": "var(--on-strong)"},
                        "value": "var(--ink)",
                    },
                    "text": {"field": "cosine", "type": "quantitative", "format": "+.2f"},
                },
            }
        )
    step = 40 if numbers else 15 if len(languages) <= 2 * LABELLED_CELLS else 9
    spec = _spec(layers, cells, width={"step": step}, height={"step": 30 if numbers else step})
    return {**spec, "transform": derived}


def forest(
    marks: Sequence[Mark],
    no_change: float,
    title: str,
    percent: bool = False,
    series: Sequence[str] = (),
    domain: tuple[float, float] | None = None,
) -> Spec:
    """Numbers with their intervals, one line a label, and a line where nothing changed.

    Green and red only where the interval leaves out `no_change`. Several `series` of a label stand below each
    other, with shapes of their own.
    """
    rows = [
        {
            "label": mark.label,
            "value": _plain(mark.value),
            "low": None if mark.low is None else _plain(mark.low),
            "high": None if mark.high is None else _plain(mark.high),
            "verdict": mark.verdict,
            "series": mark.series,
        }
        for mark in marks
    ]
    shape = ".0%" if percent else "+.3~f"
    several = len(series) > 1
    labels = list(dict.fromkeys(mark.label for mark in marks))
    place: Spec = {"y": _names("label", labels)}
    place["y"]["axis"]["labelFontWeight"] = {
        "condition": {"test": "datum.label === 'all seen' || datum.label === 'all unseen'", "value": "bold"},
        "value": "normal",
    }
    if several:
        place["yOffset"] = {"field": "series", "type": "nominal", "scale": {"domain": list(series)}}
    ends = [value for mark in marks for value in (mark.low, mark.high, mark.value) if value is not None]
    low, high = domain or (min([*ends, no_change]), max([*ends, no_change]))
    margin: float = 0.0 if domain else 0.04 * (high - low) or 0.05
    across = {
        "type": "quantitative",
        "scale": {"domain": [_plain(low - margin), _plain(high + margin)], "nice": domain is None, "zero": False},
        "axis": {"format": ".0%" if percent else "+.2~f", "tickCount": 6},
        "title": title,
    }
    colour = {
        "field": "verdict",
        "type": "nominal",
        "scale": {"domain": list(_VERDICT_COLOURS), "range": list(_VERDICT_COLOURS.values())},
        "legend": None,
    }
    tooltip = [
        {"field": "label", "title": " "},
        *([{"field": "series"}] if several else []),
        {"field": "value", "format": shape},
        {"field": "low", "title": "from", "format": shape},
        {"field": "high", "title": "to", "format": shape},
    ]
    point: Spec = {
        "mark": {"type": "point", "filled": True, "size": 58, "opacity": 1},
        "encoding": {**place, "x": {"field": "value", **across}, "color": colour, "tooltip": tooltip},
    }
    if several:
        point["encoding"]["shape"] = {
            "field": "series",
            "type": "nominal",
            "scale": {
                "domain": list(series),
                "range": ["circle", "diamond", "square", "triangle-up"][: len(series)],
            },
            "legend": {"title": None, "symbolFillColor": "var(--soft)", "symbolStrokeColor": "var(--soft)"},
        }
    layers = [
        _line_at(no_change, "var(--soft)", [2, 3], "no change"),
        {
            "mark": {"type": "rule", "strokeWidth": 2.5, "opacity": 0.55},
            "encoding": {**place, "x": {"field": "low", **across}, "x2": {"field": "high"}, "color": colour},
        },
        point,
    ]
    line = (26 if several else 20) if len(labels) <= _TALL else (18 if several else 14)
    return _spec(layers, rows, height=line * len(labels))


def curve(rows: Sequence[Row], name: str, at_zero: bool = False) -> Spec:
    """One metric of the training over optimiser steps; `at_zero` makes 0 part of the scale."""
    values = [{"step": row["step"], "value": row[name]} for row in rows if math.isfinite(row.get(name, math.nan))]
    mark: Spec = {"type": "line", "color": "var(--accent)", "strokeWidth": 2, "tooltip": True}
    if len(values) <= 40:
        mark["point"] = {"color": "var(--accent)", "size": 26}
    layer = {
        "mark": mark,
        "encoding": {
            "x": {
                "field": "step",
                "type": "quantitative",
                "scale": {"zero": False, "nice": False},
                "axis": {"grid": False, "tickMinStep": 1, "tickCount": 5},
                "title": "step",
            },
            "y": {
                "field": "value",
                "type": "quantitative",
                "scale": {"zero": at_zero},
                "axis": {"tickCount": 4, "format": "~g"},
                "title": None,
            },
        },
    }
    return _spec([layer], values, height=120)


def over_iterations(marks: Mapping[int, Sequence[Mark]], no_change: float, title: str, percent: bool) -> Spec:
    """Numbers with their intervals by iteration, one line a series."""
    rows = [
        {"iteration": number, "value": mark.value, "low": mark.low, "high": mark.high, "series": mark.series}
        for number, of_iteration in marks.items()
        for mark in of_iteration
    ]
    series = list(dict.fromkeys(row["series"] for row in rows))
    across = {
        "field": "iteration",
        "type": "ordinal",
        "axis": {"labelAngle": 0, "grid": False},
        "title": "iteration",
    }
    shape = ".0%" if percent else "+.2~f"
    colours = ["var(--accent)", "var(--conflict)", "var(--up)", "var(--soft)"]
    colour = {
        "field": "series",
        "type": "nominal",
        "scale": {"domain": series, "range": colours[: max(1, len(series))]},
        "legend": {"title": None},
    }
    offset = {"field": "series", "type": "nominal", "scale": {"domain": series}}
    up = {
        "type": "quantitative",
        "scale": {"zero": False},
        "axis": {"format": shape, "tickCount": 5},
        "title": title,
    }
    layers: list[Spec] = [
        {
            "mark": {"type": "rule", "strokeDash": [2, 3], "color": "var(--soft)"},
            "data": {"values": [{"at": no_change}]},
            "encoding": {"y": {"field": "at", **up}},
        },
        {
            "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.6},
            "encoding": {
                "x": across,
                "xOffset": offset,
                "y": {"field": "low", **up},
                "y2": {"field": "high"},
                "color": colour,
            },
        },
        {
            "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
            "encoding": {
                "x": across,
                "xOffset": offset,
                "y": {"field": "value", **up},
                "color": colour,
                "tooltip": [
                    {"field": "iteration"},
                    {"field": "series"},
                    *({"field": name, "format": shape} for name in ("value", "low", "high")),
                ],
            },
        },
    ]
    return _spec(layers, rows, height=180)


def in_columns(specs: Mapping[str, Spec], columns: int = 3) -> Spec:
    """Several charts with their titles as one, for paper."""
    parts = [{**spec, "title": name} for name, spec in specs.items()]
    return {"columns": columns, "concat": parts, "resolve": {"scale": {"color": "shared"}}}


def on_paper(spec: Spec, width: int = 300) -> Spec:
    """The chart with the light page's colours and a width of its own, to be drawn outside the page."""

    def plain(value: Any, key: str = "") -> Any:
        if key == "data":
            return value
        if isinstance(value, dict):
            # The page has one legend for all charts of pairs; on paper each picture needs its own.
            bare = value.get("field") == "fate" and value.get("legend", "") is None
            kept = {**value, "legend": {"title": None}} if bare else value
            return {name: plain(inner, name) for name, inner in kept.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        if isinstance(value, str) and value.startswith("var(--"):
            return LIGHT[value.removeprefix("var(--").removesuffix(")")]
        return width if key == "width" and value == "container" else value

    config = {**CONFIG, "background": "white", "font": "Helvetica, Arial, sans-serif"}
    found: Spec = plain({"$schema": SCHEMA, **spec, "config": config})
    return found


def _spec(layers: list[Spec], values: list[Spec], height: Any, width: Any = "container") -> Spec:
    return {
        "width": width,
        "height": height,
        "data": {"values": values},
        "layer": layers,
    }


def _names(name: str, domain: Sequence[str], padding: float | None = None) -> Spec:
    """An axis of names in the order given."""
    scale: Spec = {"domain": list(domain)}
    if padding is not None:
        scale["padding"] = padding
    return {
        "field": name,
        "type": "nominal",
        "scale": scale,
        "axis": {"domain": False, "ticks": False, "title": None, "labelPadding": 6},
    }


def _line_at(value: float, colour: str, dash: list[int], text: str) -> Spec:
    return {
        "mark": {"type": "rule", "color": colour, "strokeDash": dash, "strokeWidth": 1.4},
        "data": {"values": [{"at": _plain(value), "what": text}]},
        "encoding": {
            "x": {"field": "at", "type": "quantitative"},
            "tooltip": {"field": "what", "type": "nominal", "title": " "},
        },
    }


def _plain(value: float) -> float:
    """Five digits after the point: none of the rest can be seen, and the page stays small."""
    return round(float(value), 5)
