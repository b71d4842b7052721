from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from congrad_ray.config.settings import SettingsError, validate
from congrad_ray.config.training import Train
from congrad_ray.modeling.batching import collate_pairs
from congrad_ray.modeling.logprobs import completion_logprobs
from congrad_ray.modeling.loss import (
    ChosenRejected,
    LossSettings,
    gradient_seeds,
    loss_settings,
    margin_weights,
    needs_reference,
    over_means,
    preference_loss,
)
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


def test_dpo_is_that_of_trls_trainer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
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
    tokens = ChosenRejected(batch.chosen_tokens, batch.rejected_tokens)
    losses, metrics = preference_loss(logps, ref_logps, LossSettings(beta=0.3), tokens)
    assert losses.shape == (len(pairs),)
    assert abs(metrics["rewards/margins"].mean().item()) > 0.1
    torch.testing.assert_close(losses.mean(), expected_loss, rtol=1e-5, atol=1e-5)
    assert len(metrics) == 6
    for name, value in metrics.items():
        assert value.shape == (len(pairs),) and not value.requires_grad
        assert value.mean().item() == pytest.approx(expected[name][0], rel=1e-5, abs=1e-5), name


# Every loss, with numbers of its own where it has some.
LOSSES = [
    LossSettings("sigmoid", beta=0.3),
    LossSettings("sigmoid", beta=0.3, length_penalty=0.05),
    LossSettings("sigmoid", beta=0.3, sft_weight=0.7),
    LossSettings("sigmoid_norm", beta=5.0),
    LossSettings("sigmoid_norm", beta=5.0, sft_weight=0.2),
    LossSettings("ipo", beta=0.4),
    LossSettings("hinge", beta=0.3),
    LossSettings("hinge", beta=0.3, length_penalty=0.05),
    LossSettings("robust", beta=0.3, label_smoothing=0.2),
    LossSettings("robust", beta=0.3, label_smoothing=0.2, length_penalty=0.05),
    LossSettings("simpo", beta=2.5, simpo_gamma=1.2),
    LossSettings("simpo", beta=2.5, sft_weight=0.2),
    LossSettings("orpo", beta=0.2),
]
every_loss = pytest.mark.parametrize(
    "settings", LOSSES, ids=lambda s: f"{s.loss_type}-{s.length_penalty}-{s.sft_weight}"
)
B = 5


