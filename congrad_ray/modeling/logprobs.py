"""Log-probabilities of completions under a causal language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from congrad_ray.modeling.batching import PairBatch

# From last hidden states (N, hidden) to logits (N, vocabulary).
Product = Callable[[Tensor], Tensor]

# Bytes of float32 logits alive at a time by default, by device; the softmax makes about three times that of them.
# Every chunk reads the whole output embedding, so few tokens at a time cost more than their own share.
_CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**29}
_MAX_CHUNK_TOKENS = 1024  # more gains nothing
# Multiply or divide the logits after the output embedding in families that are not handled here.
_UNSUPPORTED_LOGIT_OPTIONS = ("output_multiplier", "lm_head_multiplier")


def _logit_scale_and_softcap(model: PreTrainedModel) -> tuple[float, float | None]:
    """What the model's own forward does to the logits after the output embedding."""
    config = model.config.get_text_config()
    for option in _UNSUPPORTED_LOGIT_OPTIONS:
        value = getattr(config, option, None)
        if value not in (None, 1.0):
            raise ValueError(
                f"{type(model).__name__} changes its logits by config.{option} = {value}, which "
                "completion_logprobs does not reproduce; use another model family"
            )
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    divisor = getattr(config, "logits_scaling", None)  # Granite divides
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return (1.0 if scale is None else scale) / (1.0 if divisor is None else divisor), softcap


def _token_logprobs(hidden: Tensor, tokens: Tensor, embed: Product, scale: float, softcap: float | None) -> Tensor:
    logits = embed(hidden)
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return -F.cross_entropy(logits.float(), tokens, reduction="none")


def chunk_tokens_of(vocabulary: int, device: str) -> int:
    """Tokens whose logits over so large a vocabulary are formed at a time on a device of this type."""
    fitting = _CHUNK_BYTES.get(device, _CHUNK_BYTES["cuda"]) // (4 * vocabulary)
    return min(_MAX_CHUNK_TOKENS, max(16, fitting))


def _in_one_call(head: nn.Module, compute: Callable[[Product, Tensor], Tensor], states: Tensor) -> Tensor:
    """`compute(the product of the output embedding, states)`, done within a single call of its module.

    Under ZeRO 3 every call of a module gathers its weights from all workers, in the forward and again in the
    backward. Workers have different numbers of tokens: a call for each chunk would be collectives that do not
    match, which ends training or hangs it, and a gigabyte gathered again for every chunk.
    """
    own = head.forward
    replaced = vars(head).get("forward")  # accelerate, which spreads models over GPUs, puts its own there
    head.forward = lambda states: compute(own, states)
    try:
        found: Tensor = head(states)
        return found
    finally:
        if replaced is None:
            del head.forward
        else:
            head.forward = replaced


class _FrozenHeadLogprobs(torch.autograd.Function):
    """Log-probabilities of tokens, with their gradients for the states worked out along the way.

    With a frozen head nothing else needs a gradient, and each token's log-probability depends on its own state
    alone. So the gradient costs one more product and no chunk of logits is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        tokens: Tensor,
        embed: Product,
        scale: float,
        softcap: float | None,
        chunk_tokens: int,
    ) -> Tensor:
        logprobs = torch.empty(len(tokens), dtype=torch.float32, device=states.device)
        gradients = torch.empty_like(states)
        for start in range(0, len(tokens), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            with torch.enable_grad():
                chunk = states[part].detach().requires_grad_(True)
                found = _token_logprobs(chunk, tokens[part], embed, scale, softcap)
                gradients[part] = torch.autograd.grad(found.sum(), chunk)[0]
            logprobs[part] = found.detach()
        ctx.save_for_backward(gradients)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        gradients = ctx.saved_tensors[0]
        return gradients * outputs[0][:, None].to(gradients.dtype), None, None, None, None, None


def summed_logprobs(
    model: PreTrainedModel,
    states: Tensor,
    tokens: Tensor,
    rows: Tensor,
    count: int,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Sums of log p(token | state) by row, (count,) float32, differentiable.

    `states` (M, hidden) are last hidden states, `tokens` (M,) the ids they are to predict and `rows` (M,) the row
    from 0 to count - 1 that each adds to. Logits are formed `chunk_tokens` at a time (by default `chunk_tokens_of`
    the vocabulary), so those of all tokens never exist together; in the backward they are computed again, unless
    the output embedding is frozen: then its gradients are found in the forward. The log-softmax is float32
    whatever the model's dtype. Raises ValueError for models whose logits are scaled in a way not handled here.
    """
    scale, softcap = _logit_scale_and_softcap(model)
    head = model.get_output_embeddings()
    chunk_tokens = chunk_tokens or chunk_tokens_of(model.config.get_text_config().vocab_size, states.device.type)
    frozen = not any(parameter.requires_grad for parameter in head.parameters())

    def logprobs_of(embed: Product, states: Tensor) -> Tensor:
        if torch.is_grad_enabled() and states.requires_grad and frozen:
            found: Tensor = _FrozenHeadLogprobs.apply(states, tokens, embed, scale, softcap, chunk_tokens)
            return found
        return torch.cat(
            [
                checkpoint(
                    _token_logprobs, *parts, embed, scale, softcap, use_reentrant=False
                )  # does nothing where no gradient is wanted
                for parts in zip(states.split(chunk_tokens), tokens.split(chunk_tokens), strict=True)
            ]
        )

    logprobs = _in_one_call(head, logprobs_of, states)
    totals = torch.zeros(count, dtype=torch.float32, device=states.device)
    return totals.index_add(0, rows, logprobs)


def completion_logprobs(model: PreTrainedModel, batch: PairBatch, chunk_tokens: int | None = None) -> Tensor:
    """Sum over each row's completion tokens of log p(token | the tokens before it).

    Returns (2B,) float32, chosen rows first, differentiable; memory and errors as in `summed_logprobs`. Only the
    hidden states that predict a completion token go through the output embedding. Raises ValueError as well for
    a completion that starts at the first token of its row.
    """
    if bool(batch.completion_mask[:, 0].any()):
        raise ValueError("a completion starts at the first token of its row; it needs at least one prompt token")
    hidden = model.base_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    # The state at position t predicts the token at t + 1.
    predicted = batch.completion_mask[:, 1:]
    rows = predicted.nonzero()[:, 0]
    return summed_logprobs(
        model,
        hidden[:, :-1][predicted],
        batch.input_ids[:, 1:][predicted],
        rows,
        len(batch.input_ids),
        chunk_tokens,
    )
