"""Memory of one replica, by part, in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.training import Lora
from congrad_ray.planning.assumptions import Assumptions

if TYPE_CHECKING:
    from congrad_ray.modeling.shape import ModelShape

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}  # of a number, by model.dtype
# Bytes of a weight in nf4: 4 bits, and for 64 of them a scale of 8 bits (Dettmers et al. 2023, arXiv 2305.14314).
_NF4_BYTES = 0.5 + 1 / 64


@dataclass(frozen=True)
class Memory:
    """What one replica needs on its devices together. `peak` is not the sum of the parts where they take turns."""

    parts: dict[str, float]  # bytes
    peak: float  # bytes
    note: str = ""


def weight_bytes(shape: ModelShape, recipe: Recipe, lora: Lora | None) -> float:
    """Bytes of a model's own weights; those of its linear layers are in 4 bits where `lora` quantizes them."""
    width = BYTES[recipe.model.dtype]
    if lora is None or lora.quantization is None:
        return float(width * shape.parameters)
    linear = sum(out * into for out, into in shape.linear)
    return width * (shape.parameters - linear) + _NF4_BYTES * linear


def process_bytes(profile: Profile, assumptions: Assumptions, devices: int) -> float:
    """What a process takes before it holds a tensor, on all its `devices`."""
    gib = assumptions.process_gib if profile.device == "cpu" else assumptions.device_overhead_gib * devices
    return gib * GIB
