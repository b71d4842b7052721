"""A training worker whose node is lost and does not come back, on a Ray cluster of several nodes."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from congrad_ray.config.profile import Profile, Workers
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.context import Context
from congrad_ray.stages.train.metrics import read_metrics
from congrad_ray.stages.train.stage import STAGE
from plain_training import largest_difference, plain_training, recipe_of, weights_of

_STORE = 150 * 2**20


@pytest.mark.slow
def test_training_goes_on_with_fewer_workers(
    tmp_path: Path, tiny_model: Path, make_selection: Any, preference_rows: Any
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    nodes = {"object_store_memory": _STORE}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, **nodes})
    # A node with room for one worker; the head has room for the driver's side and the other worker.
    lost = cluster.add_node(num_cpus=1, resources={"spare": 1}, **nodes)
    cluster.wait_for_nodes(timeout=120)
    run = RunDirectory.open(tmp_path)
    make_selection(run, 16)
    recipe = recipe_of(tiny_model, num_train_epochs=200, learning_rate=2e-5, save_steps=10, zero_stage=2)
    policy = run.stage("policy", 0)

    def lose() -> None:
        deadline = time.monotonic() + 240
        arrived = "ray_train/checkpoints/checkpoint_manager_snapshot.json"
        while not (any(row["step"] >= 20 for row in read_metrics(policy)) and policy.exists(arrived)):
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
        cluster.remove_node(lost, allow_graceful=False)

    thread = threading.Thread(target=lose, daemon=True)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        workers = Workers(num_workers=2, min_workers=1, cpus=1.0, max_failures=3)
        profile = Profile(name="test", address=cluster.address, trainers=workers)
        thread.start()
        outcome = STAGE.run(Context(recipe, profile, run, 0, policy))
        thread.join()
        assert len([node for node in ray.nodes() if node["Alive"]]) == 1
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert outcome.counters["steps"] == 400
    assert [row["step"] for row in read_metrics(policy)] == list(range(1, 401))
    undisturbed = plain_training(tiny_model, preference_rows(tiny_model, 16), recipe.train)
    assert largest_difference(weights_of(policy.path), undisturbed) < 2e-5
