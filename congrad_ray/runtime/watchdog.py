"""No silent hang: watches a stage's progress, reports what it waits for, and stops it if that never comes."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from congrad_ray.rundir.directory import Folder, nearest_folder
from congrad_ray.runtime.interrupts import Stop, stoppable
from congrad_ray.runtime.logs import inherited

logger = logging.getLogger(__name__)

_LOOK_EVERY = 5.0
# Where all that the stage asked for is running, a wait of minutes is work: loading a model, a step of training.
_REPORT_EVERY, _REPORT_IF_ALL_RUNS = 120.0, 600.0
# A demand that no node can meet after this long is not one that start-up will still resolve.
_IMPOSSIBLE_AFTER = 45.0
_NOT_RUNNING = ("DEPENDENCIES_UNREADY", "PENDING_CREATION", "RESTARTING")
MIN_DISK = 512 * 2**20
_GIB = 2**30
# Name and namespace of the actor in which Ray Data keeps the state of its plans.
_DATA_STATS = ("datasets_stats_actor", "_dataset_stats_actor")
_T = TypeVar("_T")


class Watchdog:
    """Knows when a stage last made progress."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def progressed(self) -> None:
        self._last = time.monotonic()

    @property
    def idle_seconds(self) -> float:
        return time.monotonic() - self._last


@contextmanager
def watched(label: str, timeout: float, output: Folder, grows: bool = False) -> Iterator[Watchdog]:
    """Watches the body, a stage on a connected Ray, from a thread. The body reports by `progressed`.

    The body raises StageStopped
    - after `timeout` seconds without progress, with a report of what waits for what;
    - sooner, if an actor or task asks for more than any node has, unless the cluster `grows`;
    - if the disk of a local `output` is almost full: Ray and the run directory both need space.
    """
    watchdog, ended = Watchdog(), threading.Event()
    with stoppable() as stop:
        thread = threading.Thread(
            target=inherited(_watch), args=(watchdog, ended, label, timeout, output, grows, stop), daemon=True
        )
        thread.start()
        try:
            yield watchdog
        finally:
            ended.set()
            thread.join()


def _watch(
    watchdog: Watchdog,
    ended: threading.Event,
    label: str,
    timeout: float,
    output: Folder,
    grows: bool,
    stop: Stop,
) -> None:
    reported = 0.0
    while not ended.wait(min(_LOOK_EVERY, timeout / 4)):
        idle = watchdog.idle_seconds
        reason = _why_to_stop(idle, timeout, output, grows)
        if reason:
            stop(f"{label} was stopped: {reason}")
            return
        if idle < _REPORT_EVERY:
            reported = 0.0
        elif idle - reported >= (_REPORT_EVERY if _known(unmet) else _REPORT_IF_ALL_RUNS):
            reported = idle
            logger.info(f"no progress for {idle:.0f} s; the stage is stopped after {timeout:.0f} s{_waits()}")


def _why_to_stop(idle: float, timeout: float, output: Folder, grows: bool) -> str | None:
    free = free_disk(output)
    if free is not None and free < MIN_DISK:
        return (
            f"only {free / _GIB:.2f} GiB are free on the disk of {output.path}. Make room, then run the same "
            "command again to resume."
        )
    impossible = _known(never_met) if idle >= _IMPOSSIBLE_AFTER and not grows else None
    if impossible:
        return (
            f"no node of the cluster has what it asks for: {'; '.join(impossible)}. Lower cpus or gpus of the "
            f"actors in the profile, or add larger nodes.{_waits()}"
        )
    if idle >= timeout:
        return (
            f"no progress for {idle:.0f} s (stall_timeout_s is {timeout:g}). What is written is kept; run the "
            f"same command again to resume.{_waits()}"
        )
    return None


def _waits() -> str:
    """`what_waits` on new lines, if Ray answers."""
    found = _known(what_waits)
    return f"\n{found}" if found else ""


def _known(question: Callable[[], _T]) -> _T | None:
    """What Ray answers; None if it does not. It may be Ray that hangs or fails, and the watch must continue."""
    import ray

    if not ray.is_initialized():  # Ray's functions would connect, or start one
        return None
    try:
        return question()
    except Exception:
        return None


