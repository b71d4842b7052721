"""How much memory a micro-batch takes: the real code run on torch's meta device, where tensors have no numbers.

Every operation is seen as it is dispatched; the bytes of the storages alive at once, at their largest, are what a
device would need beside the model, whatever the architecture. Attention by
torch.nn.functional.scaled_dot_product_attention is taken for a fused kernel, which keeps its inputs, its output
and one number a query (Dao et al. 2022, arXiv 2205.14135); models that compute attention themselves (Gemma 2 with
soft-capping) keep what they keep.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from congrad_ray.config.recipe import Recipe
from congrad_ray.modeling.logprobs import summed_logprobs
from congrad_ray.modeling.shape import ModelShape, meta_model
from congrad_ray.modeling.tokenization import TokenizedPair
from congrad_ray.stages.sketch.capture import GradientCapture
from congrad_ray.stages.sketch.countsketch import CountSketch, FoldRule
from congrad_ray.stages.sketch.sketcher import sketch_pairs

# A deeper model is rehearsed with this many layers and with twice as many; each further layer adds what those of
# the second half did, because all are alike. Even, for models whose layers alternate between two kinds.
_LAYERS = 2


def sketch_working_bytes(shape: ModelShape, recipe: Recipe, pairs: int) -> int:
    """Bytes beside the weights, at their peak, for a micro-batch of pairs with rows of model.max_length."""
    settings, length = recipe.sketch, recipe.model.max_length
    fold = FoldRule(None if settings.fold == "auto" else settings.fold, settings.min_side)

    def peak(config: PretrainedConfig) -> int:
        model = meta_model(config, recipe.model.dtype)
        sketch = CountSketch(settings.width, settings.seed, fold)
        with GradientCapture(
            model, settings.layers, settings.average_log_prob, settings.gradient_checkpointing
        ) as capture:
            ids = [0] * (length - 1)
            batch = capture.layout([TokenizedPair([0], ids, ids)] * pairs)
            return _peak_bytes(model, lambda: sketch_pairs(capture, sketch, batch))

    return _extrapolated(shape, peak)


def training_working_bytes(shape: ModelShape, recipe: Recipe, pairs: int) -> int:
    """Bytes beside weights, gradients and optimiser, at their peak, for a micro-batch of such pairs.

    A weight's gradient is freed when it is whole, as DeepSpeed does that moves it to where it gathers gradients.
    """
    rows, length = 2 * pairs, recipe.model.max_length

    def peak(config: PretrainedConfig) -> int:
        model = meta_model(config, recipe.model.dtype).train()
        if recipe.train.gradient_checkpointing:
            with warnings.catch_warnings():  # of a new name for this, which training itself reports
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_forget_gradient)
        ids = torch.zeros((rows, length), dtype=torch.int64, device="meta")

        def step() -> None:
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            of_row = torch.zeros(rows * (length - 1), dtype=torch.int64, device="meta")
            logps = summed_logprobs(model, states[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), of_row, rows)
            logps.sum().backward()

        return _peak_bytes(model, step)

    return _extrapolated(shape, peak)


def _extrapolated(shape: ModelShape, peak: Callable[[PretrainedConfig], int]) -> int:
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


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _peak_bytes(model: PreTrainedModel, work: Callable[[], object]) -> int:
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
