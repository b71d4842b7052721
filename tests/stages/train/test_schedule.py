from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from congrad_ray.config.profile import load_profile
from congrad_ray.config.recipe import load_recipe
from congrad_ray.config.training import Train
from congrad_ray.stages.train.arguments import deepspeed_config
from congrad_ray.stages.train.schedule import TrainingError, learning_rate, make_schedule, pair_tokens, passes_of


@given(pairs=st.integers(1, 200), batch_size=st.integers(1, 40), seed=st.integers(0, 3))
def test_every_pair_is_trained_on_once_an_epoch(pairs: int, batch_size: int, seed: int) -> None:
    train = Train(batch_size=batch_size, num_train_epochs=2, seed=seed)
    schedule = make_schedule(train, pairs)
    for epoch in range(2):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        batches = [schedule.batch(step) for step in steps]
        assert sorted(index for batch in batches for index in batch) == list(range(pairs))
        sizes = {len(batch) for batch in batches}
        assert max(sizes) == schedule.largest_batch <= train.batch_size
        assert max(sizes) - min(sizes) <= 1


@given(
    tokens=st.lists(st.integers(1, 100), min_size=1, max_size=60),
    budget=st.integers(1, 150),
    workers=st.integers(1, 5),
    data=st.data(),
)
def test_passes_keep_to_the_budget_on_all_workers(
    tokens: list[int], budget: int, workers: int, data: st.DataObject
) -> None:
    batch = data.draw(st.lists(st.sampled_from(range(len(tokens))), unique=True, min_size=1))
    passes = passes_of(batch, tokens, budget, workers)
    assert all(len(shares) == workers for shares in passes)
    shares = [share for shares in passes for share in shares]
    assert sorted(index for share in shares for index in share) == sorted(batch)
    loads = [sum(tokens[index] for index in share) for share in shares]
    assert all(load <= budget or len(share) == 1 for share, load in zip(shares, loads, strict=True))
    assert loads == sorted(loads, reverse=True)  # the largest pass first, and shares of like size in a pass
    assert loads.count(0) == max(0, len(shares) - len(batch))  # no worker is idle while another has two pairs
    # No more passes than twice what any rule needs, and one: of two neighbouring shares one is half full.
    needed = sum(min(tokens[index], budget) for index in batch) / (budget * workers)
    assert len(passes) <= max(1, math.ceil(2 * needed) + 1)
    assert passes == passes_of(batch[::-1], tokens, budget, workers)


