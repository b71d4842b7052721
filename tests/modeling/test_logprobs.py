from __future__ import annotations

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from congrad_ray.modeling.batching import PairBatch, collate_pairs
from congrad_ray.modeling.logprobs import completion_logprobs, summed_logprobs
from congrad_ray.modeling.tokenization import TokenizedPair

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    # A small soft cap, so that leaving it out shows.
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.2)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.0625)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
    ),
}


@pytest.fixture
def batch() -> PairBatch:
    pairs = [
        TokenizedPair([5, 6, 7, 8], [9, 10, 11], [12]),
        TokenizedPair([13], [14, 15, 16, 17, 18, 19], [20, 21]),
        TokenizedPair([22, 23, 24], [25], [26, 27, 28, 29, 30]),
    ]
    return collate_pairs(pairs, pad_token_id=0)


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[family]().eval()


def naive_logprobs(model: PreTrainedModel, batch: PairBatch) -> list[float]:
    """Each row by itself, without padding, through the model's own logits."""
    totals = []
    for ids, attended, completion in zip(*vars(batch).values(), strict=True):
        length = int(attended.sum())
        logprobs = model(ids[None, :length]).logits[0].float().log_softmax(-1)
        positions = completion.nonzero()[:, 0].tolist()
        totals.append(sum(logprobs[position - 1, ids[position]] for position in positions))
    return totals


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("chunk_tokens", [2, 1024])
def test_equal_to_each_row_through_the_models_own_logits(batch: PairBatch, family: str, chunk_tokens: int) -> None:
    model = build(family)
    logps = completion_logprobs(model, batch, chunk_tokens)
    assert logps.dtype == torch.float32 and logps.shape == (6,) and logps.requires_grad
    expected = torch.stack(naive_logprobs(model, batch))
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)

    weights = torch.arange(1.0, 7.0)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad((weights * logps).sum(), parameters)
    expected_gradients = torch.autograd.grad((weights * expected).sum(), parameters)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MODELS)
def test_a_frozen_output_embedding_changes_no_gradient_of_the_states(family: str) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(7, 32, generator=generator).requires_grad_(True)
    tokens = torch.randint(0, 97, (7,), generator=generator)
    rows = torch.tensor([0, 1, 1, 0, 2, 2, 2])
    weights = torch.tensor([1.0, -1.0, 0.5])
    found = []
    for frozen in (False, True):
        model = build(family).requires_grad_(not frozen)
        logps = summed_logprobs(model, states, tokens, rows, 3, chunk_tokens=3)
        found.append((logps.detach(), torch.autograd.grad((weights * logps).sum(), states)[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_without_gradients_the_numbers_are_the_same(batch: PairBatch) -> None:
    model = build("llama")
    with torch.no_grad():
        logps = completion_logprobs(model, batch, chunk_tokens=3)
    assert not logps.requires_grad
    torch.testing.assert_close(logps, completion_logprobs(model, batch).detach())


def test_bfloat16_model_gives_float32(batch: PairBatch) -> None:
    exact = completion_logprobs(build("llama"), batch)
    logps = completion_logprobs(build("llama").to(torch.bfloat16), batch)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, exact, rtol=0.02, atol=0.02)


def test_refuses_what_it_would_get_wrong(batch: PairBatch) -> None:
    from_the_start = PairBatch(batch.input_ids, batch.attention_mask, batch.attention_mask.bool())
    with pytest.raises(ValueError, match="needs at least one prompt token"):
        completion_logprobs(build("llama"), from_the_start)
    model = build("llama")
    model.config.lm_head_multiplier = FalconH1Config(lm_head_multiplier=0.5).lm_head_multiplier
    with pytest.raises(ValueError, match=r"lm_head_multiplier = 0\.5"):
        completion_logprobs(model, batch)
