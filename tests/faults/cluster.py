"""A Ray cluster of several nodes on this machine, whose processes can be found and killed."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

WORKER_NODES = 2
# The head only coordinates, so that whatever works is on a node that can be killed. One worker node alone has the
# CPUs for any stage, so that a driver that starts while the other is gone finds enough.
HEAD_CPUS = 0
NODE_CPUS = 3
_OBJECT_STORE = 150 * 2**20
_NODE = {"num_cpus": NODE_CPUS, "object_store_memory": _OBJECT_STORE}
_STARTED_AFTER = 180.0  # seconds; a busy machine is slow


class LocalCluster:
    """One head and several worker nodes: real raylets, each with its own workers and object store."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": HEAD_CPUS,
                "object_store_memory": _OBJECT_STORE,
                "include_dashboard": False,
            },
        )
        for _ in range(WORKER_NODES):
            self._cluster.add_node(wait=False, **_NODE)
        self._cluster.wait_for_nodes(timeout=_STARTED_AFTER)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add_node(self) -> None:
        """Starts a worker node; it joins in its own time, as the replacement of a lost machine does."""
        with _same_handlers():
            self._cluster.add_node(wait=False, **_NODE)

    def worker_nodes(self) -> list[Any]:
        return sorted(self._cluster.worker_nodes, key=_raylet)

    def kill_node(self, node: Any) -> None:
        """As a machine that loses its power: the raylet and all its workers at once, no goodbye to anybody."""
        running = workers(node)
        with suppress(ProcessLookupError):
            os.kill(_raylet(node), signal.SIGKILL)
        for process in running:
            kill(process)
        self._cluster.remove_node(node, allow_graceful=False)

    def replace_dead_nodes(self) -> int:
        """Brings new nodes for those that ended by themselves, as on a machine that stalls; says how many."""
        dead = [node for node in self.worker_nodes() if not _is_alive(node)]
        for node in dead:
            self._cluster.remove_node(node, allow_graceful=False)
            self.add_node()
        return len(dead)

    def nodes(self) -> list[Any]:
        return list(self._cluster.list_all_nodes())

    def task_events(self) -> list[Any]:
        """What the cluster knows of every attempt of every task (protocol buffers of Ray's `TaskEvents`)."""
        return list(self._cluster.global_state._get_all_task_events())

    def shutdown(self) -> None:
        self._cluster.shutdown()


@contextmanager
def local_cluster() -> Iterator[LocalCluster]:
    """A cluster of its own under a folder of its own: other Rays on this machine neither see nor mind it."""
    # Ray's sockets lie there, and the path of a socket may have 107 characters.
    folder = tempfile.mkdtemp(prefix="faults-")
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder
    cluster = None
    try:
        with _same_handlers():
            cluster = LocalCluster()
        yield cluster
    finally:
        try:
            if cluster is not None:
                cluster.shutdown()
        finally:
            for process in left_over(folder):
                kill(process)
            if before is None:
                del os.environ["RAY_TMPDIR"]
            else:
                os.environ["RAY_TMPDIR"] = before
            shutil.rmtree(Path(folder), ignore_errors=True)


@contextmanager
def _same_handlers() -> Iterator[None]:
    """Every node that Ray starts puts a handler of its own there, after which SIGTERM unwinds nothing of ours."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def left_over(folder: str) -> list[psutil.Process]:
    """Whatever was started in the environment of the cluster in `folder`, also what its parent has lost."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("RAY_TMPDIR") == folder:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def workers(node: Any) -> list[psutil.Process]:
    """The worker processes of a node, its agents among them."""
    try:
        return psutil.Process(_raylet(node)).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill(process: psutil.Process) -> bool:
    """SIGKILL; False where the process is gone already. psutil sees to it that it is no later one of its pid."""
    try:
        process.send_signal(signal.SIGKILL)
        return True
    except psutil.NoSuchProcess:
        return False


def _is_alive(node: Any) -> bool:
    try:
        return psutil.Process(_raylet(node)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _raylet(node: Any) -> int:
    """The process id of a node's raylet."""
    from ray._private.ray_constants import PROCESS_TYPE_RAYLET

    return int(node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid)
