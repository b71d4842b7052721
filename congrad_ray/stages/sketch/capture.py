"""Per-pair preference gradients, met layer by layer in one backward pass and never stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from congrad_ray.modeling.loss import DPO, ChosenRejected, LossSettings, gradient_seeds
from congrad_ray.modeling.packing import PairTokens, shared_prompt_tokens, two_sequence_tokens
from congrad_ray.modeling.shared_prompts import attention_over, completion_sums, why_not_shared
from congrad_ray.modeling.tokenization import TokenizedPair
from congrad_ray.stages.sketch.layers import UnsupportedLayers, base_causal_model, is_adapter, target_layers

# The attributes by which transformers checkpoints a layer. Its switch for the whole model does so in train mode
# only.
_CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
_CHECKPOINT = partial(checkpoint, use_reentrant=False)


class LayerVisitor(Protocol):
    """What becomes of each layer's part of the gradients."""

    def keep(self, name: str, inputs: Tensor) -> Tensor:
        """What to keep of a layer's inputs (N, in), from the forward to the backward: them, or less."""

    def visit(self, name: str, kept: Tensor, gradients: Tensor, starts: Sequence[int]) -> None:
        """Called once a layer, in the backward: `gradients` (N, out) are those of the layer's outputs.

        The pairs' gradients of the weight, as (out, in), are d^T a over their positions, from starts[b] to
        starts[b + 1].
        """


@dataclass(frozen=True)
class Captured:
    """What a pass over B pairs finds beside what the layers show; float32."""

    logps: Tensor  # (2B,), sums over completion tokens, chosen first
    coefficients: Tensor  # (B,), c of the loss where the reference is the policy


