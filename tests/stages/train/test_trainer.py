"""The trainer in this process: held-out pairs, the best policy, adapters as policies, losses, two sequences."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from congrad_ray.config.recipe import Recipe
from congrad_ray.config.training import Lora
from congrad_ray.data.tables import table_of
from congrad_ray.modeling.adapters import load_adapter, merge_into
from congrad_ray.modeling.source import ModelSource
from congrad_ray.rundir.directory import RunDirectory, StageFolder
from congrad_ray.stages.select.schema import SELECTED
from congrad_ray.stages.train import trainer as trainer_module
from congrad_ray.stages.train.loop import TrainingJob, alone, logged, start
from congrad_ray.stages.train.metrics import read_evaluations, read_metrics
from congrad_ray.stages.train.policy import save_policy
from congrad_ray.stages.train.split import trained_and_held_out
from congrad_ray.stages.train.trainer import PairTrainer
from plain_training import largest_difference, plain_losses, plain_training, recipe_of, weights_of


def trained(recipe: Recipe, folder: Path, selection: StageFolder) -> tuple[PairTrainer, StageFolder]:
    """Trains as a worker does, without Ray; the policy is in the folder that is returned."""
    output = RunDirectory.open(folder).stage("policy", 0)
    source = ModelSource(recipe.model.name, recipe.model)
    job = TrainingJob(recipe, source, selection, output, threads=1)
    with alone():
        trainer = start(job, str(folder / "scratch"), torch.device("cpu"), 1, None)
        with logged(job, trainer, None):
            trainer.train()
        save_policy(trainer, source, recipe.train, output)
    return trainer, output


def test_held_out_pairs_are_not_trained_on_and_choose_the_policy(
    tmp_path: Path, tiny_model: Path, make_selection: Any, preference_rows: Any
) -> None:
    recipe = recipe_of(
        tiny_model,
        eval_share=0.3,
        eval_steps=2,
        max_steps=8,
        learning_rate=1e-3,
        warmup_ratio=0.0,
        lr_scheduler_type="constant",
    )

    def swap_held_out(rows: list[dict[str, Any]]) -> None:
        """What is held out is the other way round, so that training makes it worse."""
        rows.sort(key=lambda row: row["pair_id"])
        for index in trained_and_held_out(table_of(rows, SELECTED), recipe.train)[1]:
            row = rows[index]
            for name in ("{}", "{}_tokens", "ref_{}_logps"):
                one, other = name.format("chosen"), name.format("rejected")
                row[one], row[other] = row[other], row[one]

    selection = make_selection(RunDirectory.open(tmp_path), 16, swap_held_out)
    _, policy = trained(recipe, tmp_path, selection)

    table = selection.read_table(name="selected.parquet").sort_by("pair_id")
    kept, out = trained_and_held_out(table, recipe.train)
    assert len(out) == 4 and {"en", "sw"} == set(table.take(out)["language"].to_pylist())
    rows = table.to_pylist()
    found = read_evaluations(policy)
    assert [row["step"] for row in found] == [0, 2, 4, 6, 8]
    assert found[0]["eval_loss"] == pytest.approx(0.6931472, abs=1e-5)

    def weights_after(steps: int) -> dict[str, torch.Tensor]:
        train = recipe.train.model_copy(update={"max_steps": steps})
        return plain_training(tiny_model, [rows[row] for row in kept], train)

    best = min(found[1:], key=lambda row: row["eval_loss"])
    assert best["step"] == 2
    expected = weights_after(int(best["step"]))
    assert largest_difference(weights_of(policy.path), expected) < 2e-5
    losses = plain_losses(policy.path, [rows[row] for row in out], recipe.train)
    assert best["eval_loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
    for language in ("en", "sw"):
        own = [loss for loss, row in zip(losses.tolist(), out, strict=True) if rows[row]["language"] == language]
        assert best[f"eval_{language}_loss"] == pytest.approx(sum(own) / len(own), abs=1e-5)
    assert not policy.exists("best") and len(read_metrics(policy)) == 8


def test_training_ends_where_held_out_pairs_get_no_better(
    tmp_path: Path, tiny_model: Path, make_selection: Any
) -> None:
    selection = make_selection(RunDirectory.open(tmp_path), 16)
    recipe = recipe_of(
        tiny_model,
        eval_share=0.3,
        eval_steps=1,
        early_stopping_patience=2,
        load_best_model_at_end=False,
        max_steps=40,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
    )
    trainer, policy = trained(recipe, tmp_path, selection)
    losses = [row["eval_loss"] for row in read_evaluations(policy)][1:]
    assert len(losses) < 40
    assert min(losses[:-2]) <= min(losses[-2:])
    assert trainer.state.global_step == len(losses) == len(read_metrics(policy))


@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_is_a_policy_alone_or_merged(
    tmp_path: Path, tiny_model: Path, make_selection: Any, merge: bool
) -> None:
    selection = make_selection(RunDirectory.open(tmp_path), 13)
    recipe = recipe_of(tiny_model, max_steps=3, lora=Lora(r=4, merge=merge))
    _, policy = trained(recipe, tmp_path, selection)
    rows = selection.read_table(name="selected.parquet").to_pylist()
    expected = plain_training(tiny_model, rows, recipe.train)
    names = {Path(path).name for path in policy.files()}
    assert "tokenizer.json" in names
    assert ("adapter_model.safetensors" in names) == (not merge) == ("model.safetensors" not in names)
    if merge:
        found = weights_of(policy.path)
    else:
        base = ModelSource(str(tiny_model), recipe.model).load_model("cpu")
        found = {
            name: value.detach() for name, value in merge_into(load_adapter(base, policy.path)).named_parameters()
        }
    assert largest_difference(found, expected) < 2e-5


@pytest.mark.parametrize("loss_type", ["sigmoid_norm", "ipo", "hinge", "robust", "simpo", "orpo"])
def test_every_loss_trains_as_in_plain_pytorch(
    tmp_path: Path, tiny_model: Path, make_selection: Any, loss_type: str
) -> None:
    selection = make_selection(RunDirectory.open(tmp_path), 8)
    recipe = recipe_of(
        tiny_model, max_steps=3, loss_type=loss_type, **({"label_smoothing": 0.1} if loss_type == "robust" else {})
    )
    _, policy = trained(recipe, tmp_path, selection)
    rows = selection.read_table(name="selected.parquet").to_pylist()
    assert largest_difference(weights_of(policy.path), plain_training(tiny_model, rows, recipe.train)) < 5e-5


def test_a_model_that_cannot_share_prompts_trains_the_same(
    tmp_path: Path, tiny_model: Path, make_selection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = make_selection(RunDirectory.open(tmp_path), 8)
    recipe = recipe_of(tiny_model, max_steps=3)
    found = []
    for name, reason in (("shared", None), ("two", "the test says so")):
        monkeypatch.setattr(trainer_module, "why_not_shared", lambda *_, reason=reason: reason)
        trainer, policy = trained(recipe, tmp_path / name, selection)
        assert trainer._shared is (reason is None)
        found.append(weights_of(policy.path))
    assert 0 < largest_difference(*found) < 2e-5


def test_training_in_this_process_leaves_no_settings_behind(
    tmp_path: Path, tiny_model: Path, make_selection: Any
) -> None:
    before = dict(os.environ)
    for name in ("one", "two"):
        folder = tmp_path / name
        trained(recipe_of(tiny_model, max_steps=1), folder, make_selection(RunDirectory.open(folder), 4))
        assert dict(os.environ) == before
    other = Trainer(
        torch.nn.Linear(1, 1), TrainingArguments(str(tmp_path / "other"), use_cpu=True, report_to="none")
    )
    assert not other.is_deepspeed_enabled
