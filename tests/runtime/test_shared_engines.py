"""Real vLLM engines that serve more than one stage, and are killed."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.data.tables import prompt_id, table_of
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime import pools
from congrad_ray.stages.generate.stage import STAGE as GENERATE
from congrad_ray.stages.judge.stage import STAGE as JUDGE
from congrad_ray.stages.prompts.schema import PROMPTS
from heads import head_environment, ray_head

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ACTOR, CORE = r"ray::VLLMEngine", r"VLLM::EngineCore"


def _running(pattern: str, below: psutil.Process | None = None) -> list[psutil.Process]:
    found = []
    for process in (below or psutil.Process()).children(recursive=True):
        try:
            if re.search(pattern, " ".join(process.cmdline())) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _gone(below: psutil.Process | None = None, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while _running(f"{ACTOR}|{CORE}", below) and time.monotonic() < end:
        time.sleep(0.5)
    return not _running(f"{ACTOR}|{CORE}", below)


@contextmanager
def _killed_when_written(pattern: str, folder: Path) -> Iterator[None]:
    """Kills an engine's process as soon as a part is in the folder."""
    struck: list[int] = []
    over = threading.Event()

    def strike() -> None:
        while not struck and not over.wait(0.05):
            if any(folder.glob("*.parquet")):
                for process in _running(pattern):
                    process.kill()
                    struck.append(process.pid)

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert len(struck) == 1


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Recipe:
    rubric = tmp_path / "rubric"
    rubric.mkdir()
    (rubric / "en.txt").write_text("{prompt}?{response}:")
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"name": str(tiny_model), "dtype": "float32", "max_length": 128},
            "prompts": {"languages": ["en"]},
            "generate": {"num_generations": 2, "max_tokens": 32, "temperature": 1.0, "top_p": 1.0},
            "evaluate": {"max_tokens": 16, "judge_max_tokens": 8},
            "judge": {"rubric": str(rubric), "method": "expected_score", "max_length": 256},
        }
    )


def _prompts(run: RunDirectory, number: int) -> None:
    rows = []
    for place in range(number):
        messages = [{"role": "user", "content": f"fox {place}"}]
        of_row = {"prompt_id": prompt_id("en", messages), "prompt": messages}
        rows.append({**of_row, "language": "en", "split": "train", "seen": True, "task": None})
    folder = run.stage("prompts", None)
    folder.begin("fingerprint", False, "prompts")
    folder.write_table("part-0.parquet", table_of(rows, PROMPTS))
    folder.commit("prompts", None, "fingerprint", {}, {}, len(rows), 0.0, {})


@pytest.mark.usefixtures("no_ray")
def test_one_engine_serves_two_stages_and_comes_back_when_it_is_killed_between_and_within_them(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory.open(tmp_path / "run")
    _prompts(run, 24)
    profile = Profile.model_validate({"name": "local", "engines": {"batch_size": 4, "max_num_seqs": 8}})
    counted: list[Any] = []
    with pools.keeping():
        counted.append(run_stage(GENERATE, recipe, profile, run))
        before = run.stage("responses", 0).read_table().sort_by("response_id")
        [core] = _running(CORE)
        counted.append(run_stage(JUDGE, recipe, profile, run))
        assert [process.pid for process in _running(CORE)] == [core.pid]
        assert any("is up already" in line for line in caplog.messages)
        for folder in ("judgements", "responses"):
            run.stage(folder, 0).delete()
        core.kill()
        counted.append(run_stage(GENERATE, recipe, profile, run))
        again = run.stage("responses", 0).read_table().sort_by("response_id")
        assert again.equals(before)
        with _killed_when_written(ACTOR, tmp_path / "run" / "iteration-0" / "judgements" / "samples"):
            counted.append(run_stage(JUDGE, recipe, profile, run))
        assert len(_running(CORE)) == 1
    assert [manifest.counters["engine_starts"] for manifest in counted] == [1, 0, 1, 1]
    assert [manifest.rows for manifest in counted] == [48] * 4
    assert _gone()


_DRIVER = """
import sys
from pathlib import Path
import ray
from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Model
from congrad_ray.modeling.source import named_model
from congrad_ray.runtime import pools
from congrad_ray.runtime.driver_actors import driver_actor
from congrad_ray.runtime.notices import Notify
from congrad_ray.runtime.session import connect
from congrad_ray.runtime.vllm_engine import EngineLog

profile = Profile(name="test", address=sys.argv[1])
connect(profile, 2)
source = named_model(sys.argv[2], Model(name=sys.argv[2], dtype="float32", max_length=64))
pool = pools.engines_for(pools.engine_spec(source, profile, profile.engines), 1, 1, profile)
ray.get([engine.ready.remote(Notify(), driver_actor(EngineLog)) for engine in pool.engines.values()])
print("ready", flush=True)
input()
"""


def test_a_driver_that_is_killed_leaves_no_engine_on_its_cluster(tiny_model: Path, tmp_path: Path) -> None:
    environment = head_environment()
    with ray_head(tmp_path, 2, environment) as head:
        command = [sys.executable, "-c", _DRIVER, head.gcs, str(tiny_model)]
        driver = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        assert _running(CORE) and _running(ACTOR)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        assert _gone()
