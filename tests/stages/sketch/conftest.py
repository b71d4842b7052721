"""Tiny random models of several families and pairs of different lengths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from congrad_ray.modeling.tokenization import TokenizedPair

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

# Windows and soft caps are small enough to matter at these sizes; qwen2 has biases and tied embeddings.
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.1)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES, head_dim=8, final_logit_softcapping=1.0, attn_logit_softcapping=1.0, sliding_window=6
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, sliding_window=6)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    # Adds its positions to the attention scores in code of its own.
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)),
}


def _build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return FAMILIES[family]()


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