class GradientCapture:
    """Runs pairs forward and backward through a frozen model and shows each layer's part of their gradients.

    u of a pair runs over the weights of the targeted layers (`layers.target_layers`), each as (out, in). The
    gradient of `loss`, where the model is its own reference, is -c * u with a scalar c >= 0. For DPO
    u = grad log p(chosen) - grad log p(rejected); other losses take means over tokens, or weigh the two by
    seeds of their own (`modeling.loss.gradient_seeds`).

    A micro-batch takes one forward, whose log-probabilities make the seeds, and one backward from them: for DPO +1
    for chosen and -1 for rejected. Parameters are frozen, so no weight gradient is worked out: a layer's inputs a
    and output gradients d go to a `LayerVisitor`, and d^T a over a pair's positions is its part of u.

    Where the model allows it (`shared_prompts`), a pair's prompt is computed once for both completions.

    While open, the model is in eval mode (dropout would change u); `close()`, or leaving the `with` block, puts
    everything back. With `gradient_checkpointing` a decoder layer keeps only its input and is computed again in
    the backward. A PEFT model is taken as it is, its adapters being the targets.

    Raises `UnsupportedLayers` (see `target_layers`) on creation, and ValueError if layers are to be checkpointed
    that cannot be.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: str | None = None,
        loss: LossSettings = DPO,
        gradient_checkpointing: bool = False,
        pad_token_id: int = 0,
    ) -> None:
        self.model = base_causal_model(model)
        self.layers = target_layers(self.model, layers)
        self.loss = loss
        self._pad_token_id = pad_token_id
        self._visitor: LayerVisitor | None = None
        self._batch: PairTokens | None = None
        self._visited: set[str] = set()
        self._trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._training = {module: module.training for module in self.model.modules()}
        self._checkpointed: list[tuple[GradientCheckpointingLayer, dict[str, Any]]] = []
        self.model.requires_grad_(False)
        self.model.eval()
        # None, or why prompts are computed twice.
        self.why_not_shared = why_not_shared(self.model)
        if gradient_checkpointing:
            self._checkpoint_layers()
        # With every parameter frozen, the backward needs something below the first layer that requires a
        # gradient.
        self._handles: list[RemovableHandle] = [
            self.model.get_input_embeddings().register_forward_hook(_require_gradient)
        ]
        for name, module in self.layers.items():
            self._handles.append(module.register_forward_hook(self._forward_hook(name)))

    def __enter__(self) -> GradientCapture:
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
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        for module, training in self._training.items():
            module.training = training
        for layer, before in self._checkpointed:
            for name in _CHECKPOINTING:
                vars(layer).pop(name, None)
            vars(layer).update(before)

    def _checkpoint_layers(self) -> None:
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                before = {name: vars(module)[name] for name in _CHECKPOINTING if name in vars(module)}
                self._checkpointed.append((module, before))
                # What transformers asks before it checkpoints a layer; the layer's children stay in eval mode.
                module.training = True
                vars(module).update(zip(_CHECKPOINTING, (True, _CHECKPOINT), strict=True))
        if not self._checkpointed:
            raise ValueError(f"{type(self.model).__name__} has no layers that transformers can checkpoint")

    def uncovered_parameters(self) -> list[str]:
        """Names of the parameters that u leaves out: embeddings, norms, biases, layers not targeted."""
        covered = {f"{name}.weight" for name in self.layers}
        return [name for name, _ in self.model.named_parameters() if name not in covered]

    def layout(self, pairs: Sequence[TokenizedPair]) -> PairTokens:
        """The pairs as this model's input, on its device."""
        device = self.model.get_input_embeddings().get_parameter("weight").device
        if self.why_not_shared is None:
            return shared_prompt_tokens(pairs, device)
        return two_sequence_tokens(pairs, self._pad_token_id, device)

    def run(self, batch: PairTokens, visitor: LayerVisitor, times_coefficient: bool = False) -> Captured:
        """One forward and one backward, which shows `visitor` the pairs' u, or c * u with `times_coefficient`.

        A pair's part does not depend on the other pairs of its batch, beyond rounding. Raises
        `UnsupportedLayers` if a targeted layer takes no part in the forward or is used twice in it, sees inputs
        that are not (rows, columns, features), or does not depend on the input embeddings; ValueError after
        `close()`.
        """
        if not self._handles:
            raise ValueError("this GradientCapture is closed; make a new one")
        self._batch, self._visitor = batch, visitor
        self._visited = set()
        try:
            with torch.enable_grad(), attention_over(self.model, batch) as arguments:
                logps = completion_sums(self.model, batch, arguments)
                coefficients, seeds = self._seeds(batch, logps.detach())
                torch.autograd.backward(logps, seeds * coefficients.repeat(2) if times_coefficient else seeds)
        finally:
            self._batch = self._visitor = None
        missing = self.layers.keys() - self._visited
        if missing:
            raise UnsupportedLayers(
                f"layers {sorted(missing)[:5]} took no part in the forward pass; exclude them with `layers`"
            )
        return Captured(logps.detach(), coefficients)

    def _seeds(self, batch: PairTokens, logps: Tensor) -> tuple[Tensor, Tensor]:
        both = ChosenRejected(*logps.chunk(2))
        tokens = ChosenRejected(batch.chosen_tokens.to(logps.device), batch.rejected_tokens.to(logps.device))
        return gradient_seeds(both, both, self.loss, tokens)

    def _forward_hook(self, name: str) -> Any:
        of_adapter = is_adapter(name)

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            batch, visitor = self._batch, self._visitor
            if batch is None or visitor is None:
                return None  # someone else's forward on the same model
            if of_adapter and not inputs[0].requires_grad:
                return None  # DoRA multiplies A and B with the identity, for the lengths of the weights' rows
            if inputs[0].shape[:-1] != batch.input_ids.shape:
                raise UnsupportedLayers(
                    f"layer {name!r} sees inputs of shape {tuple(inputs[0].shape)}, not "
                    f"({', '.join(map(str, batch.input_ids.shape))}, features), so its tokens cannot be "
                    "assigned to pairs; exclude it with `layers`"
                )
            if not output.requires_grad:
                raise UnsupportedLayers(
                    f"layer {name!r} does not depend on the input embeddings; exclude it with `layers`"
                )
            with torch.no_grad():
                kept = visitor.keep(name, inputs[0].detach().flatten(0, 1))
            tapped: Tensor = _Tap.apply(output, kept, name, self)
            return tapped

        return hook

    @torch.no_grad()
    def _visit(self, name: str, kept: Tensor, gradients: Tensor) -> None:
        assert self._batch is not None and self._visitor is not None
        if name in self._visited:
            raise UnsupportedLayers(
                f"layer {name!r} is used more than once in a forward pass; exclude it with `layers`"
            )
        self._visited.add(name)
        self._visitor.visit(name, kept, gradients.flatten(0, 1), self._batch.starts)


class _Tap(torch.autograd.Function):
    """A layer's output as it is; its gradient is shown on the way back.

    What is kept of the inputs goes through save_for_backward, so that gradient checkpointing can drop it in the
    forward and make it anew in the backward.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, kept: Tensor, name: str, capture: GradientCapture) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.name, ctx.capture = name, capture
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.capture._visit(ctx.name, ctx.saved_tensors[0], gradient)
        return gradient, None, None, None


def pair_segments(starts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(b, the positions of pair b) for every pair."""
    for pair, (start, end) in enumerate(pairwise(starts)):
        yield pair, slice(start, end)


def _require_gradient(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    # A copy, because some models change the embeddings in place, which autograd forbids on a leaf.
    return output.detach().requires_grad_(True).clone()
