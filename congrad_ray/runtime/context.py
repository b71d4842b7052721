"""What a stage's function is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.rundir.directory import RunDirectory, StageFolder
from congrad_ray.runtime.metrics import Meter
from congrad_ray.runtime.notices import Notify, notify_of


@dataclass(frozen=True)
class Context:
    """All that a stage's function needs to know."""

    recipe: Recipe
    profile: Profile
    run: RunDirectory
    iteration: int
    output: StageFolder
    meter: Meter = field(default_factory=Meter)
    progressed: Callable[[], None] = lambda: None
    """To be called whenever something has come of the work; a stage where nothing does for long is stopped."""

    def notify(self) -> Notify:
        """For this stage's workers: what they say is logged while the stage follows them."""
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
