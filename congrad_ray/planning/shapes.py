"""The shapes of a recipe's models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from congrad_ray.config.recipe import Recipe
from congrad_ray.modeling.source import check_models

if TYPE_CHECKING:
    from congrad_ray.modeling.shape import ModelShape


@dataclass(frozen=True)
class Shapes:
    """The models of a recipe: most recipes have one that is all three.

    `judge`: the largest of `judges`, those that run here by the recipe's name; the policy where none does.
    """

    policy: ModelShape
    judge: ModelShape
    evaluation_judge: ModelShape
    judges: Mapping[str, ModelShape] = field(default_factory=dict)


def read_shapes(recipe: Recipe) -> Shapes:
    """The shapes of a recipe's models. Raises ModelError as `check_models` and `read_shape` do."""
    from congrad_ray.modeling.shape import read_shape

    check_models(recipe)
    policy = read_shape(recipe.model.name, recipe.model)
    found = {recipe.model.name: policy, "policy": policy, "start": policy}
    other = recipe.model.model_copy(update={"revision": None})
    here = dict.fromkeys(judge.model for judge in recipe.judge.judges.values() if judge.endpoint is None)
    for name in (*here, recipe.evaluate.judge):
        if name not in found:
            found[name] = read_shape(name, other)
    judges = {name: found[name] for name in here}
    largest = max(judges.values(), key=lambda shape: shape.parameters, default=policy)
    return Shapes(policy, largest, found[recipe.evaluate.judge], judges)
