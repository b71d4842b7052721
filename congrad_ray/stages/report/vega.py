"""Vega-Lite by vl-convert: its JavaScript for a page without a network, and pictures without a browser."""

from __future__ import annotations

import importlib.metadata
import logging
import uuid

from congrad_ray.modeling.source import cache_directory
from congrad_ray.stages.report.charts import Spec

logger = logging.getLogger(__name__)

_SNIPPET = "window.vegaEmbed = vegaEmbed;"


def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that may stand in a <script> element.

    Made once on a machine, which takes seconds, and kept in $CONGRAD_RAY_CACHE or ~/.cache/congrad_ray.
    """
    import vl_convert

    kept = cache_directory() / f"vega-{importlib.metadata.version('vl-convert-python')}.js"
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    # Within a script element these would end it, or begin a comment.
    text = vl_convert.javascript_bundle(_SNIPPET).replace("</script", "<\\/script").replace("<!--", "<\\!--")
    temporary = kept.with_name(f"{kept.name}.{uuid.uuid4().hex}.writing")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(kept)
    except OSError as error:
        logger.info(f"the charts' script cannot be kept in {kept.parent}, so it is made each time: {error}")
    return text


def svg(spec: Spec) -> str:
    """The chart as an SVG picture. Raises ValueError for a specification that Vega-Lite cannot read."""
    import vl_convert

    text: str = vl_convert.vegalite_to_svg(spec)
    return text
