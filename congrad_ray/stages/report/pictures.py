"""Small SVG pictures that take their colours from the page's CSS, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

_CELL = 44
_LABELLED_CELLS = 14  # above this many languages the numbers move into tooltips


def conflict_matrix(languages: Sequence[str], cosines: Sequence[Sequence[float]], label: str) -> Markup:
    """The cosines between languages' gradients, (L, L): blue agree, orange pull against each other."""
    count = len(languages)
    numbers = count <= _LABELLED_CELLS
    cell = _CELL if numbers else 18
    left = 14 + 8 * max((len(language) for language in languages), default=2)
    top = 26 if numbers else left
    parts = []
    for i, row in enumerate(cosines):
        parts.append(svg_text(left - 8, top + i * cell + cell / 2 + 4, languages[i], "end"))
        for j, value in enumerate(row):
            x, y = left + j * cell, top + i * cell
            tip = f"{languages[i]} and {languages[j]}: {value:+.3f}"
            fill = f"fill:{_diverging(value)}"
            parts.append(
                svg_element("rect", tip, x=x + 1, y=y + 1, width=cell - 2, height=cell - 2, rx=3, style=fill)
            )
            if numbers:
                strong = " on-strong" if abs(value) > 0.65 else ""
                parts.append(svg_text(x + cell / 2, y + cell / 2 + 4, _signed(value), "middle", f"cell{strong}"))
    for j, language in enumerate(languages):
        middle = left + j * cell + cell / 2
        if numbers:
            parts.append(svg_text(middle, top - 9, language, "middle"))
        else:
            parts.append(svg_element("text", language, transform=f"translate({middle + 4} {top - 6}) rotate(-90)"))
    return svg_picture(left + count * cell + 2, top + count * cell + 2, label, parts, natural=True)


def histogram(kept: Sequence[int], dropped: Sequence[int], limit: float, label: str) -> Markup:
    """Stacked counts over equal bins from -limit to limit: dropped below, kept on top, a line at 0."""
    width, height, base = 260, 96, 76
    bins = len(kept)
    step = width / bins
    tallest = max((k + d for k, d in zip(kept, dropped, strict=True)), default=0) or 1
    parts = []
    for number, (k, d) in enumerate(zip(kept, dropped, strict=True)):
        low = -limit + 2 * limit * number / bins
        tip = f"cosine {low:+.2f} to {low + 2 * limit / bins:+.2f}: {k} kept, {d} dropped"
        y = float(base)
        for count, name in ((d, "dropped"), (k, "kept")):
            tall = 66 * count / tallest
            y -= tall
            if count:
                left = number * step + 0.75
                parts.append(svg_element("rect", tip, name, x=left, y=y, width=step - 1.5, height=tall))
    parts.append(svg_element("line", name="axis", x1=0, x2=width, y1=base, y2=base))
    parts.append(svg_element("line", name="zero", x1=width / 2, x2=width / 2, y1=4, y2=base))
    parts.append(svg_text(0, base + 15, _signed(-limit), "start"))
    parts.append(svg_text(width / 2, base + 15, "0", "middle"))
    parts.append(svg_text(width, base + 15, _signed(limit), "end"))
    return svg_picture(width, height, label, parts)


def line_chart(xs: Sequence[float], ys: Sequence[float], label: str, at_zero: bool = False) -> Markup:
    """One curve over optimiser steps; `at_zero` makes 0 part of the scale."""
    width, height, left, right, top, bottom = 300, 150, 46, 10, 10, 22
    finite = [y for y in ys if math.isfinite(y)] or [0.0]
    if at_zero:
        finite.append(0.0)
    ticks = round_ticks(min(finite), max(finite))
    low, high = ticks[0], ticks[-1]
    first, last = (min(xs), max(xs)) if xs else (0.0, 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        return left + across * (width - left - right), top + (high - y) / (high - low) * (height - top - bottom)

    parts = []
    for tick in ticks:
        _, y = place(first, tick)
        parts.append(svg_element("line", name="grid", x1=left, x2=width - right, y1=y, y2=y))
        parts.append(svg_text(left - 6, y + 4, f"{tick:.3g}".replace("-", "\N{MINUS SIGN}"), "end"))
    points = [place(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    if len(points) > 1:
        parts.append(svg_element("polyline", name="curve", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points)))
    if len(points) <= 40:
        parts += [svg_element("circle", name="dot", cx=x, cy=y, r=2.5) for x, y in points]
    parts.append(svg_text(left, height - 5, f"step {first:.0f}", "start"))
    if last > first:
        parts.append(svg_text(width - right, height - 5, f"{last:.0f}", "end"))
    return svg_picture(width, height, label, parts)


def before_after(before: float, after: float, label: str) -> Markup:
    """Two numbers in 0..1 as a dot that moved."""
    width, height, y = 120, 16, 8

    def place(value: float) -> float:
        return 6 + max(0.0, min(1.0, value)) * (width - 12)

    better = "up" if after >= before else "down"
    parts = [
        svg_element("line", name="axis", x1=6, x2=width - 6, y1=y, y2=y),
        svg_element("line", name=f"move {better}", x1=place(before), x2=place(after), y1=y, y2=y),
        svg_element("circle", name="before", cx=place(before), cy=y, r=4),
        svg_element("circle", name=f"after {better}", cx=place(after), cy=y, r=5),
    ]
    return svg_picture(width, height, label, parts, natural=True)


def _signed(value: float) -> str:
    """Two digits with a sign and without the leading zero: +.42; 1 stays 1."""
    return "1" if value > 0.995 else f"{value:+.2f}".replace("0.", ".").replace("-", "\N{MINUS SIGN}")


def _diverging(value: float) -> str:
    # Steeper near 0, where the cosines of real gradients lie.
    share = 100 * min(1.0, abs(value)) ** 0.7
    return f"color-mix(in oklab, var(--{'agree' if value >= 0 else 'conflict'}) {share:.0f}%, var(--neutral))"


def round_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers whose first and last enclose the range."""
    if high - low < 1e-12:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if raw <= magnitude * factor * 1.0000001)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def svg_element(tag: str, content: str = "", name: str = "", **attributes: float | str) -> Markup:
    """An SVG element with escaped attributes; the content of a shape is its tooltip."""
    if name:
        attributes = {"class": name, **attributes}
    written = Markup("").join(
        Markup(' {}="{}"').format(key.replace("_", "-"), f"{value:.6g}" if isinstance(value, float) else value)
        for key, value in attributes.items()
    )
    inner = Markup("<title>{}</title>").format(content) if content and tag != "text" else escape(content)
    return Markup("<{}{}>{}</{}>").format(Markup(tag), written, inner, Markup(tag))


def svg_text(x: float, y: float, text: str, anchor: str, name: str = "label") -> Markup:
    return svg_element("text", text, name, x=x, y=y, text_anchor=anchor)


def svg_picture(width: float, height: float, label: str, parts: Sequence[Markup], natural: bool = False) -> Markup:
    """`natural` pictures keep their size and scroll; others take the width they are given."""
    size = Markup(' width="{}" height="{}"').format(round(width), round(height)) if natural else Markup()
    return Markup('<svg viewBox="0 0 {} {}"{} role="img" aria-label="{}">{}</svg>').format(
        round(width), round(height), size, escape(label), Markup("").join(parts)
    )
