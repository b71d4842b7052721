"""What every stage is made of: its name, its inputs, its part of the recipe, and the function that does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from congrad_ray.logs import Log
from congrad_ray.metrics import Meter
from congrad_ray.profile import Profile
from congrad_ray.recipe import Recipe
from congrad_ray.rundir import RunDirectory, StageFolder
from congrad_ray.stages.notices import Notify, notify_of


@dataclass(frozen=True)
class Context:
    """All that a stage's function needs to know."""

    recipe: Recipe
    profile: Profile
    run: RunDirectory
    iteration: int
    output: StageFolder
    log: Log = print
    meter: Meter = field(default_factory=Meter)
    progressed: Callable[[], None] = lambda: None
    """To be called whenever something has come of the work; a stage where nothing does for long is stopped."""

    def notify(self) -> Notify:
        """For this stage's workers: what they say comes to `log` while the stage follows them."""
        return notify_of(self.output.path)

    def input(self, folder: str, iteration: int | None = None) -> StageFolder:
        """The folder of a stage of this iteration (or of `iteration`)."""
        return self.run.stage(folder, self.iteration if iteration is None else iteration)

    @property
    def prompts(self) -> StageFolder:
        return self.run.stage("prompts", None)


@dataclass(frozen=True)
class Outcome:
    """What a stage reports when it is done: rows written, and counters for its manifest and the screen."""

    rows: int
    counters: dict[str, Any] = field(default_factory=dict)


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
