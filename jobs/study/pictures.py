"""Small SVG pictures that take their colours from the page's CSS, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape


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
