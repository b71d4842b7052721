"""What every stage is made of: its name, its inputs, its part of the recipe, and the function that does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.planning.estimate import Estimate
from congrad_ray.rundir.directory import RunDirectory, StageFolder
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.resources import Demand
from congrad_ray.stages.view import Figures, Step


@dataclass(frozen=True)
class Stage:
    """A stage, and all that the rest of the program knows of it.

    What it does: `inputs(iteration)` names the folders read, as (folder, iteration or None); `settings(recipe,
    iteration)` is the part of the recipe that decides the output; `run(context)` does the work. A stage that
    `uses_ray` is called on a connected Ray. One that is to run `always` is cheap and done again each time. One
    that `chats` asks models by chat messages whatever its rows are. In the folders `parts` of its own ("": itself)
    one on Ray leaves a part for every batch: these are merged before it is committed. A run does it where it is
    `wanted(recipe)`; `check(recipe)` is called before the first stage of a run that does it, and raises a
    ValueError for settings that could not be used hours later.

    What is said of it: `demand(recipe, profile)` is what it asks of a cluster; `schema(recipe)` is of its table;
    `estimate` is for the plan, where it has one; `figures(folder)` are tables for the screen, and `step` is a
    column of the report; `summary` and `example`, a setting of the recipe, are for the help.
    """

    name: str
    folder: str
    summary: str
    inputs: Callable[[int], Sequence[tuple[str, int | None]]]
    settings: Callable[[Recipe, int], Any]
    run: Callable[[Context], Outcome]
    demand: Callable[[Recipe, Profile], Demand]
    each_iteration: bool = True
    uses_ray: bool = True
    always: bool = False
    chats: bool = False
    parts: Sequence[str] = ()
    wanted: Callable[[Recipe], bool] = lambda recipe: True
    check: Callable[[Recipe], None] = lambda recipe: None
    schema: Callable[[Recipe], pa.Schema] | None = None
    estimate: Estimate | None = None
    figures: Callable[[StageFolder], Sequence[Figures]] = lambda folder: ()
    step: Step | None = None
    example: str = ""
    older_inputs: Callable[[int], Sequence[tuple[str, int | None]]] | None = None
    """The `inputs` of older versions: what they finished of these is finished."""
    adopted: Callable[[Recipe, RunDirectory], pa.Table | None] = lambda recipe, run: None
    """The rows of this stage where an older version has them, in another stage's folder: they are taken over."""
