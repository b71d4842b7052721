"""The train stage on a real Ray Train with DeepSpeed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.fs as pafs
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from congrad_ray.config.profile import Profile, Workers
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.training import Lora
from congrad_ray.modeling.adapters import merge_into
from congrad_ray.modeling.source import ModelSource, policy
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.stages.train.loop import TrainingJob, train_alone
from congrad_ray.stages.train.metrics import Row, read_metrics
from congrad_ray.stages.train.schedule import TrainingError
from congrad_ray.stages.train.stage import STAGE
from plain_training import largest_difference, plain_training, recipe_of, weights_of


def train_in(run: RunDirectory, recipe: Recipe, workers: int = 2, max_failures: int = 1) -> Outcome:
    profile = Profile(name="test", trainers=Workers(num_workers=workers, max_failures=max_failures))
    return STAGE.run(Context(recipe, profile, run, 0, run.stage("policy", 0)))


def test_two_workers_train_a_checkpoint_that_loads(
    tmp_path: Path, tiny_model: Path, make_selection: Any, ray_cluster: None, warned: Callable[[], list[str]]
) -> None:
    run = RunDirectory.open(tmp_path)
    selection = make_selection(run, 13)
    recipe = recipe_of(tiny_model, num_train_epochs=4, save_steps=3)
    outcome = train_in(run, recipe)

    policy = run.stage("policy", 0)
    rows = read_metrics(policy)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "learning_rate",
        "grad_norm",
        "epoch",
        "step",
        "tokens_per_second",
    } <= set(rows[0])
    # The policy starts as the reference: margin 0, loss log 2.
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert rows[0]["logps/reference_gap"] < 1e-5
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    assert rows[-1]["rewards/accuracies"] == 1.0
    assert rows[-1]["epoch"] == 4.0
    assert outcome.rows == 13
    assert outcome.counters["steps"] == 8
    assert not warned()
    assert not policy.exists("ray_train")
    assert [path for path in policy.files(recursive=True) if "tfevents" in path]

    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    after = weights_of(policy.path)
    changed = [name for name, value in before.named_parameters() if not torch.equal(value, after[name])]
    assert sorted(changed) == sorted(after)
    # 13 pairs in batches of 7 and 6, passes of 4 and 3 pairs, shares of 2 and 1: every weight matters.
    assert (
        largest_difference(after, plain_training(tiny_model, selection.read_table().to_pylist(), recipe.train))
        < 2e-5
    )
    config = json.loads((tmp_path / "iteration-0/policy/config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["attention_dropout"] == 0.1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "iteration-0" / "policy")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template


def test_one_process_alone_gives_the_weights_of_plain_pytorch(
    tmp_path: Path, tiny_model: Path, make_selection: Any, preference_rows: Any
) -> None:
    recipe = recipe_of(tiny_model, max_steps=5, max_tokens_per_batch=200, zero_stage=0, save_steps=1)
    run = RunDirectory.open(tmp_path)
    selection = make_selection(run, 13)
    source = ModelSource(str(tiny_model), recipe.model)
    job = TrainingJob(recipe, source, selection, run.stage("policy", 0), threads=1)
    trained = {name: value.detach() for name, value in train_alone(job).named_parameters()}
    expected = plain_training(tiny_model, preference_rows(tiny_model, 13), recipe.train)
    assert largest_difference(expected, weights_of(tiny_model)) > 1e-3
    assert largest_difference(trained, expected) < 2e-5


@pytest.mark.parametrize(
    "lora",
    [Lora(r=4, lora_alpha=8), Lora(r=4, use_dora=True, target_modules=["q_proj", "down_proj"])],
    ids=["lora", "dora"],
)
def test_an_adapter_is_trained_as_peft_would(
    tmp_path: Path, tiny_model: Path, make_selection: Any, preference_rows: Any, lora: Lora
) -> None:
    recipe = recipe_of(tiny_model, max_steps=5, max_tokens_per_batch=200, zero_stage=0, lora=lora)
    run = RunDirectory.open(tmp_path)
    source = ModelSource(str(tiny_model), recipe.model)
    job = TrainingJob(recipe, source, make_selection(run, 13), run.stage("policy", 0), threads=1)
    merged = {name: value.detach() for name, value in merge_into(train_alone(job)).named_parameters()}
    expected = plain_training(tiny_model, preference_rows(tiny_model, 13), recipe.train)
    assert largest_difference(expected, weights_of(tiny_model)) > 1e-3
    assert largest_difference(merged, expected) < 2e-5


@pytest.mark.slow
def test_every_option_and_an_idle_worker_give_the_weights_of_plain_pytorch(
    tmp_path: Path, tiny_model: Path, make_selection: Any, ray_cluster: None, warned: Callable[[], list[str]]
) -> None:
    # One pair in a step of two workers: one of them has nothing to do.
    recipe = recipe_of(
        tiny_model,
        length_penalty=0.02,
        max_grad_norm=0.5,
        weight_decay=0.1,
        warmup_ratio=0.3,
        num_train_epochs=3,
        batch_size=1,
    )
    run = RunDirectory.open(tmp_path)
    selection = make_selection(run, 3)
    train_in(run, recipe)
    assert any("1 of 2 workers have nothing to do: 3 pairs" in line for line in warned())
    plain = plain_training(tiny_model, selection.read_table().to_pylist(), recipe.train)
    trained = weights_of(run.stage("policy", 0).path)
    assert largest_difference(trained, weights_of(tiny_model)) > 1e-3
    assert largest_difference(trained, plain) < 2e-5


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_naming_step_and_pair(
    tmp_path: Path, tiny_model: Path, make_selection: Any, ray_cluster: None
) -> None:
    bad: list[str] = []

    def spoil(rows: list[dict[str, Any]]) -> None:
        rows[3]["ref_chosen_logps"] = 1e39  # finite in the table, not in float32
        bad.append(rows[3]["pair_id"])

    run = RunDirectory.open(tmp_path)
    make_selection(run, 8, spoil)
    with pytest.raises(TrainingError, match=f"loss of step 1 is not finite; pairs: {bad[0]}|{bad[0]}"):
        train_in(run, recipe_of(tiny_model))
    policy = run.stage("policy", 0)
    assert not policy.exists("model.safetensors")


def test_what_is_wrong_before_training_is_said_before_training(
    tmp_path: Path, tiny_model: Path, make_selection: Any
) -> None:
    # No Ray runs here: a check that came too late would fail otherwise than asked for.
    run = RunDirectory.open(tmp_path / "empty")
    make_selection(run, 0)
    with pytest.raises(TrainingError, match="no pairs to train on"):
        train_in(run, recipe_of(tiny_model))

    def spoil(rows: list[dict[str, Any]]) -> None:
        rows[1]["ref_rejected_logps"] = float("nan")

    def another_tokenizer(rows: list[dict[str, Any]]) -> None:
        rows[1]["chosen_tokens"] += 1

    run = RunDirectory.open(tmp_path / "tokens")
    make_selection(run, 4, another_tokenizer)
    with pytest.raises(TrainingError, match="another tokenizer or chat template"):
        train_in(run, recipe_of(tiny_model))

    run = RunDirectory.open(tmp_path / "reference")
    make_selection(run, 4, spoil)
    with pytest.raises(TrainingError, match="ref_rejected_logps is not a finite number in 1 of 4 pairs"):
        train_in(run, recipe_of(tiny_model))


@pytest.mark.slow
def test_a_reference_of_another_model_is_refused(
    tmp_path: Path, tiny_model: Path, make_selection: Any, ray_cluster: None
) -> None:
    def shift(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["ref_chosen_logps"] += 0.5  # a reward of 0.05, less than 0.05 nats a token

    run = RunDirectory.open(tmp_path)
    make_selection(run, 8, shift)
    with pytest.raises(TrainingError, match=r"margins differ by 0\.05 on average"):
        train_in(run, recipe_of(tiny_model, num_train_epochs=1))
    assert not run.stage("policy", 0).exists("model.safetensors")


@pytest.fixture(scope="session")
def undisturbed(tiny_model: Path, preference_rows: Any) -> dict[str, torch.Tensor]:
    """What the run of `long_recipe` should end with."""
    return plain_training(tiny_model, preference_rows(tiny_model, 16), long_recipe(tiny_model).train)


def long_recipe(model: Path, **train: Any) -> Recipe:
    return recipe_of(model, num_train_epochs=200, learning_rate=2e-5, save_steps=10, **train)


def kill_a_worker_after(run: RunDirectory, step: int) -> threading.Thread:
    """Kills one of this test's training workers once the metrics show the step."""

    def watch() -> None:
        policy = run.stage("policy", 0)
        deadline = time.monotonic() + 240
        # Checkpoints are on their way while training goes on: the snapshot says that one has arrived.
        arrived = "ray_train/checkpoints/checkpoint_manager_snapshot.json"
        while not (any(row["step"] >= step for row in read_metrics(policy)) and policy.exists(arrived)):
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
        workers = [
            p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())
        ]
        workers[0].kill()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def assert_kept(first: list[Row], rows: list[Row]) -> None:
    """The first attempt's rows up to its last checkpoint are still there, down to their timings."""
    kept = next(number for number, (old, new) in enumerate(zip(first, rows, strict=False)) if old != new)
    assert kept >= 10
    assert kept % 10 == 0


