"""Tiny random models of several families and pairs of different lengths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from congrad_ray.preference.tokenization import TokenizedPair

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped attention
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.1))
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
    if family == "gemma2":
        # Soft caps and a window that are small enough to matter at these sizes.
        return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=1.0, sliding_window=6))
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    assert family == "gpt2"
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    )


@pytest.fixture
def build_model() -> Callable[[str], PreTrainedModel]:
    return _build


@pytest.fixture
def pairs() -> list[TokenizedPair]:
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 97, (length,), generator=generator).tolist()

    return [
        TokenizedPair(ids(5), ids(7), ids(4)),
        TokenizedPair(ids(9), ids(2), ids(12)),
        TokenizedPair(ids(2), ids(3), ids(1)),
    ]
