"""The shapes of a recipe's models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from congrad_ray.config.recipe import Recipe
from congrad_ray.modeling.source import check_models

if TYPE_CHECKING:
    from congrad_ray.modeling.shape import ModelShape


@dataclass(frozen=True)
class Shapes:
    """The models of a recipe: most recipes have one that is all three."""

    policy: ModelShape
    judge: ModelShape
    evaluation_judge: ModelShape


def read_shapes(recipe: Recipe) -> Shapes:
    """The shapes of a recipe's models. Raises ModelError as `check_models` and `read_shape` do."""
    from congrad_ray.modeling.shape import read_shape

    check_models(recipe)
    policy = read_shape(recipe.model.name, recipe.model)
    found = {recipe.model.name: policy, "policy": policy, "start": policy}
    other = recipe.model.model_copy(update={"revision": None})
    for name in (recipe.judge.model, recipe.evaluate.judge):
        if name not in found:
            found[name] = read_shape(name, other)
    return Shapes(policy, found[recipe.judge.model], found[recipe.evaluate.judge])
