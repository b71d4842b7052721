"""Running a causal language model over pairs whose two completions share one copy of the prompt.

Everything in a transformer but attention works on each token by itself, so a prompt's tokens need computing only
once. Attention is the model's own, called on the two sequences prompt + chosen and prompt + rejected: queries,
keys and values of the shared tokens are copied into the rows where they belong, and the outputs gathered back.
The result is that of the two-sequence form, up to rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from congrad_ray.modeling.logprobs import summed_logprobs
from congrad_ray.modeling.packing import (
    AttentionRows,
    PairTokens,
    shared_prompt_tokens,
    two_sequence_tokens,
)
from congrad_ray.modeling.tokenization import TokenizedPair

_NAME = "congrad_shared_prompts"


@contextmanager
def attention_over(model: PreTrainedModel, batch: PairTokens) -> Iterator[dict[str, Any]]:
    """Makes the model attend over the rows of `batch.attention`; yields arguments for the model's forward.

    Keep it open until the backward is done: with gradient checkpointing the forward runs again there.
    """
    if batch.attention is None:
        yield {}
        return
    configs = {
        id(config): config
        for module in model.modules()
        if isinstance(config := getattr(module, "config", None), PretrainedConfig)
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    names = {name for name in before.values() if name is not None}
    if len(names) != 1:
        raise ValueError(f"the model uses several attention implementations: {sorted(names)}")
    try:
        for config in configs.values():
            config._attn_implementation = _NAME
        yield {"congrad_rows": batch.attention, "congrad_original": names.pop()}
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def hidden_states(model: PreTrainedModel, batch: PairTokens, arguments: dict[str, Any]) -> Tensor:
    """Last hidden states of the model's body, (N, hidden): one for every flattened position of `batch`.

    `arguments` are those of the surrounding `attention_over`.
    """
    if batch.attention is None:
        # No position ids: they are those that the model works out itself.
        output = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    else:
        output = model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **arguments
        )
    states: Tensor = output.last_hidden_state
    return states.flatten(0, 1)


def completion_sums(model: PreTrainedModel, batch: PairTokens, arguments: dict[str, Any]) -> Tensor:
    """Summed log-probabilities of the completions, (2B,) float32, chosen first; within `attention_over`."""
    states = hidden_states(model, batch, arguments)
    where, targets, completions = (
        tensor.to(states.device) for tensor in (batch.states, batch.targets, batch.completions)
    )
    return summed_logprobs(model, states[where], targets, completions, 2 * batch.pairs)


def why_not_shared(
    model: PreTrainedModel, states: Callable[[PairTokens, dict[str, Any]], Tensor] | None = None
) -> str | None:
    """Why this model cannot compute a prompt once for two completions, or None if it can.

    Looks at the configuration and compares both forms on a few tokens; costs one small forward of each. The
    model must be in eval mode. `states` gives its hidden states, as `hidden_states` does, where it has to be
    called through something that wraps it.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    others = kinds - {"full_attention", "sliding_attention"}
    if others:
        return f"it has layers of type {', '.join(sorted(others))}"
    pairs = [TokenizedPair([3, 4, 5], [6, 7, 8, 9], [10, 11]), TokenizedPair([7, 3], [8], [5, 6, 4])]
    device = model.get_input_embeddings().get_parameter("weight").device
    if device.type == "meta":
        return None  # `congrad plan` asks for shapes: there are no numbers to compare
    found = []
    try:
        for batch in (shared_prompt_tokens(pairs, device), two_sequence_tokens(pairs, 0, device)):
            with torch.no_grad(), attention_over(model, batch) as arguments:
                of_all = hidden_states(model, batch, arguments) if states is None else states(batch, arguments)
                found.append(of_all[batch.states].float())
    except Exception as error:  # whatever a model's code does with arguments that it does not know
        return f"{type(error).__name__}: {str(error)[:200]}"
    difference = float((found[0] - found[1]).norm() / found[1].norm())
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    if not difference < tolerance:
        return f"its hidden states differ by {difference:.1g} from those of two separate sequences"
    return None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    congrad_rows: AttentionRows,
    congrad_original: str,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """The attention that transformers calls: (1, heads, N, size) in, (1, N, heads, size) out."""
    rows = congrad_rows.to(query.device)
    original = _function(module, congrad_original)
    unpacked = [_spread(states, rows) for states in (query, key, value)]
    outputs = []
    start = 0
    for count, width in rows.shapes:
        part = slice(start, start + count * width)
        states = [tensor[part].unflatten(0, (count, width)).transpose(1, 2) for tensor in unpacked]
        mask = _mask(width, arguments.get("sliding_window"), congrad_original, query)
        output = original(module, *states, mask, **arguments)[0]  # (count, width, heads, size)
        outputs.append(output.flatten(0, 1))
        start = part.stop
    gathered: Tensor = _Gather.apply(torch.cat(outputs).flatten(1), rows)
    return gathered.view(1, query.shape[2], *outputs[0].shape[1:]), None


AttentionInterface.register(_NAME, _attention)


def _function(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Any]]:
    if name != "eager":
        function: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS[name]
        return function
    eager: Callable[..., tuple[Tensor, Any]] = sys.modules[type(module).__module__].eager_attention_forward
    return eager


def _mask(width: int, window: int | None, implementation: str, like: Tensor) -> Tensor | None:
    """The mask of one group: rows are padded at their ends, where causal attention does not look."""
    window = min(window or width, width)
    windowed = window < width
    if implementation != "eager" and (not windowed or implementation.startswith("flash")):
        return None  # causal by itself
    position = torch.arange(width, device=like.device)
    distance = position[:, None] - position[None, :]
    seen = distance >= 0
    if windowed:
        seen &= distance < window
    if implementation != "eager":
        return seen[None, None]
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, torch.finfo(like.dtype).min)[None, None]


def _spread(states: Tensor, rows: AttentionRows) -> Tensor:
    """(1, heads, N, size) to (S, heads, size): every slot of the rows has its token's states."""
    packed = states[0].transpose(0, 1)
    spread: Tensor = _Spread.apply(packed.flatten(1), rows)
    return spread.unflatten(1, packed.shape[1:])


class _Spread(torch.autograd.Function):
    """(N, F) to (S, F). Backward adds the two copies of a prompt; index_add on all slots would be far slower."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, rows: AttentionRows) -> Tensor:
        ctx.rows = rows
        return packed.index_select(0, rows.tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        rows: AttentionRows = ctx.rows
        packed = gradient.index_select(0, rows.first)
        both = packed.index_select(0, rows.prompt) + gradient.index_select(0, rows.second)
        return packed.index_copy_(0, rows.prompt, both), None


class _Gather(torch.autograd.Function):
    """(S, F) to (N, F): of a prompt, which has the same outputs in both rows, those in the row of chosen."""

    @staticmethod
    def forward(ctx: Any, spread: Tensor, rows: AttentionRows) -> Tensor:
        ctx.rows, ctx.slots = rows, spread.shape[0]
        return spread.index_select(0, rows.first)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        spread = gradient.new_zeros(ctx.slots, gradient.shape[1])
        return spread.index_copy_(0, ctx.rows.first, gradient), None
