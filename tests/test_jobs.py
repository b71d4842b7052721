"""A stage as a submitted job: `ray job submit` against a head started for the test."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RAY = Path(sys.executable).with_name("ray")
ENVIRONMENT = {**os.environ, "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"}
# Ray 2.60 asks for a token unless told otherwise; head, job and submitter share this one.
ENVIRONMENT |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
ENVIRONMENT.pop("RAY_ADDRESS", None)


@pytest.fixture
def dashboard(tmp_path: Path) -> Iterator[str]:
    """The address of a Ray head of three logical CPUs, on ports and in a process group of its own."""
    port = free_port()
    start = [
        *(str(RAY), "start", "--head", "--block", "--num-cpus=3", f"--port={free_port()}"),
        *(f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}"),
        *(f"--ray-client-server-port={free_port()}", "--object-store-memory=500000000"),
    ]
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(start, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while "Ray runtime started" not in (tmp_path / "head.log").read_text():
            assert head.poll() is None and time.monotonic() < end, (tmp_path / "head.log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        head.terminate()  # with --block the head ends its own processes, and only those
        try:
            head.wait(60)
        finally:
            if head.poll() is None:
                os.killpg(head.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_filter_as_a_submitted_job(dashboard: str, tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Count {n}", "chosen": f"{n} {n + 1}", "rejected": "The dog", "language": ("en", "de")[n % 2]}
        for n in range(20)
    ]
    preferences = tmp_path / "preferences.jsonl"
    preferences.write_text("\n".join(map(json.dumps, rows)))
    submit = [
        *(str(RAY), "job", "submit", "--address", dashboard, "--working-dir", str(ROOT), "--"),
        *("python", "jobs/filter.py", str(preferences), "--model", str(tiny_model), "--chat"),
        *("--out", str(tmp_path / "out"), "--width", "256", "--max-length", "128"),
    ]
    job = subprocess.run(submit, env=ENVIRONMENT, timeout=300, capture_output=True, text=True, check=False)
    assert job.returncode == 0, job.stdout + job.stderr
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["per_language"]["en"]["kept"] == 5
    failed = subprocess.run(
        [*submit[:-6], "--out", str(tmp_path / "other"), "--keep", "7"],
        env=ENVIRONMENT,
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode != 0 and "keep: Input should be less than or equal to 1" in failed.stdout