@pytest.mark.slow
def test_a_worker_without_memory_says_what_would_need_less(
    tmp_path: Path, tiny_model: Path, make_selection: Any, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(config: dict[str, Any]) -> None:
        torch.empty(2**50)

    monkeypatch.setattr("congrad_ray.stages.train.loop.train_worker", full)
    run = RunDirectory.open(tmp_path)
    make_selection(run, 4)
    with pytest.raises(TrainingError, match=r"can't allocate memory(.|\n)*lower train\.max_tokens_per_batch"):
        train_in(run, recipe_of(tiny_model), max_failures=0)


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "lora"), [(2, None), (3, None), (3, Lora(r=4))])
def test_killed_workers_go_on_from_the_checkpoint(
    tmp_path: Path,
    tiny_model: Path,
    make_selection: Any,
    ray_cluster: None,
    zero_stage: int,
    lora: Lora | None,
) -> None:
    run, recipe = RunDirectory.open(tmp_path), long_recipe(tiny_model, zero_stage=zero_stage, lora=lora)
    rows_of_selection = make_selection(run, 16).read_table(name="selected.parquet").to_pylist()
    undisturbed = plain_training(tiny_model, rows_of_selection, recipe.train)
    # Without restarts the command fails; the same command then resumes, and survives another kill by a restart.
    killer = kill_a_worker_after(run, 20)
    with pytest.raises(TrainingError, match="same command resumes"):
        train_in(run, recipe, max_failures=0)
    killer.join()
    policy = run.stage("policy", 0)
    first = read_metrics(policy)
    assert 20 <= first[-1]["step"] < 400
    killer = kill_a_worker_after(run, int(first[-1]["step"]) + 15)
    train_in(run, recipe, max_failures=1)
    killer.join()

    rows = read_metrics(policy)
    assert [row["step"] for row in rows] == list(range(1, 401))
    assert_kept(first, rows)
    assert largest_difference(weights_of(policy.path), undisturbed) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_another_number_of_workers_goes_on_from_the_checkpoint(
    tmp_path: Path,
    tiny_model: Path,
    make_selection: Any,
    ray_cluster: None,
    undisturbed: dict[str, torch.Tensor],
    zero_stage: int,
) -> None:
    run, recipe = RunDirectory.open(tmp_path), long_recipe(tiny_model, zero_stage=zero_stage)
    make_selection(run, 16)
    policy = run.stage("policy", 0)
    killer = kill_a_worker_after(run, 20)
    with pytest.raises(TrainingError, match="same command resumes"):
        train_in(run, recipe, max_failures=0)
    killer.join()
    first = read_metrics(policy)
    train_in(run, recipe, workers=1)
    rows = read_metrics(policy)
    assert [row["step"] for row in rows] == list(range(1, 401))
    assert_kept(first, rows)
    assert largest_difference(weights_of(policy.path), undisturbed) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "zero_stage", "gradient_checkpointing", "max_tokens_per_batch"),
    # Of 7 and 6 pairs in a step of about 55 tokens each: neither 2 nor 3 workers divide them.
    [
        (1, 2, False, 120),
        (2, 0, False, 120),
        (2, 1, False, 180),
        (2, 2, False, 180),
        (2, 3, True, 120),
        (3, 2, False, 1),
    ],
)
def test_other_layouts_give_the_same_weights(
    tmp_path: Path,
    tiny_model: Path,
    make_selection: Any,
    ray_cluster: None,
    workers: int,
    zero_stage: int,
    gradient_checkpointing: bool,
    max_tokens_per_batch: int,
) -> None:
    recipe = recipe_of(
        tiny_model,
        zero_stage=zero_stage,
        gradient_checkpointing=gradient_checkpointing,
        max_tokens_per_batch=max_tokens_per_batch,
        max_grad_norm=0.5,
    )
    run = RunDirectory.open(tmp_path)
    selection = make_selection(run, 13)
    train_in(run, recipe, workers=workers)
    plain = plain_training(tiny_model, selection.read_table().to_pylist(), recipe.train)
    assert largest_difference(weights_of(run.stage("policy", 0).path), plain) < 2e-5
    assert all(row["grad_norm"] > 0 for row in read_metrics(run.stage("policy", 0)))


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bfloat16(
    tmp_path: Path,
    tiny_model: Path,
    make_selection: Any,
    ray_cluster: None,
    zero_stage: int,
    warned: Callable[[], list[str]],
) -> None:
    run = RunDirectory.open(tmp_path)
    make_selection(run, 16)
    recipe = recipe_of(tiny_model, dtype="bfloat16", zero_stage=zero_stage, num_train_epochs=4, save_steps=3)
    train_in(run, recipe)
    policy = run.stage("policy", 0)
    rows = read_metrics(policy)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    assert AutoModelForCausalLM.from_pretrained(policy.path, dtype="auto").dtype == torch.bfloat16
    assert not warned()


