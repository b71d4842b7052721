"""Memory of one replica, by part, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from congrad_ray.config.profile import Profile
from congrad_ray.planning.assumptions import Assumptions

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}  # of a number, by model.dtype


@dataclass(frozen=True)
class Memory:
    """What one replica needs on its devices together. `peak` is not the sum of the parts where they take turns."""

    parts: dict[str, float]  # bytes
    peak: float  # bytes
    note: str = ""


def process_bytes(profile: Profile, assumptions: Assumptions, devices: int) -> float:
    """What a process takes before it holds a tensor, on all its `devices`."""
    gib = assumptions.process_gib if profile.device == "cpu" else assumptions.device_overhead_gib * devices
    return gib * GIB
