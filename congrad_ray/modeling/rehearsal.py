"""How much memory a micro-batch takes: the real code run on torch's meta device, where tensors have no numbers.

Every operation is seen as it is dispatched; the bytes of the storages alive at once, at their largest, are what a
device would need beside the model, whatever the architecture. Attention by
torch.nn.functional.scaled_dot_product_attention is taken for a fused kernel, which keeps its inputs, its output
and one number a query (Dao et al. 2022, arXiv 2205.14135); models that compute attention themselves (Gemma 2 with
soft-capping) keep what they keep.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from congrad_ray.modeling.shape import ModelShape

# A deeper model is rehearsed with this many layers and with twice as many; each further layer adds what those of
# the second half did, because all are alike. Even, for models whose layers alternate between two kinds.
_LAYERS = 2


def extrapolated(shape: ModelShape, peak: Callable[[PretrainedConfig], int]) -> int:
    """`peak` of the whole model, from two of few layers where it is deep."""
    if shape.layers <= 2 * _LAYERS:
        return peak(shape.config)
    few, more = peak(_with_layers(shape.config, _LAYERS)), peak(_with_layers(shape.config, 2 * _LAYERS))
    return more + (more - few) * (shape.layers - 2 * _LAYERS) // _LAYERS


def _with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    shorter = copy.deepcopy(config)
    text = shorter.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return shorter


def forget_gradient(parameter: Tensor) -> None:
    """A hook that frees a gradient as soon as it is whole."""
    parameter.grad = None


def peak_bytes(model: PreTrainedModel, work: Callable[[], object]) -> int:
    """The most bytes alive at once of what `work` makes beside the model."""
    storages = _Storages(tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers()))
    with _fused_attention(), storages:
        work()
    return storages.peak


class _Storages(TorchDispatchMode):
    """Counts the bytes that operations make on the meta device, for as long as something holds them."""

    def __init__(self, there_before: Iterable[torch.UntypedStorage]) -> None:
        super().__init__()
        self.peak = 0
        self._there_before = list(there_before)  # held, so that no other storage gets one of their addresses
        self._alive = {storage._cdata: 0 for storage in self._there_before}
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # what models ask of numbers is whether all rows are whole, without padding: they are
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type == "meta":
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self._bytes += storage.nbytes()
        self.peak = max(self.peak, self._bytes)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._bytes -= self._alive.pop(key)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Takes every call of scaled_dot_product_attention for a fused kernel's, in this process and for as long.

    A TorchFunctionMode would not see the calls of a checkpointed layer, which is computed again in the backward.
    """
    original = torch.nn.functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **named: Any) -> Any:
        return _KeepsInputsAndOutput.apply(query, key, value)

    torch.nn.functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


class _KeepsInputsAndOutput(torch.autograd.Function):
    """The shapes of attention, (..., T, size) each."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
