"""Small actors that live where the driver does and die with it, one of each kind."""

from __future__ import annotations

from typing import Any

_actors: dict[tuple[str, str, type], Any] = {}


def driver_actor(kind: type) -> Any:
    """The actor of this class of the connected Ray's driver, made on first use. It takes no CPU."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    context = ray.get_runtime_context()
    # Every Ray counts its jobs from 1, and a handle of another Ray ends this process; a node's id is its own.
    here = (context.get_node_id(), context.get_job_id())
    for key in [key for key in _actors if key[:2] != here]:
        del _actors[key]  # of a Ray that this process was connected to before
    if (*here, kind) not in _actors:
        with_driver = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=True)
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": with_driver}
        _actors[(*here, kind)] = ray.remote(kind).options(**options).remote()
    return _actors[(*here, kind)]
