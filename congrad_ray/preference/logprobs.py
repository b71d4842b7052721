"""Log-probabilities of completions under a causal language model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from congrad_ray.preference.batching import PairBatch

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


def _token_logprobs(
    hidden: Tensor, tokens: Tensor, head: nn.Module, scale: float, softcap: float | None
) -> Tensor:
    logits = head(hidden)
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return -F.cross_entropy(logits.float(), tokens, reduction="none")


def completion_logprobs(model: PreTrainedModel, batch: PairBatch, chunk_tokens: int = 1024) -> Tensor:
    """Sum over each row's completion tokens of log p(token | the tokens before it).

    Returns (2B,) float32, chosen rows first, differentiable. Only the hidden states that predict a completion
    token go through the output embedding, `chunk_tokens` at a time and recomputed in the backward, so that at
    most (chunk_tokens, vocabulary) logits are alive. The log-softmax is float32 whatever the model's dtype.

    Raises ValueError for models whose logits are scaled in a way not handled here, and for a completion that
    starts at the first token of its row.
    """
    if bool(batch.completion_mask[:, 0].any()):
        raise ValueError("a completion starts at the first token of its row; it needs at least one prompt token")
    scale, softcap = _logit_scale_and_softcap(model)
    head = model.get_output_embeddings()
    hidden = model.base_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    # The state at position t predicts the token at t + 1.
    predicted = batch.completion_mask[:, 1:]
    rows = predicted.nonzero()[:, 0]
    states = hidden[:, :-1][predicted]
    tokens = batch.input_ids[:, 1:][predicted]
    totals = torch.zeros(batch.input_ids.shape[0], dtype=torch.float32, device=states.device)
    for start in range(0, len(tokens), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        if torch.is_grad_enabled():
            logprobs = checkpoint(
                _token_logprobs, states[part], tokens[part], head, scale, softcap, use_reentrant=False
            )
        else:
            logprobs = _token_logprobs(states[part], tokens[part], head, scale, softcap)
        totals = totals.index_add(0, rows[part], logprobs)
    return totals