@given(
    tokens=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    passes=st.integers(1, 4),
    workers=st.integers(1, 4),
)
def test_shares_differ_by_no_more_than_a_pair(tokens: list[int], passes: int, workers: int) -> None:
    budget = sum(tokens)  # all fit into one pass
    shares = passes_of(range(len(tokens)), tokens, budget, workers)[0]
    loads = [sum(tokens[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(tokens)


def test_a_pair_above_the_budget_gets_a_pass_of_its_own() -> None:
    assert passes_of([0, 1, 2], [10, 3, 100], budget=20, workers=1) == [[[2]], [[0, 1]]]
    assert passes_of([0, 1, 2], [10, 3, 100], budget=20, workers=2) == [[[2], [0, 1]]]


def test_shares_of_similar_size_make_a_pass() -> None:
    assert passes_of(range(6), [50, 100, 90, 30, 40, 10], budget=100, workers=2) == [
        [[1], [2]],
        [[4, 3], [0, 5]],
    ]


@pytest.mark.parametrize(("tokens", "budget", "workers"), [([5], 0, 1), ([5], 1, 0), ([0], 1, 1)])
def test_passes_of_nothing_are_an_error(tokens: list[int], budget: int, workers: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        passes_of([0], tokens, budget, workers)


def test_the_tokens_of_a_pair_count_its_prompt_once() -> None:
    table = pa.table({"prompt_tokens": [5, 6], "chosen_tokens": [10, 20], "rejected_tokens": [100, 200]})
    assert pair_tokens(table) == [115, 226]
    assert pair_tokens(table, shared=False) == [210, 412]
    with pytest.raises(TrainingError, match=r"no column chosen_tokens, rejected_tokens.*select stage again"):
        pair_tokens(table.select(["prompt_tokens"]))


def test_the_order_depends_on_seed_and_epoch() -> None:
    def batches(seed: int) -> list[list[int]]:
        train = Train(batch_size=8, num_train_epochs=2, seed=seed)
        schedule = make_schedule(train, 32)
        return [schedule.batch(step) for step in range(schedule.total_steps)]

    assert batches(0) == batches(0)
    assert batches(0) != batches(1)
    assert batches(0)[:4] != batches(0)[4:]


def test_a_number_of_steps_overrides_the_epochs() -> None:
    train = Train(batch_size=4, num_train_epochs=1, max_steps=7)
    schedule = make_schedule(train, 10)  # three steps an epoch
    assert schedule.total_steps == 7
    seen = [index for step in range(7) for index in schedule.batch(step)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert make_schedule(train, 1000).total_steps == 7


RECIPES = Path(__file__).resolve().parents[3] / "jobs" / "recipes"
PROFILES = RECIPES.parents[1] / "congrad_ray" / "config" / "profiles"


@pytest.mark.parametrize("profile", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_keeps_all_workers_of_every_profile_busy(recipe: Path, profile: Path) -> None:
    train, workers = load_recipe(recipe).train, load_profile(profile).trainers.num_workers
    assert make_schedule(train, 10 * train.batch_size).largest_batch >= workers


def test_no_pairs_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no pairs to train on"):
        make_schedule(Train(), pairs=0)


def test_learning_rates() -> None:
    linear = Train(learning_rate=1.0, warmup_ratio=0.2, lr_scheduler_type="linear")
    assert [learning_rate(linear, step, 10) for step in range(10)] == pytest.approx(
        [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    cosine = Train(learning_rate=1.0, warmup_ratio=0.0, lr_scheduler_type="cosine")
    assert [learning_rate(cosine, step, 4) for step in range(4)] == pytest.approx(
        [1.0, 0.85355339, 0.5, 0.14644661]
    )
    # As transformers' cosine_with_min_lr: what falls is the rest.
    assert [learning_rate(cosine.model_copy(update={"min_lr_rate": 0.2}), step, 4) for step in range(4)] == (
        pytest.approx([1.0, 0.2 + 0.8 * 0.85355339, 0.6, 0.2 + 0.8 * 0.14644661])
    )
    falling = Train(learning_rate=2.0, warmup_ratio=0.0, lr_scheduler_type="linear", min_lr_rate=0.5)
    assert [learning_rate(falling, step, 4) for step in range(4)] == pytest.approx([2.0, 1.75, 1.5, 1.25])
    constant = Train(learning_rate=1.0, warmup_ratio=0.5, lr_scheduler_type="constant")
    assert [learning_rate(constant, step, 4) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    only_warmup = Train(learning_rate=1.0, warmup_ratio=1.0)
    assert learning_rate(only_warmup, 0, 1) == 1.0


def test_deepspeed_gets_what_the_recipe_says() -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}
    train = Train(zero_stage=3, max_grad_norm=0.5, deepspeed={"zero_optimization": offload, "seed": 1})
    config = deepspeed_config(train, "bfloat16", workers=4)
    # The three sizes must multiply out.
    assert config["train_batch_size"] == 4
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] == 1
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert config["seed"] == 1
    assert config["bf16"]["enabled"] is True
    assert config["gradient_clipping"] == 0.5
    # DeepSpeed refuses any other mix of types.
    for stage, dtype, added_up_in in ((3, "bfloat16", "fp32"), (0, "bfloat16", "bf16"), (0, "float32", "fp32")):
        config = deepspeed_config(Train(zero_stage=stage), dtype, workers=1)
        assert config["data_types"] == {"grad_accum_dtype": added_up_in}