class Given:
    """Log-probabilities of every token of B pairs, under a policy and a reference, (2B, longest)."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lengths = torch.randint(1, 12, (2 * B,), generator=generator)
        self.mask = torch.arange(12) < self.lengths[:, None]
        shape = self.mask.shape
        self.of_policy, self.of_reference = (-3 * torch.rand(shape, generator=generator) * self.mask for _ in "pr")

    @property
    def arguments(self) -> tuple[ChosenRejected, ChosenRejected, ChosenRejected]:
        """Policy, reference and tokens."""
        sums = (ChosenRejected(*values.sum(dim=1).chunk(2)) for values in (self.of_policy, self.of_reference))
        return *sums, ChosenRejected(*self.lengths.chunk(2))


class Fixed(torch.nn.Module):
    """Stands for a model: the log-probabilities that TRL asks for are given."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: torch.Tensor) -> None:
        super().__init__()
        self.log_probs = log_probs

    def forward(self, **inputs: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(self.log_probs)
        return SimpleNamespace(log_probs=self.log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
)


def of_dpo_trainer(given: Given, rows: list[int], settings: LossSettings) -> tuple[float, dict[str, float]]:
    """TRL's loss and metrics of the rows of a batch."""
    losses, weights = [settings.loss_type], [1.0]
    if settings.sft_weight:
        losses, weights = [settings.loss_type, "sft"], [1.0, settings.sft_weight]
    policy, reference = Fixed(given.of_policy[rows]), Fixed(given.of_reference[rows])
    trainer = SimpleNamespace(
        model=policy,
        ref_model=reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=losses,
        loss_weights=weights,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    mask = torch.cat([torch.zeros(len(rows), 1), given.mask[rows]], dim=1).long()  # one token of prompt
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = DPOTrainer._compute_loss(trainer, policy, inputs, False)
    return loss.item(), {name: values[0] for name, values in trainer._metrics["train"].items() if name[0] != "n"}


@pytest.mark.parametrize(
    "settings",
    [s for s in LOSSES if needs_reference(s) and not s.length_penalty],
    ids=lambda s: f"{s.loss_type}-{s.sft_weight}",
)
def test_losses_and_metrics_are_those_of_trl(settings: LossSettings) -> None:
    given = Given()
    losses, metrics = preference_loss(*given.arguments[:2], settings, given.arguments[2])
    assert len(metrics) == 6
    for pair in range(B):
        expected, of_trl = of_dpo_trainer(given, [pair, B + pair], settings)
        assert losses[pair].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
        for name, values in metrics.items():
            assert values[pair].item() == pytest.approx(of_trl[name], rel=1e-6, abs=1e-6), name
    if not settings.sft_weight:  # TRL's is a mean over the tokens of the batch
        expected, _ = of_dpo_trainer(given, list(range(2 * B)), settings)
        assert losses.mean().item() == pytest.approx(expected, rel=1e-6)


def test_simpo_is_that_of_trl() -> None:
    policy, reference, tokens = Given().arguments
    settings = LossSettings("simpo", beta=2.5, simpo_gamma=1.2)
    trainer = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=1.2, beta=2.5, label_smoothing=0.0, accelerator=ACCELERATOR
    )
    means = [sums / numbers for sums, numbers in zip(policy, tokens, strict=True)]
    expected, chosen, rejected = CPOTrainer.cpo_loss(trainer, *means)
    losses, metrics = preference_loss(policy, reference, settings, tokens)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics["rewards/chosen"], chosen)
    torch.testing.assert_close(metrics["rewards/rejected"], rejected)
    torch.testing.assert_close(metrics["logps/chosen"], means[0])


def test_orpo_is_that_of_trl_with_an_sft_term_over_the_completion() -> None:
    policy, reference, tokens = Given().arguments
    trainer = SimpleNamespace(beta=0.2, accelerator=ACCELERATOR)
    means = [sums / numbers for sums, numbers in zip(policy, tokens, strict=True)]
    ratios, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(trainer, *means)
    losses, metrics = preference_loss(policy, reference, LossSettings("orpo", beta=0.2), tokens)
    torch.testing.assert_close(losses, -means[0] - ratios, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics["rewards/chosen"], chosen)
    torch.testing.assert_close(metrics["rewards/rejected"], rejected)


def test_orpo_of_a_certain_completion_is_finite() -> None:
    certain, other, tokens = torch.zeros(1), torch.tensor([-3.0]), torch.tensor([2])
    for policy in (ChosenRejected(certain, other), ChosenRejected(other, certain)):
        losses, _ = preference_loss(policy, policy, LossSettings("orpo"), ChosenRejected(tokens, tokens))
        found = gradient_seeds(policy, policy, LossSettings("orpo"), ChosenRejected(tokens, tokens))
        assert all(bool(values.isfinite().all()) for values in (losses, *found))


@every_loss
def test_only_losses_with_a_reference_depend_on_it(settings: LossSettings) -> None:
    policy, reference, tokens = Given().arguments
    losses, _ = preference_loss(policy, reference, settings, tokens)
    moved, _ = preference_loss(policy, ChosenRejected(reference.chosen - 2, reference.rejected), settings, tokens)
    assert bool((losses != moved).any()) == needs_reference(settings)


