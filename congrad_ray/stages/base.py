"""What every stage is made of: its name, its inputs, its part of the recipe, and the function that does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from congrad_ray.config.recipe import Recipe
from congrad_ray.runtime.context import Context, Outcome


@dataclass(frozen=True)
class Stage:
    """A stage.

    `inputs(iteration)` names the folders read, as (folder, iteration or None); `settings(recipe, iteration)` is
    the part of the recipe that decides the output; `run(context)` does the work. A stage that `uses_ray` is
    called on a connected Ray. One that is to run `always` is cheap and done again each time. One that `chats` asks
    models by chat messages whatever its rows are.
    """

    name: str
    folder: str
    summary: str
    inputs: Callable[[int], Sequence[tuple[str, int | None]]]
    settings: Callable[[Recipe, int], Any]
    run: Callable[[Context], Outcome]
    each_iteration: bool = True
    uses_ray: bool = True
    always: bool = False
    chats: bool = False
