"""Needs and refusals are pure functions with numbers in them."""

import pytest

from congrad_ray.config.profile import Cluster, Profile, load_profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import validate
from congrad_ray.pipeline.order import STAGES
from congrad_ray.pipeline.plan import demands, max_cpus
from congrad_ray.runtime.resources import (
    Demand,
    DoesNotFit,
    Machine,
    Node,
    between,
    check_fits,
    cluster_machine,
    pool_sizes,
)

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
    rows = {need.stage: need.rows for need in demands(RECIPE, load_profile("local"))}
    assert rows == {
        "prompts": 500,
        "baseline": 600,
        "generate": 800,
        "judge": 2400,
        "pair": 200,
        "sketch": 200,
        "select": 200,
        "train": 100,
        "evaluate": 600,
        "report": 300,
    }


def test_an_engine_that_takes_every_cpu_is_refused_with_numbers() -> None:
    generate = STAGES["generate"].demand(RECIPE, load_profile("local", ["engines.cpus=2"]))
    with pytest.raises(DoesNotFit, match=r"generate.*at least 3 CPUs, there are 2 \(two cores\)"):
        check_fits(generate, Machine(2, 0, 8, "two cores"))
    check_fits(generate, Machine(3, 0, 8, "three cores"))


def test_gpus_that_are_not_there_are_refused_with_numbers() -> None:
    train = STAGES["train"].demand(RECIPE, load_profile("node-8gpu"))
    with pytest.raises(DoesNotFit, match="needs at least 8 GPUs, there are 4"):
        check_fits(train, Machine(64, 4, 512, "half a node"))


def test_a_ray_started_here_is_given_what_the_hungriest_stage_needs() -> None:
    assert max_cpus(RECIPE, load_profile("local")) == 3
    assert max_cpus(RECIPE, load_profile("local", ["engines.max_actors=4"])) == 5


def test_ranges_are_short() -> None:
    assert [between(0, 0), between(2, 2), between(1, 8), between(0, 1)] == ["", "2", "1..8", "0..1"]


def need_of(stage: str, overrides: list[str], profile: str = "aws-a100") -> tuple[Demand, Cluster]:
    where = load_profile(profile, overrides)
    assert where.cluster is not None
    return STAGES[stage].demand(RECIPE, where), where.cluster


def test_an_actor_larger_than_any_node_is_refused_before_a_node_is_asked_for() -> None:
    need, cluster = need_of("sketch", ["sketchers.gpus=16", "sketchers.max_actors=1"])
    with pytest.raises(DoesNotFit, match=r"sketch.*2 CPUs and 16 GPUs on one node.*gpu: 96 CPUs, 8 GPUs"):
        check_fits(need, cluster_machine(cluster))
    need, cluster = need_of("train", ["trainers.cpus=97", "trainers.num_workers=1"])
    with pytest.raises(DoesNotFit, match=r"97 CPUs and 1 GPUs on one node.*trainers\.cpus"):
        check_fits(need, cluster_machine(cluster))


def test_an_engine_may_lie_on_several_nodes_but_not_its_bundles() -> None:
    wide = ["engines.tensor_parallel_size=16", "engines.gpus=16", "engines.cpus=16", "engines.max_actors=1"]
    need, cluster = need_of("generate", wide)
    check_fits(need, cluster_machine(cluster))
    need, cluster = need_of("generate", [*wide, "engines.cpus=1600"])
    with pytest.raises(DoesNotFit, match="100 CPUs"):
        check_fits(need, Machine(10_000, 64, 1, "many"), cluster)


def test_actors_that_leave_gpus_over_on_every_node_are_counted_node_by_node() -> None:
    need, cluster = need_of("sketch", ["sketchers.gpus=5", "sketchers.min_actors=3", "sketchers.max_actors=3"])
    machine = cluster_machine(cluster)
    assert need.min_gpus == 15 <= machine.gpus
    with pytest.raises(DoesNotFit, match=r"needs 3 times 2 CPUs and 5 GPUs at once, .* room for 2"):
        check_fits(need, machine)


def test_nodes_that_the_profile_can_still_bring_up_count() -> None:
    need, cluster = need_of("sketch", [])
    small = Machine(8, 8, 64, "the head so far", (Node("a node", 8, 0),))
    check_fits(need, small, cluster)
    with pytest.raises(DoesNotFit, match="on one node, and no node has them"):
        check_fits(need, small)


def test_a_pool_asks_for_all_at_once_where_nodes_can_come_and_for_no_more_than_there_is_work() -> None:
    pool = {"min_actors": 2, "max_actors": 8, "cpus": 2.0}
    fixed = Profile.model_validate({"name": "x", "sketchers": pool})
    assert [pool_sizes(fixed.sketchers, fixed, batches) for batches in (1, 5, 100)] == [(2, 2), (2, 5), (2, 8)]
    nodes = [{"name": "worker", "cpus": 4, "memory_gib": 1, "max_nodes": 3}]
    cluster = {"provider": "other", "head": {"name": "head", "cpus": 0, "memory_gib": 1}, "workers": nodes}
    grows = Profile.model_validate({"name": "x", "sketchers": pool, "cluster": cluster})
    # 12 CPUs, one of them for reading and writing: five actors.
    assert [pool_sizes(grows.sketchers, grows, batches) for batches in (1, 3, 100)] == [(2, 2), (3, 3), (5, 5)]


def test_a_cluster_that_grows_from_nothing_is_no_small_one() -> None:
    nodes = [{"name": "worker", "cpus": 4, "memory_gib": 1, "max_nodes": 3}]
    cluster = {"provider": "other", "head": {"name": "head", "cpus": 0, "memory_gib": 1}, "workers": nodes}
    profile = Profile.model_validate({"name": "x", "cluster": cluster})
    empty = Machine(0, 0, 0, "the connected Ray cluster", (Node("a node", 0, 0),))
    for need in demands(RECIPE, profile):
        check_fits(need, empty, profile.cluster)
    with pytest.raises(DoesNotFit, match="what an autoscaler may add is set in the profile's section cluster"):
        check_fits(demands(RECIPE, profile)[1], empty)
