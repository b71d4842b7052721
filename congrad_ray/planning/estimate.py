"""What a stage says of itself for a plan: an `Estimate`, made of pure functions of what is `Planned`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import SettingsType
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.memory import Memory
from congrad_ray.planning.shapes import Shapes
from congrad_ray.planning.volume import Lengths, Volume
from congrad_ray.rundir.directory import Manifest

if TYPE_CHECKING:
    from congrad_ray.modeling.shape import ModelShape


@dataclass(frozen=True)
class Planned:
    """Everything that an estimate may depend on."""

    recipe: Recipe
    profile: Profile
    shapes: Shapes
    lengths: Lengths
    assumptions: Assumptions


@dataclass(frozen=True)
class Change:
    """Settings changed together to make a stage fit, and how a person would change them."""

    recipe: Recipe
    profile: Profile
    text: str


@dataclass(frozen=True)
class Replicas:
    """A stage's work by replicas of a model.

    `memory(planned, available)`: of one replica; `available` bytes may decide how large its micro-batches are.
    `flops(planned, volume)`: those on prompts or in forward and backward, and those on generated tokens.
    `mfu(assumptions)`: the share of the peak FLOP/s that each of the two reaches. `start_s`: seconds until a
    replica works. `changes`: settings worth trying where one does not fit, in the order of what they cost; the
    later ones keep what the earlier ones changed. `sequences(planned, memory, available, tokens)`: how many
    sequences of that many tokens the KV cache of an engine holds. `min_replicas`: fewer cannot do the work.
    `asks(recipe, iteration)`: the models whose engines it asks, in order; None stands for replicas of its own.
    """

    model: Callable[[Shapes], ModelShape]
    memory: Callable[[Planned, float | None], Memory]
    flops: Callable[[Planned, Volume], tuple[float, float]]
    mfu: Callable[[Assumptions], tuple[float, float]]
    start_s: Callable[[Assumptions], float]
    changes: Callable[[Recipe, Profile], Iterator[Change]]
    sequences: Callable[[Planned, Memory, float, float], int] | None = None
    min_replicas: Callable[[Profile], int] = lambda profile: 1
    asks: Callable[[Recipe, int], Sequence[str | None]] = lambda recipe, iteration: [None]


@dataclass(frozen=True)
class Served:
    """What servers elsewhere take for a stage's requests: seconds at least, and US dollars; None: no price."""

    seconds: float = 0.0
    dollars: float | None = 0.0


@dataclass(frozen=True)
class Estimate:
    """`volume(planned, iteration)`; `stored(planned, volume)`: bytes left on disk by one iteration.

    `temporary(planned, volume)`: bytes on disk only while the stage runs. `measured(recipe, manifest, finished)`:
    fields of `Lengths` that the stage's manifest knows; `finished` are the manifests of the stages before it, by
    folder. `served(planned, iteration)`: what is asked of servers. `note(recipe)`: what of it cannot be estimated,
    for the person who reads the plan.
    """

    volume: Callable[[Planned, int], Volume]
    stored: Callable[[Planned, Volume], float]
    temporary: Callable[[Planned, Volume], float] = lambda planned, volume: 0.0
    measured: Callable[[Recipe, Manifest, Mapping[str, Manifest]], Mapping[str, float]] = (
        lambda recipe, manifest, finished: {}
    )
    replicas: Replicas | None = None
    served: Callable[[Planned, int], Served] = lambda planned, iteration: Served()
    note: Callable[[Recipe], str | None] = lambda recipe: None


def with_changed(settings: SettingsType, section: str, **values: object) -> SettingsType:
    """A recipe or profile with other values in one of its sections."""
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})
