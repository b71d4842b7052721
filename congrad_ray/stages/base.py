"""What every stage is made of: its name, its inputs, its part of the recipe, and the function that does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.planning.estimate import Estimate
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.resources import Demand


@dataclass(frozen=True)
class Stage:
    """A stage.

    `inputs(iteration)` names the folders read, as (folder, iteration or None); `settings(recipe, iteration)` is
    the part of the recipe that decides the output; `run(context)` does the work; `demand(recipe, profile)` is what
    it asks of a cluster; `schema(recipe)` is of its table; `estimate` is for the plan. A stage that `uses_ray` is
    called on a connected Ray. One that is to run `always` is cheap and done again each time. One that `chats` asks
    models by chat messages whatever its rows are.
    """

    name: str
    folder: str
    summary: str
    inputs: Callable[[int], Sequence[tuple[str, int | None]]]
    settings: Callable[[Recipe, int], Any]
    run: Callable[[Context], Outcome]
    demand: Callable[[Recipe, Profile], Demand]
    schema: Callable[[Recipe], pa.Schema] | None = None
    estimate: Estimate | None = None
    each_iteration: bool = True
    uses_ray: bool = True
    always: bool = False
    chats: bool = False
