"""No silent hang: looks whether a stage goes on, says what it waits for, and ends it when it waits in vain."""

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
_TELL_EVERY, _TELL_IF_ALL_RUNS = 120.0, 600.0
# A demand that no node can meet is no accident of starting up after this long.
_IMPOSSIBLE_AFTER = 45.0
_NOT_RUNNING = ("DEPENDENCIES_UNREADY", "PENDING_CREATION", "RESTARTING")
LEAST_DISK = 512 * 2**20
_GIB = 2**30
_T = TypeVar("_T")


class Watchdog:
    """Knows when a stage last went on."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def progressed(self) -> None:
        self._last = time.monotonic()

    @property
    def idle_seconds(self) -> float:
        return time.monotonic() - self._last


@contextmanager
def watched(label: str, timeout: float, output: Folder, grows: bool = False) -> Iterator[Watchdog]:
    """Watches the body, a stage on a connected Ray, from a thread; what it gives is to be told of every progress.

    The body raises StageStopped
    - after `timeout` seconds without progress, with what waits for what;
    - sooner, where an actor or task asks for more than any node has, unless the cluster `grows`;
    - where the disk of a local `output` is about to be full: Ray and the run directory both need some.
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
    told = 0.0
    while not ended.wait(min(_LOOK_EVERY, timeout / 4)):
        idle = watchdog.idle_seconds
        reason = _why_to_stop(idle, timeout, output, grows)
        if reason:
            stop(f"{label} was stopped, for {reason}")
            return
        if idle < _TELL_EVERY:
            told = 0.0
        elif idle - told >= (_TELL_EVERY if _known(unmet) else _TELL_IF_ALL_RUNS):
            told = idle
            logger.info(f"nothing for {idle:.0f} s; the stage is stopped after {timeout:.0f} s{_waits()}")


def _why_to_stop(idle: float, timeout: float, output: Folder, grows: bool) -> str | None:
    free = free_disk(output)
    if free is not None and free < LEAST_DISK:
        return (
            f"only {free / _GIB:.2f} GiB are free on the disk of {output.path}: make room; the same command goes "
            "on with what is missing"
        )
    impossible = _known(never_met) if idle >= _IMPOSSIBLE_AFTER and not grows else None
    if impossible:
        return (
            f"it waits for what no node of the cluster has: {'; '.join(impossible)}. Lower cpus or gpus of an "
            f"actor in the profile, or add larger nodes.{_waits()}"
        )
    if idle >= timeout:
        return (
            f"nothing came of it for {idle:.0f} s (stall_timeout_s {timeout:g}). What is written is kept and the "
            f"same command goes on.{_waits()}"
        )
    return None


def _waits() -> str:
    """`what_waits` from a new line on, where Ray answers."""
    found = _known(what_waits)
    return f"\n{found}" if found else ""


def _known(question: Callable[[], _T]) -> _T | None:
    """The answer of a Ray that may be what hangs or fails: the watch must go on without it."""
    try:
        return question()
    except Exception:
        return None


def free_disk(folder: Folder) -> int | None:
    """Free bytes on the disk of a local folder (or of what there is above it); None on an object store."""
    if not folder.is_local:
        return None
    return shutil.disk_usage(nearest_folder(Path(folder.path))).free


def never_met() -> list[str]:
    """What actors and tasks ask for that no node of the connected cluster could give even if it were idle."""
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
    """What the connected Ray is doing: operators, actors that do not run, unmet demands, resources in use."""
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
    """What the stage asked the connected Ray for and does not have: actors that do not run, unmet demands."""
    import ray

    lines = []
    actors = Counter(
        (actor.get("ActorClassName", "an actor"), actor["State"]) for actor in ray._private.state.actors().values()
    )
    missing = [f"{name} {state} ({count})" for (name, state), count in actors.items() if state in _NOT_RUNNING]
    if missing:
        lines.append(f"actors that do not run: {', '.join(missing)}")
    waiting = Counter(f"{_resources(bundle)} for {what}" for what, bundle in _demands(_cluster_status()))
    if waiting:
        lines.append(f"waiting for: {', '.join(f'{text} ({count})' for text, count in waiting.items())}")
    return lines


def _operators() -> list[str]:
    """Every operator of the running Ray Data plans and how far it is."""
    import ray
    from ray.data._internal.stats import get_or_create_stats_actor

    actor: Any = get_or_create_stats_actor()

    def datasets_of_actor() -> dict[str, Any]:
        get: Any = ray.get  # whose annotations miss a single reference with a timeout
        found: dict[str, Any] = get(actor.get_datasets.remote(), timeout=5)
        return found

    datasets = _known(datasets_of_actor)
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
