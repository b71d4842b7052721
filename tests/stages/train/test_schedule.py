from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from congrad_ray.config.profile import load_profile
from congrad_ray.config.recipe import Train, load_recipe
from congrad_ray.stages.train.engine import deepspeed_config
from congrad_ray.stages.train.schedule import TrainingError, learning_rate, make_schedule, micro_batches


@given(
    pairs=st.integers(1, 200),
    batch_size=st.integers(1, 40),
    micro=st.integers(1, 4),
    workers=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_every_pair_is_trained_on_once_an_epoch(
    pairs: int, batch_size: int, micro: int, workers: int, seed: int
) -> None:
    train = Train(batch_size=batch_size, micro_batch_size=micro, num_train_epochs=2, seed=seed)
    schedule = make_schedule(train, pairs, workers)
    accumulation = schedule.accumulation
    # No more passes than the batch size needs, and no fewer than keep to the micro-batch size.
    assert (accumulation - 1) * micro * workers < batch_size
    for epoch in range(2):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        batches = [schedule.batch(step) for step in steps]
        assert sorted(index for batch in batches for index in batch) == list(range(pairs))
        sizes = {len(batch) for batch in batches}
        assert max(sizes) <= train.batch_size
        assert max(sizes) - min(sizes) <= 1
        for batch in batches:
            passes = micro_batches(batch, list(range(pairs)), accumulation, workers)
            assert len(passes) == accumulation
            assert all(len(shares) == workers for shares in passes)
            assert max(len(share) for shares in passes for share in shares) <= micro
            assert max(sum(map(len, shares)) for shares in passes) <= schedule.pairs_per_pass
            assert sorted(i for shares in passes for share in shares for i in share) == sorted(batch)


def test_the_order_does_not_depend_on_the_workers_but_on_seed_and_epoch() -> None:
    def batches(workers: int, seed: int) -> list[list[int]]:
        train = Train(batch_size=8, micro_batch_size=2, num_train_epochs=2, seed=seed)
        schedule = make_schedule(train, 32, workers)
        return [schedule.batch(step) for step in range(schedule.total_steps)]

    assert batches(1, 0) == batches(4, 0)
    assert batches(1, 0) != batches(1, 1)
    assert batches(1, 0)[:4] != batches(1, 0)[4:]


def test_pairs_of_similar_length_share_a_pass() -> None:
    lengths = [5, 100, 6, 101, 7, 102, 8, 103]
    assert micro_batches(list(range(8)), lengths, accumulation=2, workers=2) == [
        [[7, 3], [5, 1]],
        [[6, 2], [4, 0]],
    ]


def test_a_number_of_steps_overrides_the_epochs() -> None:
    train = Train(batch_size=4, micro_batch_size=2, num_train_epochs=1, max_steps=7)
    schedule = make_schedule(train, 10, 1)  # three steps an epoch
    assert schedule.total_steps == 7
    seen = [index for step in range(7) for index in schedule.batch(step)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert make_schedule(train, 1000, 1).total_steps == 7


def test_a_batch_need_not_be_a_multiple_of_anything() -> None:
    schedule = make_schedule(Train(batch_size=32, micro_batch_size=5), pairs=1000, workers=3)
    assert (schedule.accumulation, schedule.pairs_per_pass) == (3, 11)
    shares = micro_batches(schedule.batch(0), list(range(1000)), 3, 3)
    assert [[len(share) for share in one] for one in shares] == [[4, 4, 3], [4, 4, 3], [4, 3, 3]]
    # Fewer pairs than a batch need fewer passes, and no worker waits for want of them.
    few = make_schedule(Train(batch_size=32, micro_batch_size=2), pairs=4, workers=4)
    assert (few.accumulation, few.pairs_per_pass) == (1, 4)


RECIPES = Path(__file__).resolve().parents[3] / "jobs" / "recipes"
PROFILES = RECIPES.parents[1] / "congrad_ray" / "config" / "profiles"


@pytest.mark.parametrize("profile", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_keeps_all_workers_of_every_profile_busy(recipe: Path, profile: Path) -> None:
    train, workers = load_recipe(recipe).train, load_profile(profile).trainers.num_workers
    pairs = 10 * train.batch_size
    schedule = make_schedule(train, pairs, workers)
    config = deepspeed_config(train, schedule, "float32")
    assert config["train_batch_size"] == (
        config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * workers
    )
    for step in range(schedule.steps_per_epoch):
        passes = micro_batches(schedule.batch(step), list(range(pairs)), schedule.accumulation, workers)
        assert all(any(shares[worker] for shares in passes) for worker in range(workers))
        assert max(len(share) for shares in passes for share in shares) <= train.micro_batch_size


def test_no_pairs_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no pairs to train on"):
        make_schedule(Train(), pairs=0, workers=1)


def test_learning_rates() -> None:
    linear = Train(learning_rate=1.0, warmup_ratio=0.2, lr_scheduler_type="linear")
    assert [learning_rate(linear, step, 10) for step in range(10)] == pytest.approx(
        [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )
    cosine = Train(learning_rate=1.0, warmup_ratio=0.0, lr_scheduler_type="cosine")
    assert [learning_rate(cosine, step, 4) for step in range(4)] == pytest.approx(
        [1.0, 0.85355339, 0.5, 0.14644661]
    )
    constant = Train(learning_rate=1.0, warmup_ratio=0.5, lr_scheduler_type="constant")
    assert [learning_rate(constant, step, 4) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    only_warmup = Train(learning_rate=1.0, warmup_ratio=1.0)
    assert learning_rate(only_warmup, 0, 1) == 1.0


def test_deepspeed_gets_sizes_that_multiply_out() -> None:
    train = Train(batch_size=24, micro_batch_size=3, zero_stage=3, max_grad_norm=0.5)
    config = deepspeed_config(train, make_schedule(train, 100, 4), "bfloat16")
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 4 == 24
    uneven = deepspeed_config(train, make_schedule(train, 100, 5), "bfloat16")
    assert uneven["train_batch_size"] == uneven["train_micro_batch_size_per_gpu"] * 2 * 5 == 30
    assert config["zero_optimization"]["stage"] == 3
    assert config["bf16"]["enabled"] is True
    assert config["gradient_clipping"] == 0.5