def free_disk(folder: Folder) -> int | None:
    """Free bytes on the disk of a local folder (or its nearest parent that exists); None on an object store."""
    if not folder.is_local:
        return None
    return shutil.disk_usage(nearest_folder(Path(folder.path))).free


def never_met() -> list[str]:
    """What actors and tasks ask for that no node of the connected cluster has, even when idle."""
    status = _cluster_status()
    nodes = [
        {usage.resource_name: usage.total for usage in node.resource_usage.usage}
        for node in (*status.active_nodes, *status.idle_nodes)
    ]
    return [
        f"{_resources(bundle)} for {what}"
        for what, bundle in _demands(status)
        if not any(all(node.get(name, 0.0) >= amount for name, amount in bundle.items()) for node in nodes)
    ]


def what_waits() -> str:
    """What the connected Ray is doing: operators, actors that are not running, unmet demands, resources."""
    lines = []
    operators = _operators()
    if operators:
        lines.append(f"operators: {', '.join(operators)}")
    lines += unmet()
    status = _cluster_status()
    in_use = [
        f"{usage.resource_name} {_amount(usage.resource_name, usage.used)} of "
        f"{_amount(usage.resource_name, usage.total)}"
        for usage in sorted(status.cluster_resource_usage, key=lambda usage: usage.resource_name)
        if usage.resource_name in ("CPU", "GPU", "memory")
    ]
    lines.append(f"in use: {', '.join(in_use)}; {len(status.pending_nodes)} nodes are being started")
    lines.append("logs: /tmp/ray/session_latest/logs on the node in question")
    return "\n".join(f"  {line}" for line in lines)


def unmet() -> list[str]:
    """What the stage asked the connected Ray for and does not have: actors that are not running, unmet demands."""
    lines = []
    actors = Counter((name, state) for name, state in _actors() if state in _NOT_RUNNING)
    if actors:
        missing = [f"{name} {state} ({count})" for (name, state), count in actors.items()]
        lines.append(f"actors that are not running: {', '.join(missing)}")
    waiting = Counter(f"{_resources(bundle)} for {what}" for what, bundle in _demands(_cluster_status()))
    if waiting:
        lines.append(f"waiting for: {', '.join(f'{text} ({count})' for text, count in waiting.items())}")
    return lines


def _actors() -> list[tuple[str, str]]:
    """The class and state of every actor of the connected Ray.

    The only use of a private part of Ray. The public `ray.util.state.list_actors` asks the dashboard, which a Ray
    started by `session.connect` does not have; it would then ask port 8265, where another Ray may answer.
    """
    import ray

    actors = ray._private.state.actors().values()
    return [(actor.get("ActorClassName", "an actor"), actor["State"]) for actor in actors]


def _operators() -> list[str]:
    """Every operator of the running Ray Data plans, with its progress."""
    import ray

    def running_datasets() -> dict[str, Any]:
        get: Any = ray.get  # whose annotations miss a single reference with a timeout
        actor: Any = ray.get_actor(*_DATA_STATS)
        found: dict[str, Any] = get(actor.get_datasets.remote(), timeout=5)
        return found

    datasets = _known(running_datasets)
    return [
        f"{operator['name']} (done {operator['progress']}, queued {operator['queued_blocks']})"
        for dataset in (datasets or {}).values()
        if dataset["state"] == "RUNNING"
        for operator in dataset["operators"].values()
        if operator["state"] == "RUNNING"
    ]


def _cluster_status() -> Any:
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    return get_cluster_status(ray.get_runtime_context().gcs_address)


def _demands(status: Any) -> Iterator[tuple[str, dict[str, float]]]:
    """Unmet demands as (who, resources of one bundle)."""
    found = status.resource_demands
    for demand in found.ray_task_actor_demand:
        for counted in demand.bundles_by_count:
            yield from [("a task or actor", counted.bundle)] * min(counted.count, 100)
    for demand in found.placement_group_demand:
        for counted in demand.bundles_by_count:
            yield from [("a placement group", counted.bundle)] * min(counted.count, 100)


def _resources(bundle: dict[str, float]) -> str:
    return ", ".join(f"{name} {_amount(name, amount)}" for name, amount in sorted(bundle.items()))


def _amount(name: str, amount: float) -> str:
    return f"{amount / _GIB:.1f} GiB" if "memory" in name else f"{amount:g}"
