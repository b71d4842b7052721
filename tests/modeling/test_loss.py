from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from congrad_ray.modeling.batching import collate_pairs
from congrad_ray.modeling.logprobs import completion_logprobs
from congrad_ray.modeling.loss import ChosenRejected, LossSettings, dpo_loss, pair_coefficient
from congrad_ray.modeling.tokenization import tokenize_pair

ROWS = [
    {"prompt": "The capital of Portugal is", "chosen": " Lisbon.", "rejected": " the sky."},
    {"prompt": "Der Himmel ist", "chosen": " blau.", "rejected": " die Farbe ist Lisbon."},
    {"prompt": "空は", "chosen": "青いです。", "rejected": "bleu"},
]


def llama(seed: int, vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        # Large random weights, so that policy and reference differ by much and the margin is not near zero.
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def test_loss_and_metrics_are_those_of_trl(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    policy, reference = llama(1, len(tokenizer)), llama(2, len(tokenizer))
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        beta=0.3,
        loss_type="sigmoid",
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
    )
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    inputs = trainer.data_collator([trainer.train_dataset[index] for index in range(len(ROWS))])
    expected_loss = trainer.compute_loss(trainer.model, inputs)
    expected = trainer._metrics["train"]

    pairs = [tokenize_pair(tokenizer, **row, max_length=1000) for row in ROWS]
    batch = collate_pairs(pairs, tokenizer.pad_token_id)
    assert torch.equal(batch.input_ids, inputs["input_ids"])
    logps = ChosenRejected(*completion_logprobs(policy, batch).split(len(pairs)))
    with torch.no_grad():
        ref_logps = ChosenRejected(*completion_logprobs(reference, batch).split(len(pairs)))
    losses, metrics = dpo_loss(logps, ref_logps, LossSettings(beta=0.3))
    assert losses.shape == (len(pairs),)
    assert abs(metrics["rewards/margins"].item()) > 0.1
    torch.testing.assert_close(losses.mean(), expected_loss, rtol=1e-5, atol=1e-5)
    assert len(metrics) == 6
    for name, value in metrics.items():
        assert value.shape == () and not value.requires_grad
        assert value.item() == pytest.approx(expected[name][0], rel=1e-5, abs=1e-5), name


def test_loss_by_hand_with_length_penalty() -> None:
    # z = 0.5 * ((-1 + 3) - (-2 + 1)) = 1.5; alpha * (|y_w| - |y_l|) = 0.1 * (12 - 5) = 0.7
    policy = ChosenRejected(torch.tensor([-1.0]), torch.tensor([-2.0]))
    reference = ChosenRejected(torch.tensor([-3.0]), torch.tensor([-1.0]))
    tokens = ChosenRejected(torch.tensor([12]), torch.tensor([5]))
    losses, _ = dpo_loss(policy, reference, LossSettings(0.5, 0.1), tokens)
    assert losses.item() == pytest.approx(torch.log1p(torch.exp(torch.tensor(-2.2))).item(), rel=1e-6)


def test_length_penalty_pushes_less_towards_a_longer_winner() -> None:
    logps = ChosenRejected(torch.tensor([-10.0, -10.0]), torch.tensor([-10.0, -10.0]))
    longer_then_shorter = ChosenRejected(torch.tensor([30, 10]), torch.tensor([10, 30]))
    coefficients = pair_coefficient(logps, logps, LossSettings(0.1, 0.02), longer_then_shorter)
    assert coefficients[0] < 0.05 < coefficients[1]
    torch.testing.assert_close(pair_coefficient(logps, logps, LossSettings(0.1)), torch.tensor([0.05, 0.05]))


@pytest.mark.parametrize("length_penalty", [0.0, 0.03])
def test_coefficient_is_minus_the_slope_of_the_loss(length_penalty: float) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, ref_chosen, ref_rejected = (
        (-10 * torch.rand(6, generator=generator)).requires_grad_() for _ in range(4)
    )
    tokens = ChosenRejected(*(torch.randint(1, 40, (6,), generator=generator) for _ in range(2)))
    policy, reference = ChosenRejected(chosen, rejected), ChosenRejected(ref_chosen, ref_rejected)
    settings = LossSettings(0.4, length_penalty)
    losses, _ = dpo_loss(policy, reference, settings, tokens)
    of_chosen, of_rejected = torch.autograd.grad(losses.sum(), [chosen, rejected])
    coefficient = pair_coefficient(policy, reference, settings, tokens)
    assert (coefficient > 0).all() and not coefficient.requires_grad
    torch.testing.assert_close(of_chosen, -coefficient)
    torch.testing.assert_close(of_rejected, coefficient)


def test_length_penalty_needs_lengths() -> None:
    logps = ChosenRejected(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"length_penalty is 0\.1; it needs the completions' tokens"):
        dpo_loss(logps, logps, LossSettings(0.1, 0.1))
