"""ConGrad on Ray: conflicting gradient filtering for multilingual preference alignment.

What a notebook needs is here, and is imported when it is first used: `import congrad_ray` alone loads neither
torch nor Ray. docs/how-to/python.md has examples.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from congrad_ray.config.loss import LossSettings as LossSettings
    from congrad_ray.config.recipe import Model as Model
    from congrad_ray.config.recipe import Select as Select
    from congrad_ray.config.recipe import load_recipe as load_recipe
    from congrad_ray.modeling.tokenization import load_tokenizer as load_tokenizer
    from congrad_ray.modeling.tokenization import tokenize_pair as tokenize_pair
    from congrad_ray.pipeline.public import filter_preferences as filter_preferences
    from congrad_ray.pipeline.public import run as run
    from congrad_ray.stages.select.selection import select_pairs as select_pairs
    from congrad_ray.stages.sketch.capture import GradientCapture as GradientCapture
    from congrad_ray.stages.sketch.countsketch import CountSketch as CountSketch
    from congrad_ray.stages.sketch.sketcher import sketch_pairs as sketch_pairs

__version__ = "0.1.0"

_MODULES = {
    "CountSketch": "stages.sketch.countsketch",
    "GradientCapture": "stages.sketch.capture",
    "LossSettings": "config.loss",
    "Model": "config.recipe",
    "Select": "config.recipe",
    "filter_preferences": "pipeline.public",
    "load_recipe": "config.recipe",
    "load_tokenizer": "modeling.tokenization",
    "run": "pipeline.public",
    "select_pairs": "stages.select.selection",
    "sketch_pairs": "stages.sketch.sketcher",
    "tokenize_pair": "modeling.tokenization",
}
__all__ = [
    "CountSketch",
    "GradientCapture",
    "LossSettings",
    "Model",
    "Select",
    "__version__",
    "filter_preferences",
    "load_recipe",
    "load_tokenizer",
    "run",
    "select_pairs",
    "sketch_pairs",
    "tokenize_pair",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
