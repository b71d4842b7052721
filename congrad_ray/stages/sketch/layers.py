"""Which layers of a model a pair's gradient is taken over."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


class UnsupportedLayers(ValueError):
    """The model has weights, or uses layers in a way, from which per-pair gradients cannot be taken."""


_ADAPTERS = re.compile(r"\.lora_[AB]\.")


def is_adapter(name: str) -> bool:
    """Whether the module of this name is the A or B of a LoRA adapter."""
    return _ADAPTERS.search(name) is not None


def base_causal_model(model: nn.Module) -> PreTrainedModel:
    """The causal language model itself, where PEFT has wrapped it (its adapters stay in place)."""
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = model if unwrap is None else unwrap()
    assert isinstance(inner, PreTrainedModel)
    return inner


def target_layers(model: PreTrainedModel, layers: str | None = None) -> dict[str, nn.Module]:
    """The layers whose weights count as the model's parameters, by module name in the model's order.

    By default every `nn.Linear` and transformers `Conv1D` except the output embedding, which is never
    included: it is as large as the vocabulary, and often the input embedding too. Where the model has LoRA
    adapters, they alone: they are what training would change. An adapter whose B is zero, as it is at first, gives
    its A no gradient, and A is left out. `layers` is a regular expression (`re.search`) over module names that
    narrows this down.

    Raises `UnsupportedLayers` if nothing matches, and, when `layers` is None, if the model holds weights of
    three or more dimensions outside convolutions: mixture-of-experts layers with all experts in one tensor,
    which per-pair gradients would silently leave out.
    """
    head = model.get_output_embeddings()
    candidates: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    adapters = {name: module for name, module in candidates.items() if is_adapter(name)}
    if adapters:
        candidates = {name: module for name, module in adapters.items() if not _has_no_gradient(name, adapters)}
    pattern = re.compile(layers) if layers is not None else None
    chosen = {name: module for name, module in candidates.items() if pattern is None or pattern.search(name)}
    if not chosen:
        raise UnsupportedLayers(
            f"no layer of {type(model).__name__} matches {layers!r}; its linear layers are for example "
            f"{list(candidates)[:5]}"
            if candidates
            else f"{type(model).__name__} has no nn.Linear or Conv1D layers to take gradients of"
        )
    if pattern is None and not adapters:
        fused = _fused_expert_weights(model)
        if fused:
            raise UnsupportedLayers(
                f"{type(model).__name__} keeps the weights of several experts in one tensor "
                f"({', '.join(fused[:3])}{', ...' if len(fused) > 3 else ''}), which per-pair gradients do "
                "not cover; to leave the experts out knowingly, name the layers to use by a regular "
                "expression, for example layers='self_attn'"
            )
    return chosen


def _has_no_gradient(name: str, adapters: dict[str, nn.Module]) -> bool:
    """Whether this is the A of an adapter whose B is zero."""
    if ".lora_A." not in name:
        return False
    b = adapters[name.replace(".lora_A.", ".lora_B.")].get_parameter("weight")
    return b.device.type != "meta" and not bool(b.any())


def _fused_expert_weights(model: PreTrainedModel) -> list[str]:
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if not isinstance(module, convolutions)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 3
    ]


def weight_as_out_in(layer: nn.Module, weight: Tensor) -> Tensor:
    """`weight` (or its gradient) with shape (out, in): Conv1D keeps it the other way round."""
    return weight.T if isinstance(layer, Conv1D) else weight
