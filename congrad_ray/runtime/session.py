"""Connecting to Ray: a cluster's, or one started here with enough logical CPUs for the stages to come."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
from collections import Counter

from congrad_ray.config.profile import Profile
from congrad_ray.runtime.resources import Machine, Node

# In a row, of a stage's actors; one more ends the stage.
_FAILED_STARTS = 2
# Threads that wait for others of their process otherwise spin, on cores that Ray's own processes want: with as
# many threads as cores, one that lost its core keeps all the others spinning.
_PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
_FOOTER_ACTORS = "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"


def connect(profile: Profile, cpus_needed: float) -> None:
    """Connects to the profile's address, the cluster of this job, or starts Ray here; does nothing if connected.

    `cpus_needed`: what the hungriest stage needs at once. A Ray started here gets at least as many logical CPUs:
    they are permits to run, and a stage whose actors hold all of them waits for ever for its own map tasks.
    """
    import ray

    if not ray.is_initialized():
        on_sigterm = signal.getsignal(signal.SIGTERM)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # So many actors read the footers of Parquet files in every read of Ray Data's, and end with it: 32 by
        # default, each a Python process that starts, which keeps a small machine busy for longer than the stage.
        os.environ.setdefault(_FOOTER_ACTORS, "2")
        environment = {
            _FOOTER_ACTORS: os.environ[_FOOTER_ACTORS],
            "VLLM_NO_USAGE_STATS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(profile.engines.kv_cache_gib))),
            **(_PASSIVE if profile.device == "cpu" else {}),
        }
        address = profile.ray_address
        verbose = logging.getLogger("congrad_ray").isEnabledFor(logging.DEBUG)
        level = logging.INFO if verbose else logging.WARNING
        if address:
            ray.init(
                address=address,
                log_to_driver=verbose,
                logging_level=level,
                runtime_env={"env_vars": environment},
            )
        else:
            store = profile.object_store_gib
            ray.init(
                address="local",  # never a cluster that happens to run here: it may lack the CPUs or be another's
                num_cpus=_local_cpus(profile, cpus_needed),
                object_store_memory=int(store * 2**30) if store else None,
                object_spilling_directory=profile.spill_directory,
                include_dashboard=False,
                log_to_driver=verbose,
                logging_level=level,
                runtime_env={"env_vars": environment},
            )
        # ray.init puts its own handler there, which ends the process without saying how to resume.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # An engine whose core process is killed while it starts fails in its constructor, which Ray Core does not try
    # again; by default Ray Data then gives up the whole stage.
    context.max_consecutive_actor_init_deaths = _FAILED_STARTS
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def connected() -> bool:
    """Whether this process is connected to a Ray, without importing it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def machine() -> Machine:
    """What the connected cluster has now. What its autoscaler may add, Ray does not say."""
    import ray

    found = ray.cluster_resources()
    kinds = Counter(
        ("a node", node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    )
    return Machine(
        found.get("CPU", 0.0),
        found.get("GPU", 0.0),
        found.get("memory", 0.0) / 2**30,
        "the connected Ray cluster",
        tuple(Node(*kind, count) for kind, count in kinds.items()),
    )


def this_machine(profile: Profile, cpus_needed: float) -> Machine:
    """What a Ray started here would have, without starting it."""
    gpus = 0
    if profile.device == "cuda":
        import torch

        gpus = torch.cuda.device_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpus = _local_cpus(profile, cpus_needed)
    where = f"this machine of {os.cpu_count()} cores and {memory:.0f} GiB"
    return Machine(cpus, gpus, memory, where, (Node("this machine", cpus, gpus),))


def _local_cpus(profile: Profile, cpus_needed: float) -> int:
    return profile.local_cpus or max(os.cpu_count() or 1, math.ceil(cpus_needed))
