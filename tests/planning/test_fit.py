"""Needs and refusals are pure functions with numbers in them."""

import pytest

from congrad_ray.planning.fit import DoesNotFit, Machine, between, check_fits, most_cpus, needs
from congrad_ray.profile import load_profile
from congrad_ray.recipe import Recipe
from congrad_ray.settings import validate

RECIPE = validate(
    Recipe,
    {
        "name": "test",
        "prompts": {"languages": ["en", "de"], "unseen_languages": ["fr"], "train_per_language": 100},
        "generate": {"num_generations": 4},
        "judge": {"method": "sampled", "samples": 3},
    },
    "test",
)


def test_rows_follow_the_recipe() -> None:
    rows = {need.stage: need.rows for need in needs(RECIPE, load_profile("local"))}
    assert rows == {
        "prompts": 500,
        "generate": 800,
        "judge": 2400,
        "pair": 200,
        "sketch": 200,
        "select": 200,
        "train": 100,
        "evaluate": 1200,
        "report": 300,
    }


def test_an_engine_that_takes_every_cpu_is_refused_with_numbers() -> None:
    generate = next(n for n in needs(RECIPE, load_profile("local", ["engines.cpus=2"])) if n.stage == "generate")
    with pytest.raises(DoesNotFit, match=r"generate.*at least 3 CPUs, there are 2 \(two cores\)"):
        check_fits(generate, Machine(2, 0, 8, "two cores"))
    check_fits(generate, Machine(3, 0, 8, "three cores"))


def test_gpus_that_are_not_there_are_refused_with_numbers() -> None:
    train = next(n for n in needs(RECIPE, load_profile("node-8gpu")) if n.stage == "train")
    with pytest.raises(DoesNotFit, match="needs at least 8 GPUs, there are 4"):
        check_fits(train, Machine(64, 4, 512, "half a node"))


def test_a_ray_started_here_is_given_what_the_hungriest_stage_needs() -> None:
    assert most_cpus(RECIPE, load_profile("local")) == 3
    assert most_cpus(RECIPE, load_profile("local", ["engines.max_actors=4"])) == 5


def test_ranges_are_short() -> None:
    assert [between(0, 0), between(2, 2), between(1, 8), between(0, 1)] == ["", "2", "1..8", "0..1"]
