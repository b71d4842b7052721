"""Real engines on nodes that an autoscaler brings; one is lost with its engine in the middle of a stage."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from congrad_ray.data.tables import prompt_id, table_of
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.prompts.schema import PROMPTS
from faults.cluster import kill, left_over
from heads import Head, Workers, head_environment, ray_head

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WORKERS = Workers(most=2, cpus=2, idle_seconds=20.0)
PROFILE = {
    "name": "autoscaling",
    "threads": 1,
    "engines": {"cpus": 1, "max_actors": 2, "batch_size": 4, "max_num_seqs": 8, "enforce_eager": True},
    "cluster": {
        "provider": "other",
        "head": {"name": "head", "cpus": 0, "memory_gib": 1},
        "workers": [{"name": "worker", "cpus": WORKERS.cpus, "memory_gib": 4, "max_nodes": WORKERS.most}],
    },
}
_DRIVER = """
import logging, sys
from pathlib import Path
from congrad_ray.config.profile import load_profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.generate.stage import STAGE

logging.basicConfig(level=logging.INFO, stream=sys.stdout)
head, profile, folder, model = sys.argv[1:]
recipe = Recipe.model_validate({
    "name": "test",
    "model": {"name": model, "dtype": "float32", "max_length": 128},
    "prompts": {"languages": ["en"]},
    "generate": {"num_generations": 2, "max_tokens": 64, "temperature": 1.0, "top_p": 1.0},
    "judge": {"max_tokens": 8},
    "evaluate": {"max_tokens": 16, "judge_max_tokens": 8},
})
manifest = run_stage(STAGE, recipe, load_profile(profile, [f"address={head}"]), RunDirectory.open(folder))
print("rows", manifest.rows, "starts", manifest.counters["engine_starts"], flush=True)
"""


@pytest.fixture
def temporary() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="nodes-")  # Ray's sockets lie there: a short name
    yield folder
    for process in left_over(folder):
        kill(process)
    shutil.rmtree(folder, ignore_errors=True)


def _prompts(folder: Path, number: int) -> None:
    rows = []
    for place in range(number):
        messages = [{"role": "user", "content": f"fox {place}"}]
        of_row = {"prompt_id": prompt_id("en", messages), "prompt": messages}
        rows.append({**of_row, "language": "en", "split": "train", "seen": True, "task": None})
    prompts = RunDirectory.open(folder).stage("prompts", None)
    prompts.begin("fingerprint", False, "prompts")
    prompts.write_table("part-0.parquet", table_of(rows, PROMPTS))
    prompts.commit("prompts", None, "fingerprint", {}, {}, len(rows), 0.0, {})


def _nodes_with_engines(temporary: str) -> list[list[psutil.Process]]:
    """The processes of each node on which an engine answers, its raylet first."""
    found = []
    for process in left_over(temporary):
        try:
            if process.name() == "raylet" and process.environ().get("RAY_CLOUD_INSTANCE_ID"):
                below = process.children(recursive=True)
                if any("VLLM::EngineCore" in " ".join(one.cmdline()) for one in below):
                    found.append([process, *below])
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_from_no_nodes_engines_join_as_nodes_come_and_a_node_lost_costs_no_row(
    tiny_model: Path, tmp_path: Path, temporary: str
) -> None:
    environment = head_environment() | {
        "RAY_TMPDIR": temporary,
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"),
    }
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(PROFILE))
    _prompts(tmp_path / "run", 60)

    def drive(head: Head) -> str:
        command = [sys.executable, "-c", _DRIVER, head.gcs, str(tmp_path / "profile.yaml"), str(tmp_path / "run")]
        driver = subprocess.Popen(
            [*command, str(tiny_model)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        responses = tmp_path / "run" / "iteration-0" / "responses"
        while driver.poll() is None and not any(responses.glob("part-*")):
            time.sleep(0.2)
        nodes = _nodes_with_engines(temporary)
        for process in nodes[0] if nodes else []:
            kill(process)
        output, _ = driver.communicate(timeout=600)
        assert nodes, output
        return output

    with ray_head(tmp_path, 0, environment, WORKERS) as head:
        output = drive(head)
    [said] = [line for line in output.splitlines() if line.startswith("rows ")]
    _, rows, _, starts = said.split()
    assert int(rows) == 120, output
    # The one that was lost started again, unless the other had done all before its node came back.
    assert int(starts) >= 2, output
