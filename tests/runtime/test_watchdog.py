"""No silent hang: real actors that never start, on a real Ray."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from congrad_ray.config.profile import Profile
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError, StageFolder
from congrad_ray.runtime import watchdog
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.interrupts import StageStopped
from congrad_ray.runtime.resources import driver_demand
from congrad_ray.runtime.watchdog import watched
from congrad_ray.stages.base import Stage


@pytest.fixture(autouse=True)
def ray_is_there(shared_ray: None) -> None:
    pass


@pytest.fixture
def output(tmp_path: Path) -> StageFolder:
    return RunDirectory.open(tmp_path).stage("sketches", 0)


@pytest.fixture
def actors() -> Iterator[list[Any]]:
    import ray

    started: list[Any] = []
    yield started
    for actor in started:
        ray.kill(actor)


class Replica:
    def __init__(self, seconds: float = 0.0) -> None:
        time.sleep(seconds)

    def work(self) -> None:
        pass


def test_an_actor_that_no_node_can_hold(
    output: StageFolder, actors: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(watchdog, "_IMPOSSIBLE_AFTER", 1.0)
    monkeypatch.setattr(watchdog, "_LOOK_EVERY", 0.5)
    with pytest.raises(StageStopped) as error, watched("sketch", 60.0, output):
        actors.append(ray.remote(Replica).options(num_cpus=640).remote())
        ray.get(actors[0].work.remote())
    assert "CPU 640 for a task or actor" in str(error.value)
    assert "Lower cpus or gpus" in str(error.value)
    assert "Replica PENDING_CREATION" in str(error.value)


def test_an_actor_that_never_gets_ready(output: StageFolder, actors: list[Any]) -> None:
    import ray

    with pytest.raises(StageStopped) as error, watched("sketch (iteration 0)", 4.0, output):
        actors.append(ray.remote(Replica).options(num_cpus=1).remote(600.0))
        ray.get(actors[0].work.remote())
    text = str(error.value)
    assert "sketch (iteration 0) was stopped: no progress for" in text
    assert "stall_timeout_s is 4" in text and "in use: CPU 1 of" in text
    assert "Replica PENDING_CREATION (1)" in text


def test_a_plan_of_ray_data_whose_actors_hold_all_cpus(output: StageFolder) -> None:
    import ray

    class Map:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return batch

    cpus = int(ray.cluster_resources()["CPU"])
    pool = ray.data.ActorPoolStrategy(min_size=cpus, max_size=cpus)
    read = ray.data.range(64, override_num_blocks=4).map_batches(lambda batch: batch, num_cpus=0.5)
    numbers = read.map_batches(Map, compute=pool, num_cpus=1)
    with pytest.raises(StageStopped) as error, watched("sketch", 6.0, output):
        list(numbers.iter_rows())
    assert "MapBatches(Map) (done 0, queued 0)" in str(error.value)
    assert f"in use: CPU {cpus} of {cpus}" in str(error.value)
    assert "for a task or actor" in str(error.value)


def test_progress_keeps_a_stage_alive(output: StageFolder) -> None:
    with watched("sketch", 1.0, output) as watch:
        for _ in range(15):
            time.sleep(0.2)
            watch.progressed()


def test_a_disk_that_is_about_to_be_full(output: StageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "MIN_DISK", 2**60)
    monkeypatch.setattr(watchdog, "_LOOK_EVERY", 0.1)
    stopped = pytest.raises(StageStopped, match=r"GiB are free on the disk of .*Make room")
    with stopped, watched("sketch", 60.0, output):
        time.sleep(20)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A real one, of a megabyte."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a filesystem")
    try:
        wanted = 2**21

        def write(context: Context) -> Outcome:
            context.output.write_bytes("first.bin", b"kept")
            context.output.write_bytes("large.bin", b"\0" * wanted)
            return Outcome(1)

        stage = Stage(
            "prompts",
            "prompts",
            "writes",
            lambda i: [],
            lambda r, i: {},
            write,
            lambda r, p: driver_demand("prompts", 1),
            each_iteration=False,
            uses_ray=False,
        )
        run, recipe = RunDirectory.open(tmp_path), watchdog_recipe()
        with pytest.raises(RunDirectoryError, match=r"no space left on a disk.*make room"):
            run_stage(stage, recipe, Profile(name="test"), run)
        folder = run.stage("prompts", None)
        assert folder.read_bytes("first.bin") == b"kept" and not folder.exists("large.bin")
        wanted = 2**10
        assert run_stage(stage, recipe, Profile(name="test"), run).rows == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def watchdog_recipe() -> Any:
    from congrad_ray.config.recipe import Recipe
    from congrad_ray.config.settings import validate

    return validate(Recipe, {"name": "test", "prompts": {"languages": ["en"]}}, "test")


def test_the_command_line_ends_with_the_reason_and_not_as_interrupted(tmp_path: Path) -> None:
    script = """
import sys, time
from congrad_ray.cli import main as cli
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.watchdog import watched

@cli.app.command()
def hang() -> None:
    with watched("hang", 0.5, RunDirectory.open(sys.argv[1]).stage("x", 0)):
        time.sleep(60)

cli.main(["hang"])
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "error: hang was stopped: no progress for" in ended.stderr
    assert "interrupted" not in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("unmet", [[], ["waiting for: CPU 3 for a task or actor (1)"]])
def test_a_wait_is_reported_when_something_is_missing_and_not_while_all_runs(
    output: StageFolder, monkeypatch: pytest.MonkeyPatch, unmet: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchdog, "_LOOK_EVERY", 0.05)
    monkeypatch.setattr(watchdog, "_REPORT_EVERY", 0.1)
    monkeypatch.setattr(watchdog, "_REPORT_IF_ALL_RUNS", 60.0)
    monkeypatch.setattr(watchdog, "unmet", lambda: unmet)
    monkeypatch.setattr(watchdog, "what_waits", lambda: "\n".join(unmet))
    with watched("sketch", 60.0, output):
        time.sleep(0.6)
    lines = caplog.messages
    assert bool(lines) == bool(unmet)
    assert all("no progress for" in line and "waiting for" in line for line in lines)
