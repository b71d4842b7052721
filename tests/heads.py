"""Ray for tests: one that tests of this process share, and heads with nothing to share.

Each head is on ports of its own and in a process group of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

RAY = Path(sys.executable).with_name("ray")
TESTS = str(Path(__file__).parent)
# Of a cluster configuration, which Ray takes only with all of them.
_LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
)
# Two workers that train, and what Ray Train and Ray Data take beside them.
SHARED_CPUS = 4
_STARTED_AFTER = 180.0  # seconds; a busy machine is slow


@dataclass(frozen=True)
class Head:
    """Where a head is found: `dashboard` for jobs, `gcs` (HOST:PORT) for drivers, `metrics` for Prometheus."""

    dashboard: str
    gcs: str
    metrics: str


@dataclass(frozen=True)
class Workers:
    """What Ray's autoscaler may start: how many nodes, with how many CPUs, removed after how many idle seconds."""

    most: int
    cpus: int
    idle_seconds: float


def head_environment() -> dict[str, str]:
    """For a head and those who submit to it: they share a token, which Ray 2.60 asks for by default."""
    environment = {**os.environ, "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    environment.pop("RAY_ADDRESS", None)
    # A head that ends would wait half a minute for its actors to end first, and those of Ray Data never do.
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    return environment


def connect_shared() -> None:
    """Connects this process to the Ray that tests share, of SHARED_CPUS logical CPUs, and starts it if needed.

    What the fixture `shared_ray` does, for fixtures that live longer than a test.
    """
    import ray

    from congrad_ray.config.profile import Profile
    from congrad_ray.runtime.session import connect

    if ray.is_initialized() and ray.cluster_resources().get("CPU") != SHARED_CPUS:
        ray.shutdown()
    connect(Profile(name="test", local_cpus=SHARED_CPUS), SHARED_CPUS)


def end_in_order() -> None:
    """From now on Ctrl-C and SIGTERM unwind all that was begun."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, end)  # which a shell's background processes would ignore
    signal.signal(signal.SIGTERM, end)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def ray_head(
    folder: Path, cpus: int, environment: Mapping[str, str], workers: Workers | None = None
) -> Iterator[Head]:
    """A Ray head with this many CPUs, its log in `folder`; with `workers`, its autoscaler starts nodes here."""
    log_file = folder / "head.log"
    ports = [free_port() for _ in range(3)]
    head = Head(f"http://127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}", f"http://127.0.0.1:{ports[2]}/metrics")
    start = [
        *(str(RAY), "start", "--head", "--block", f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1"),
        *(f"--dashboard-port={ports[0]}", f"--port={ports[1]}", f"--metrics-export-port={ports[2]}"),
        *(f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"),
        "--object-store-memory=500000000",
    ]
    environment = dict(environment)
    if workers is not None:
        # The autoscaler finds its provider of local nodes there.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, environment.get("PYTHONPATH")]))
        configuration = folder / "autoscaling.yaml"
        configuration.write_text(json.dumps(_autoscaling(workers, head.gcs)))  # JSON is YAML
        start.append(f"--autoscaling-config={configuration}")
    with log_file.open("w") as log:
        process = subprocess.Popen(start, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + _STARTED_AFTER
        while "Ray runtime started" not in log_file.read_text():
            assert process.poll() is None and time.monotonic() < end, log_file.read_text()
            time.sleep(0.2)
        yield head
    finally:
        process.terminate()  # with --block the head ends its own processes, and only those
        try:
            process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _autoscaling(workers: Workers, gcs: str) -> dict[str, object]:
    """A cluster configuration for nodes of `local_nodes`."""
    node = {"CPU": workers.cpus, "object_store_memory": 150 * 2**20}
    return {
        "cluster_name": "local",
        "max_workers": workers.most,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": workers.idle_seconds / 60,
        "provider": {
            "type": "external",
            "module": "local_nodes.LocalNodes",
            "gcs_address": gcs,
            "head_node_type": "ray.head.default",
            "disable_node_updaters": True,  # a node that died is replaced, not repaired
            "disable_launch_config_check": True,
        },
        "auth": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": node, "node_config": {}, "min_workers": 0, "max_workers": workers.most},
        },
        **{name: list[str]() for name in _LISTS},
        "file_mounts": {},
    }
