"""Per-pair preference gradients, sketched layer by layer during one backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from congrad_ray.gradient.countsketch import CountSketch
from congrad_ray.gradient.layers import UnsupportedLayers, target_layers
from congrad_ray.preference.batching import PairBatch
from congrad_ray.preference.logprobs import completion_logprobs

# Entries of the per-pair gradients of one layer that are alive at a time, but at least one pair's. Sketching
# makes about three more copies, so this is roughly 512 MiB.
_GRADIENT_ENTRIES = 2**25


@dataclass(frozen=True)
class SketchResult:
    """What `PairGradientSketcher.sketch` finds for B pairs; everything float32 on the model's device."""

    sketches: Tensor  # (B, width), count-sketch of u = grad log p(chosen) - grad log p(rejected)
    norms: Tensor  # (B,), |u| itself, over the targeted layers
    chosen_logps: Tensor  # (B,), sum over completion tokens
    rejected_logps: Tensor  # (B,)


class PairGradientSketcher:
    """Count-sketches of u = grad log p(chosen) - grad log p(rejected), one row a pair.

    The gradient of every DPO-type loss is -c * u with a scalar c > 0 (`preference.loss.pair_coefficient`). u
    runs over the weights of the targeted layers (`gradient.layers.target_layers`), each as (out, in).

    For a micro-batch there is one forward and one backward, with +1 as the gradient of each chosen
    log-probability and -1 of each rejected one. A linear layer with inputs a and output gradients d (both
    (rows, tokens, features)) adds d^T a of a pair's two rows to u. That product is formed for one layer when
    the backward reaches it, sketched and freed; no weight gradient and no whole u exists. Sums are float32
    whatever the model's dtype.

    While open, the model is frozen and in eval mode (dropout would change u); `close()`, or leaving the
    `with` block, puts both back. Raises `UnsupportedLayers` (see `target_layers`) on creation.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        width: int,
        seed: int,
        layers: str | None = None,
        chunk_tokens: int = 1024,
        cache_bytes: int = 2**30,
    ) -> None:
        self.model = model
        self.count_sketch = CountSketch(width, seed, cache_bytes)
        self.layers = target_layers(model, layers)
        self.chunk_tokens = chunk_tokens
        self._sketches: Tensor | None = None
        self._squared_norms: Tensor | None = None
        self._pairs = 0
        self._seen: set[str] = set()
        self._trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._training = [module for module in model.modules() if module.training]
        model.requires_grad_(False)
        model.eval()
        # With every parameter frozen, the backward needs something below the first layer that requires a
        # gradient.
        self._handles: list[RemovableHandle] = [
            model.get_input_embeddings().register_forward_hook(_require_gradient)
        ]
        for name, module in self.layers.items():
            self._handles.append(module.register_forward_hook(self._forward_hook(name)))

    def __enter__(self) -> PairGradientSketcher:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks and give the model back as it was: trainable parameters and training modes."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        for module in self._training:
            module.training = True
        self._handles, self._trainable, self._training = [], [], []

    def uncovered_parameters(self) -> list[str]:
        """Names of the parameters that u leaves out: embeddings, norms, biases, layers not targeted."""
        covered = {f"{name}.weight" for name in self.layers}
        return [name for name, _ in self.model.named_parameters() if name not in covered]

    def sketch(self, batch: PairBatch) -> SketchResult:
        """Sketch the B pairs of `batch`, which must be on the model's device.

        A pair's result does not depend on the other pairs of its batch, beyond rounding. Raises
        `UnsupportedLayers` if a targeted layer takes no part in the forward or is used twice in it, sees
        inputs that are not (rows, tokens, features), or does not depend on the input embeddings; ValueError
        after `close()`.
        """
        if not self._handles:
            raise ValueError("this sketcher is closed; make a new one")
        pairs = batch.pairs
        device = batch.input_ids.device
        self._pairs = pairs
        self._seen = set()
        self._sketches = torch.zeros((pairs, self.count_sketch.width), dtype=torch.float32, device=device)
        self._squared_norms = torch.zeros(pairs, dtype=torch.float32, device=device)
        try:
            with torch.enable_grad():
                logps = completion_logprobs(self.model, batch, self.chunk_tokens)
                signs = torch.ones_like(logps)
                signs[pairs:] = -1.0
                torch.autograd.backward(logps, signs)
            missing = self.layers.keys() - self._seen
            if missing:
                raise UnsupportedLayers(
                    f"layers {sorted(missing)[:5]} took no part in the forward; leave them out by `layers`"
                )
            logps = logps.detach()
            return SketchResult(self._sketches, self._squared_norms.sqrt(), logps[:pairs], logps[pairs:])
        finally:
            self._sketches = self._squared_norms = None

    def _forward_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self._sketches is None:
                return  # someone else's forward on the same model
            activations = inputs[0].detach()
            if activations.dim() != 3 or activations.shape[0] != 2 * self._pairs:
                raise UnsupportedLayers(
                    f"layer {name!r} sees inputs of shape {tuple(activations.shape)}, not "
                    f"({2 * self._pairs}, tokens, features), so its tokens cannot be told apart by pair; "
                    "leave it out by `layers`"
                )
            if name in self._seen:
                raise UnsupportedLayers(
                    f"layer {name!r} is used more than once in a forward pass; leave it out by `layers`"
                )
            if not output.requires_grad:
                raise UnsupportedLayers(
                    f"layer {name!r} does not depend on the input embeddings; leave it out by `layers`"
                )
            self._seen.add(name)
            output.register_hook(lambda gradient: self._consume(name, activations, gradient))

        return hook

    @torch.no_grad()
    def _consume(self, name: str, activations: Tensor, output_gradients: Tensor) -> None:
        assert self._sketches is not None and self._squared_norms is not None
        inputs, outputs = activations.shape[-1], output_gradients.shape[-1]
        chosen, rejected = output_gradients.split(self._pairs)
        step = max(1, _GRADIENT_ENTRIES // (inputs * outputs))
        for start in range(0, self._pairs, step):
            part = slice(start, min(start + step, self._pairs))
            # The tokens of a pair's chosen and rejected row, one after the other: (pairs, 2T, features).
            a = torch.cat([activations[: self._pairs][part], activations[self._pairs :][part]], dim=1).float()
            d = torch.cat([chosen[part], rejected[part]], dim=1).float()
            gradient = torch.bmm(d.transpose(1, 2), a)
            self._squared_norms[part] += gradient.square().sum(dim=(1, 2))
            self.count_sketch.add_(self._sketches[part], name, gradient)


def _require_gradient(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    # A copy, because some models change the embeddings in place, which autograd forbids on a leaf.
    return output.detach().requires_grad_(True).clone()
