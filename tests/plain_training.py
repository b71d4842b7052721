"""Training as plain PyTorch does it, for comparison: no Ray, DeepSpeed, Trainer, workers, passes or packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from congrad_ray.config.judging import Judge
from congrad_ray.config.recipe import Model, Prompts, Recipe
from congrad_ray.config.training import Train
from congrad_ray.modeling.adapters import merge_into, with_adapter
from congrad_ray.modeling.batching import collate_pairs
from congrad_ray.modeling.logprobs import completion_logprobs
from congrad_ray.modeling.loss import ChosenRejected, loss_settings, preference_loss
from congrad_ray.modeling.tokenization import TokenizedPair, load_tokenizer, tokenize_pair
from congrad_ray.stages.train.schedule import learning_rate, make_schedule


def recipe_of(model: Path, dtype: str = "float32", **train: Any) -> Recipe:
    values = {"learning_rate": 1e-3, "batch_size": 8, "max_tokens_per_batch": 120, "num_train_epochs": 2, **train}
    return Recipe(
        name="test",
        model=Model(name=str(model), dtype=dtype, max_length=600),  # type: ignore[arg-type]
        prompts=Prompts(languages=["en", "sw"]),
        judge=Judge(max_tokens=16),
        train=Train(**values),
    )


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return {name: value.detach() for name, value in model.named_parameters()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def plain_training(
    model_folder: Path, rows: list[dict[str, Any]], train: Train, max_length: int = 600
) -> dict[str, torch.Tensor]:
    """The same training without Ray, DeepSpeed, workers and accumulation: each batch in one pass."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    rows = sorted(rows, key=lambda row: row["pair_id"])
    pairs = _tokenized(model_folder, rows, max_length)
    schedule = make_schedule(train, len(rows))
    trained: Any = with_adapter(model, train.lora, train.seed) if train.lora else model
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [value for value in parameters if value.ndim > 1], "weight_decay": train.weight_decay},
            {"params": [value for value in parameters if value.ndim == 1], "weight_decay": 0.0},  # norms
        ]
    )
    for step in range(schedule.total_steps):
        batch = schedule.batch(step)
        _losses(
            model, [pairs[index] for index in batch], [rows[index] for index in batch], train
        ).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step, schedule.total_steps)
        optimizer.step()
        optimizer.zero_grad()
    if train.lora:
        model = merge_into(trained)
    return {name: value.detach() for name, value in model.named_parameters()}


def plain_losses(
    model_folder: str | Path, rows: list[dict[str, Any]], train: Train, max_length: int = 600
) -> torch.Tensor:
    """The loss of every pair under a model."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return _losses(model, _tokenized(model_folder, rows, max_length), rows, train)


def _tokenized(model_folder: str | Path, rows: list[dict[str, Any]], max_length: int) -> list[TokenizedPair]:
    tokenizer = load_tokenizer(str(model_folder))
    return [tokenize_pair(tokenizer, row["prompt"], row["chosen"], row["rejected"], max_length) for row in rows]


def _losses(
    model: PreTrainedModel, pairs: list[TokenizedPair], rows: list[dict[str, Any]], train: Train
) -> torch.Tensor:
    collated = collate_pairs(pairs, 0)
    references = [
        torch.tensor([row[name] for row in rows], dtype=torch.float32)
        for name in ("ref_chosen_logps", "ref_rejected_logps")
    ]
    losses, _ = preference_loss(
        ChosenRejected(*completion_logprobs(model, collated).chunk(2)),
        ChosenRejected(*references),
        loss_settings(train),
        ChosenRejected(collated.chosen_tokens, collated.rejected_tokens),
    )
    return losses
