"""Floating-point operations of a forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from congrad_ray.modeling.shape import ModelShape


def forward_flops(shape: ModelShape, tokens: float, context: float, predicted: float) -> float:
    """A forward pass over `tokens`, each attending to `context` others on average, of which `predicted` go
    through the output embedding.

    2 per parameter and token, and 4 * layers * heads * head size per token and token attended to: the products
    with keys and with values (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Sliding windows are not taken
    off, and all experts of a mixture are counted.
    """
    attention = 4.0 * shape.layers * shape.attention_heads * shape.head_size * context
    return tokens * (2.0 * shape.body + attention) + predicted * 2.0 * shape.head