@every_loss
@pytest.mark.parametrize("at_the_start", [True, False], ids=["start", "later"])
def test_seeds_and_coefficient_make_minus_the_gradient(
    settings: LossSettings, at_the_start: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Through a model: c * u against autograd of the weighted loss with respect to its weights."""
    tokenizer.pad_token = tokenizer.eos_token
    model = llama(1, len(tokenizer))
    batch = collate_pairs([tokenize_pair(tokenizer, **row, max_length=1000) for row in ROWS], 0)
    tokens = ChosenRejected(batch.chosen_tokens, batch.rejected_tokens)
    weights = torch.tensor([1.0, 0.3, 2.0])
    logps = completion_logprobs(model, batch)
    policy = ChosenRejected(*logps.chunk(2))
    shift = 0.0 if at_the_start else torch.tensor([1.0, -2.0, 0.5])
    reference = ChosenRejected(policy.chosen.detach() + shift, policy.rejected.detach() - shift)
    coefficients, seeds = gradient_seeds(policy, reference, settings, tokens, weights)
    assert not coefficients.requires_grad and not seeds.requires_grad
    parameters = list(model.parameters())
    losses, _ = preference_loss(policy, reference, settings, tokens, weights)
    for pair in range(len(ROWS)):
        slopes = torch.autograd.grad(losses[pair], parameters, retain_graph=True)
        scaled = torch.zeros_like(seeds)
        for row in (pair, len(ROWS) + pair):
            scaled[row] = seeds[row] * coefficients[pair]
        found = torch.autograd.grad(logps, parameters, scaled, retain_graph=True)
        for slope, mine in zip(slopes, found, strict=True):
            torch.testing.assert_close(mine, -slope, rtol=1e-5, atol=1e-5 * float(slope.abs().max()))
    if at_the_start:
        assert (coefficients > 0).all()
    lengths = torch.cat(tokens)
    one = 1 / lengths if over_means(settings) else torch.ones(len(lengths))
    assert torch.equal(seeds[: len(ROWS)], one[: len(ROWS)])
    if not settings.sft_weight and settings.loss_type != "orpo":
        torch.testing.assert_close(seeds[len(ROWS) :], -one[len(ROWS) :])


@pytest.mark.parametrize("length_penalty", [0.0, 0.03])
def test_dpos_seeds_are_one_and_minus_one_and_its_coefficient_is_known(length_penalty: float) -> None:
    policy, reference, tokens = Given().arguments
    settings = LossSettings(beta=0.4, length_penalty=length_penalty)
    coefficients, seeds = gradient_seeds(policy, reference, settings, tokens)
    assert seeds.tolist() == [1.0] * B + [-1.0] * B
    margin = 0.4 * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected))
    longer = tokens.chosen - tokens.rejected
    torch.testing.assert_close(coefficients, 0.4 * torch.sigmoid(-(margin + length_penalty * longer)))


@pytest.mark.parametrize(
    "settings",
    [LossSettings("hinge"), LossSettings("sigmoid", beta=1.0), LossSettings("simpo", beta=100.0)],
    ids=lambda settings: settings.loss_type,
)
def test_a_loss_without_a_slope_keeps_its_seeds(settings: LossSettings) -> None:
    policy = ChosenRejected(torch.tensor([-1.0]), torch.tensor([-500.0]))
    reference, tokens = ChosenRejected(*torch.zeros(2, 1)), ChosenRejected(torch.tensor([2]), torch.tensor([4]))
    coefficients, seeds = gradient_seeds(policy, reference, settings, tokens)
    assert coefficients.tolist() == [0.0]
    assert seeds.tolist() == ([0.5, -0.25] if over_means(settings) else [1.0, -1.0])


def test_weights_by_the_judges_margin() -> None:
    weights = margin_weights(torch.tensor([4.0, 3.5, 2.0, 2.0]), torch.tensor([1.0, 3.0, 2.0, 5.0]))
    margin = torch.tensor([3.0, 0.5])
    torch.testing.assert_close(weights[:2], 2 * torch.sigmoid(margin) - 1)
    assert weights[2:].tolist() == [0.0, 0.0]  # a tie, and a judge who disagrees
    policy, reference, tokens = Given().arguments
    factors = torch.arange(B).float()
    plain, _ = preference_loss(policy, reference, LossSettings(sft_weight=1.0), tokens)
    weighted, _ = preference_loss(policy, reference, LossSettings(sft_weight=1.0), tokens, factors)
    torch.testing.assert_close(weighted, plain * factors)
    seeds = gradient_seeds(policy, reference, LossSettings(), tokens, factors)[1]
    assert seeds.tolist() == [1.0] * B + [-1.0] * B  # also where the weight is 0


def test_loss_by_hand_with_length_penalty() -> None:
    # z = 0.5 * ((-1 + 3) - (-2 + 1)) = 1.5; alpha * (|y_w| - |y_l|) = 0.1 * (12 - 5) = 0.7
    policy = ChosenRejected(torch.tensor([-1.0]), torch.tensor([-2.0]))
    reference = ChosenRejected(torch.tensor([-3.0]), torch.tensor([-1.0]))
    tokens = ChosenRejected(torch.tensor([12]), torch.tensor([5]))
    losses, _ = preference_loss(policy, reference, LossSettings(beta=0.5, length_penalty=0.1), tokens)
    assert losses.item() == pytest.approx(-F.logsigmoid(torch.tensor(2.2)).item(), rel=1e-6)
    losses, _ = preference_loss(policy, reference, LossSettings("hinge", beta=0.1, length_penalty=0.1), tokens)
    assert losses.item() == pytest.approx(max(0.0, 1 - 0.3 - 0.7), abs=1e-6)


def test_length_penalty_pushes_less_towards_a_longer_winner() -> None:
    logps = ChosenRejected(torch.tensor([-10.0, -10.0]), torch.tensor([-10.0, -10.0]))
    longer_then_shorter = ChosenRejected(torch.tensor([30, 10]), torch.tensor([10, 30]))
    coefficients, _ = gradient_seeds(logps, logps, LossSettings(length_penalty=0.02), longer_then_shorter)
    assert coefficients[0] < 0.05 < coefficients[1]
    plain, _ = gradient_seeds(logps, logps, LossSettings(), longer_then_shorter)
    torch.testing.assert_close(plain, torch.tensor([0.05, 0.05]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 0.0}, r"beta"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing"),
        ({"label_smoothing": 0.1}, r"label_smoothing \(0\.1\) does nothing in loss_type sigmoid; use .* robust"),
        (
            {"loss_type": "simpo", "length_penalty": 0.1},
            r"length_penalty \(0\.1\) does nothing in .* simpo",
        ),
        ({"loss_type": "ipo", "length_penalty": 0.1}, r"which takes means over tokens"),
        ({"simpo_gamma": 1.0}, r"simpo_gamma \(1\.0\) does nothing in loss_type sigmoid"),
        ({"loss_type": "orpo", "sft_weight": 1.0}, r"orpo has an SFT term of its own"),
        ({"sft_weight": -1.0}, r"sft_weight"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSettings(**values)
    with pytest.raises(SettingsError, match=message):
        validate(Train, values, "recipe")


def test_a_recipe_has_every_setting_of_the_loss() -> None:
    values = {"loss_type": "robust", "beta": 0.7, "length_penalty": 0.1, "label_smoothing": 0.2, "sft_weight": 0.3}
    assert loss_settings(validate(Train, values, "recipe")) == LossSettings(**values)
    assert loss_settings(Train()) == LossSettings()
    assert loss_settings(Train(margin_weighting=True)).margin_weighting
    # What is left out of a recipe is left out of the fingerprints of older runs too.
    added = {"loss_type", "label_smoothing", "simpo_gamma", "sft_weight", "margin_weighting"}
    assert not added & Train().model_dump().keys()
    assert Train(loss_type="simpo", simpo_gamma=1.0).model_dump().keys() & added == {"loss_type", "simpo_gamma"}
