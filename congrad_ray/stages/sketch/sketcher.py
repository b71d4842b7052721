"""Count-sketches of the preference gradients of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from congrad_ray.modeling.packing import PairTokens
from congrad_ray.stages.sketch.capture import Captured, GradientCapture, pair_segments
from congrad_ray.stages.sketch.countsketch import CountSketch
from congrad_ray.stages.sketch.exact import GramVisitor

# Entries of folded gradients alive at a time on an accelerator, but at least one pair's. On a CPU it is one
# pair's, which may then stay in its cache.
_ENTRIES = 2**26


@dataclass(frozen=True)
class SketchResult:
    """What `sketch_pairs` finds for B pairs; everything float32 on the model's device."""

    sketches: Tensor  # (B, width), count-sketch of u; for DPO u = grad log p(chosen) - grad log p(rejected)
    norms: (
        Tensor  # (B,), |u| over the targeted layers: exact without folds, else from an unbiased estimate of |u|^2
    )
    chosen_logps: Tensor  # (B,), sum over completion tokens
    rejected_logps: Tensor  # (B,)
    coefficients: Tensor  # (B,), c >= 0: the gradient of the capture's loss is -c * u


def sketch_pairs(
    capture: GradientCapture, sketch: CountSketch, batch: PairTokens, compute_dtype: torch.dtype | None = None
) -> SketchResult:
    """Sketch the B pairs of `batch` (from `capture.layout`) by one forward and one backward pass.

    A layer's part of a pair's gradient is formed, folded (see `countsketch`), when the backward reaches
    the layer, added to the pair's sketch and forgotten. Its products are taken in `compute_dtype`, by default the
    model's, and summed in float32. The same batch gives the same bits; another batch with the same pair, the same
    sketch up to rounding. Raises as `GradientCapture.run` does.
    """
    visitor = _Sketching(sketch, batch.pairs, batch.input_ids.device, compute_dtype)
    return _result(sketch, visitor, capture.run(batch, visitor))


def audited_sketches(
    capture: GradientCapture, sketch: CountSketch, batch: PairTokens, compute_dtype: torch.dtype | None = None
) -> tuple[SketchResult, Tensor]:
    """What `sketch_pairs` gives, and the exact inner products (B, B) of the pairs' u, in the same two passes."""
    visitor = _AuditedSketching(sketch, batch, compute_dtype)
    captured = capture.run(batch, visitor)
    return _result(sketch, visitor, captured), visitor.exact.gram


def _result(sketch: CountSketch, visitor: _Sketching, captured: Captured) -> SketchResult:
    chosen, rejected = captured.logps.chunk(2)
    return SketchResult(
        sketch.sketches(visitor.table), visitor.squared_norms.sqrt(), chosen, rejected, captured.coefficients
    )


class _Sketching:
    """The `LayerVisitor` that folds, multiplies and sketches."""

    def __init__(
        self, sketch: CountSketch, pairs: int, device: torch.device, compute_dtype: torch.dtype | None
    ) -> None:
        self._sketch = sketch
        self._dtype = compute_dtype
        self.table = sketch.table(pairs, device)
        self.squared_norms = torch.zeros(pairs, dtype=torch.float32, device=device)

    def keep(self, name: str, inputs: Tensor) -> Tensor:
        # Folded inputs are the smaller thing to keep until the backward.
        return self._sketch.fold_inputs(name, inputs)

    def visit(self, name: str, kept: Tensor, gradients: Tensor, starts: Sequence[int]) -> None:
        outputs = self._sketch.fold_outputs(name, gradients)
        if self._dtype is not None:
            kept, outputs = kept.to(self._dtype), outputs.to(self._dtype)
        pairs = len(starts) - 1
        entries = kept.shape[1] * outputs.shape[1]
        at_a_time = 1 if kept.device.type == "cpu" else min(pairs, max(1, _ENTRIES // entries))
        products = torch.empty(
            (at_a_time, outputs.shape[1], kept.shape[1]), dtype=torch.float32, device=kept.device
        )
        for pair, segment in pair_segments(starts):
            place = pair % at_a_time
            _product(outputs[segment], kept[segment], products[place])
            if place == at_a_time - 1 or pair == pairs - 1:
                rows = slice(pair - place, pair + 1)
                # The layers of a model may lie on several devices, its table lies on one.
                found = products[: place + 1].to(self.table.device)
                self.squared_norms[rows] += torch.linalg.vector_norm(found.flatten(1), dim=1).square()
                self._sketch.add_(self.table[rows], name, found)


class _AuditedSketching(_Sketching):
    """The same, and the exact inner products beside it: whole inputs are kept for that."""

    def __init__(self, sketch: CountSketch, batch: PairTokens, compute_dtype: torch.dtype | None) -> None:
        super().__init__(sketch, batch.pairs, batch.input_ids.device, compute_dtype)
        self.exact = GramVisitor(batch)

    def keep(self, name: str, inputs: Tensor) -> Tensor:
        return self.exact.keep(name, inputs)

    def visit(self, name: str, kept: Tensor, gradients: Tensor, starts: Sequence[int]) -> None:
        self.exact.visit(name, kept, gradients, starts)
        super().visit(name, super().keep(name, kept), gradients, starts)


def _product(d: Tensor, a: Tensor, out: Tensor) -> None:
    """out = d^T a, (out, in) float32, of d (tokens, out) and a (tokens, in) in any dtype."""
    if d.dtype == torch.float32:
        torch.mm(d.T, a, out=out)
    elif d.device.type == "cuda":
        torch.mm(d.T, a, out_dtype=torch.float32, out=out)
    else:  # summed in float32 inside, and rounded once
        out.copy_(torch.mm(d.T, a))
