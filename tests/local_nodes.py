"""A cloud of this machine for Ray's autoscaler: worker nodes are `ray start` processes with an address each.

Ray's own provider of local nodes (`fake_multinode`) gives all of them one address and one session folder, in which
they delete each other's copy of a job's code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

_HEAD = "head"
_PATIENCE = 20.0  # seconds that a node has to end in order


@dataclass(frozen=True)
class _LocalNode:
    address: str
    tags: dict[str, str]
    process: subprocess.Popen[bytes] | None = None


class LocalNodes(NodeProvider):
    """Nodes by name; their tags and processes are known to this object alone, as it lives with the autoscaler."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._gcs = str(provider_config["gcs_address"])
        self._lock = threading.RLock()
        self._started = 0
        tags = {
            TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
            TAG_RAY_NODE_NAME: _HEAD,
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            TAG_RAY_USER_NODE_TYPE: str(provider_config["head_node_type"]),
        }
        self._nodes = {_HEAD: _LocalNode(self._gcs.rsplit(":", 1)[0], tags)}

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        with self._lock:
            return [name for name, node in self._nodes.items() if tag_filters.items() <= node.tags.items()]

    def is_running(self, node_id: str) -> bool:
        return node_id in self._nodes

    def is_terminated(self, node_id: str) -> bool:
        return node_id not in self._nodes

    def node_tags(self, node_id: str) -> dict[str, str]:
        return self._nodes[node_id].tags

    def set_node_tags(self, node_id: str, tags: Mapping[str, str]) -> None:
        self._nodes[node_id].tags.update(tags)

    def external_ip(self, node_id: str) -> str:
        return self._nodes[node_id].address

    def internal_ip(self, node_id: str) -> str:
        return self._nodes[node_id].address

    def create_node_with_resources_and_labels(
        self,
        node_config: Mapping[str, Any],
        tags: Mapping[str, str],
        count: int,
        resources: Mapping[str, float],
        labels: Mapping[str, str],
    ) -> None:
        for _ in range(count):
            with self._lock:
                self._started += 1
                name = f"local-{self._started}"
                address = f"127.0.0.{self._started + 1}"
                process = _start(name, address, self._gcs, tags[TAG_RAY_USER_NODE_TYPE], resources)
                whole = {**tags, TAG_RAY_NODE_NAME: name, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
                self._nodes[name] = _LocalNode(address, whole, process)

    def terminate_node(self, node_id: str) -> None:
        with self._lock:
            process = self._nodes.pop(node_id).process
        if process is None:
            return
        process.terminate()  # with --block it ends its own processes, and only those
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        return cluster_config


def _start(
    name: str, address: str, gcs: str, node_type: str, resources: Mapping[str, float]
) -> subprocess.Popen[bytes]:
    # A temporary folder of its own: nodes on one machine would share the session's.
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=os.environ.get("RAY_TMPDIR")))
    further = {key: value for key, value in resources.items() if key not in ("CPU", "object_store_memory")}
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--block", f"--address={gcs}"),
        *(f"--node-ip-address={address}", f"--temp-dir={folder}", f"--num-cpus={int(resources['CPU'])}"),
        *(f"--object-store-memory={int(resources['object_store_memory'])}", f"--resources={json.dumps(further)}"),
        *("--min-worker-port=0", "--max-worker-port=0"),
    ]
    environment = {**os.environ, "RAY_CLOUD_INSTANCE_ID": name, "RAY_NODE_TYPE_NAME": node_type}
    with (folder / "start.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