@pytest.mark.slow
def test_a_run_directory_that_is_not_local(
    tmp_path: Path, tiny_model: Path, make_selection: Any, ray_cluster: None
) -> None:
    (tmp_path / "bucket").mkdir()
    run = RunDirectory(pafs.SubTreeFileSystem(str(tmp_path / "bucket"), pafs.LocalFileSystem()), "run")
    make_selection(run, 16)
    train_in(run, recipe_of(tiny_model, save_steps=2))
    folder = tmp_path / "bucket/run/iteration-0/policy"
    assert largest_difference(weights_of(folder), weights_of(tiny_model)) > 1e-4
    assert (folder / "tokenizer.json").exists()
    assert list((folder / "tensorboard").iterdir())
    assert not (folder / "ray_train").exists()


@pytest.mark.slow
def test_a_policy_on_an_object_store_is_the_one_on_a_local_path(
    tmp_path: Path,
    tiny_model: Path,
    make_selection: Any,
    ray_cluster: None,
    store_uri: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CONGRAD_RAY_CACHE", str(tmp_path / "cache"))
    # Workers of a Ray that was started before have no keys in their environment.
    runs = [
        RunDirectory.open(place) for place in (tmp_path / "run", store_uri.replace("s3://", "s3://key:secret@"))
    ]
    recipe = recipe_of(tiny_model, save_steps=2)
    outcomes = []
    for run in runs:
        make_selection(run, 16)
        outcomes.append(train_in(run, recipe))
        run.stage("policy", 0).commit("train", 0, "f", None, {}, outcomes[-1].rows, 0.0, {})
    local, store = (policy(recipe, run, 1) for run in runs)
    assert largest_difference(weights_of(local.local_path()), weights_of(store.local_path())) < 1e-6
    assert store.local_path().startswith(str(tmp_path / "cache"))
    assert store.load_tokenizer().chat_template == local.load_tokenizer().chat_template
    folder = runs[1].stage("policy", 0)
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4]
    names = {path.removeprefix(f"{folder.path}/").split("/")[0] for path in folder.files(recursive=True)}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tensorboard"} <= names
    assert "ray_train" not in names and not any(name.endswith((".bin", ".pt")) for name in names)
