"""Sketches in fewer bytes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_storage(sketches: Tensor, dtype: str) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """Sketches (B, width) float32 in a NumPy dtype to store, and the scale (B,) to multiply each row by.

    float32 has scale 1. The others are scaled row by row to their range: int8 by the largest number, which goes to
    +-127, and float16, whose range gradients can leave on either side, so that it goes to +-1024. Numbers are
    rounded to the nearest. The entries of a sketch are alike in size, so of a sketch of int8 the rounding changes
    inner products about a hundred times less than sketching itself does. Raises ValueError for another dtype.
    """
    if dtype == "float32":
        return sketches.cpu().numpy(), np.ones(len(sketches), np.float32)
    if dtype not in ("int8", "float16"):
        raise ValueError(f"cannot store sketches as {dtype!r}; choose int8, float16 or float32")
    largest = sketches.abs().amax(dim=1)
    scale = largest / (127.0 if dtype == "int8" else 1024.0)
    scaled = sketches / torch.where(scale > 0, scale, 1.0)[:, None]
    stored = scaled.round().to(torch.int8) if dtype == "int8" else scaled.half()
    return stored.cpu().numpy(), scale.cpu().numpy()
