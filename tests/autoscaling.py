"""Every stage as a submitted job on a cluster that has no nodes between them, and nodes that die in the middle.

    python tests/autoscaling.py --run DIR

starts a head without CPUs whose real autoscaler brings up local worker nodes with an address each, submits every
stage of the demo in small by `congrad submit`, waits until the last node is gone, and submits the whole loop. Then
it submits `sketch` of the same pairs twice for a model that takes minutes, and in the second kills a third of the
nodes twice. Nodes, CPUs in use and jobs are recorded over time.

The exit code is 1 where a job failed, where the sketch stage did not grow to all nodes or nodes stayed, or where
the selection is not the same to the last bit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from faults.cluster import kill, left_over
from faults.command import ROOT, SETTINGS
from faults.compare import DETERMINED, compare_table
from faults.results import Results
from heads import Head, Workers, end_in_order, head_environment, ray_head
from tiny_models import TEXTS, make_tiny_model

WORKERS = Workers(most=3, cpus=2, idle_seconds=8.0)
STAGES = ("prompts", "baseline", "generate", "judge", "pair", "sketch", "select", "train", "evaluate", "report")
# One worker node has the CPUs for every stage; the pool of `sketch` takes all but one, which is for data.
PROFILE = {
    "name": "autoscaling",
    "device": "cpu",
    "data_cpus": 1,
    "threads": 1,
    "engines": {"cpus": 1, "batch_size": 64, "max_num_seqs": 64, "enforce_eager": True},
    "sketchers": {"min_actors": 1, "max_actors": WORKERS.most * WORKERS.cpus, "cpus": 1},
    "trainers": {"num_workers": 2, "cpus": 1},
    "cluster": {
        "provider": "other",
        "head": {"name": "head", "cpus": 0, "memory_gib": 1},
        "workers": [{"name": "worker", "cpus": WORKERS.cpus, "memory_gib": 1, "max_nodes": WORKERS.most}],
    },
}
SETTINGS_HERE = {**SETTINGS, "prompts.train_per_language": 320, "train.save_steps": 100}
_GONE_WITHIN = 180.0
_LOOK_EVERY = 0.5
# What is compared is what both runs computed from the same pairs.
_TABLES = [table for table in DETERMINED if table.name in ("sketches", "scores", "selected")]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", type=Path, required=True, metavar="DIR", help="where all runs go")
    options.add_argument("--results", type=Path, metavar="FILE.jsonl", help="default: DIR/results.jsonl")
    given = options.parse_args()
    end_in_order()
    folder = given.run.resolve()
    results = Results(given.results.resolve() if given.results else folder / "results.jsonl")
    with local_cluster(folder) as cluster, cluster.watched(results) as watch:
        stages = all(watch.job(stage, folder / "stages") == 0 for stage in STAGES)
        gone = watch.wait_until_none()
        loop = watch.job("run", folder / "loop") == 0
        gone = watch.wait_until_none() and gone
        if not (stages and loop):
            return 1
        for run in ("undisturbed", "killed"):
            for name in ("prompts", "iteration-0/pairs"):
                shutil.copytree(folder / "stages" / name, folder / run / name, dirs_exist_ok=True)
        model = _larger_model(folder / "larger-model")
        grown = watch.job("sketch", folder / "undisturbed", model) == 0
        gone = watch.wait_until_none() and gone
        with watch.killing(kills=2):
            survived = watch.job("sketch", folder / "killed", model) == 0
        selected = all(watch.job("select", folder / run, model) == 0 for run in ("undisturbed", "killed"))
        gone = watch.wait_until_none() and gone
    most = min(max(watch.nodes_during(f"{run}/sketch"), default=0) for run in ("undisturbed", "killed"))
    differences = [compare_table(table, folder / "killed", folder / "undisturbed") for table in _TABLES]
    for difference in differences:
        results.add("compare", **difference.record(), broken=difference.broken)
    verdict = {
        "every stage as a job": stages,
        "the whole loop as a job": loop,
        "no nodes between jobs": gone,
        f"sketch grew to {WORKERS.most} nodes": grown and most == WORKERS.most,
        "two nodes killed": len(results.of("kill")) == 2 and survived,
        "same selection": selected and not any(difference.broken for difference in differences),
    }
    results.add("verdict", **verdict)
    for what, holds in verdict.items():
        print(f"{'yes' if holds else 'NO ':3}  {what}")
    return int(not all(verdict.values()))


@dataclass(frozen=True)
class Cluster:
    """A head, the copy of the repository that jobs are sent from, and the settings of the runs."""

    head: Head
    source: Path
    environment: Mapping[str, str]
    temporary: str
    settings: Mapping[str, Any]

    def submit(self, command: str, run: Path, model: Path | None) -> list[str]:
        settings = {**self.settings, **({"model.name": model} if model else {})}
        return [
            *(sys.executable, "-m", "congrad_ray", "submit", command),
            *(str(self.source / "jobs" / "recipes" / "demo.yaml"), "--run", str(run)),
            *("--profile", str(self.source / "cluster" / "autoscaling-profile.yaml")),
            *("--address", self.head.dashboard),
            *(f"--set={name}={value}" for name, value in settings.items()),
        ]

    def worker_nodes(self) -> dict[str, psutil.Process]:
        """The raylets of the worker nodes by their instances' names."""
        found = {}
        for process in left_over(self.temporary):
            try:
                instance = process.environ().get("RAY_CLOUD_INSTANCE_ID")
                if instance and process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE:
                    found[instance] = process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    @contextmanager
    def watched(self, results: Results) -> Iterator[Watch]:
        watch = Watch(self, results)
        thread = threading.Thread(target=watch.look, daemon=True)
        thread.start()
        try:
            yield watch
        finally:
            watch.ended.set()
            thread.join()


@contextmanager
def local_cluster(folder: Path) -> Iterator[Cluster]:
    """A head whose autoscaler brings worker nodes; whatever it started is gone afterwards."""
    from congrad_ray.world.model import world_model

    model = world_model(cache_dir=folder / "model", training_tokens=150_000)
    source = folder / "source"
    for name in ("congrad_ray", "jobs", "cluster"):
        shutil.copytree(ROOT / name, source / name, dirs_exist_ok=True)
    for name in (".rayignore", "pyproject.toml"):
        shutil.copy(ROOT / name, source / name)
    (source / "cluster" / "autoscaling-profile.yaml").write_text(yaml.safe_dump(PROFILE))
    temporary = tempfile.mkdtemp(prefix="scaling-")  # Ray's sockets lie there: a short name
    environment = head_environment() | {
        "RAY_TMPDIR": temporary,
        "PYTHONPATH": str(source),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"),
    }
    try:
        with ray_head(folder, 0, environment, WORKERS) as head:
            yield Cluster(head, source, environment, temporary, {"model.name": model, **SETTINGS_HERE})
    finally:
        for process in left_over(temporary):
            kill(process)
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass
class Watch:
    """What happens over time: a line for every change of nodes, of CPUs in use, and of the job."""

    cluster: Cluster
    results: Results
    ended: threading.Event = field(default_factory=threading.Event)
    current: str | None = None
    _since: float = field(default_factory=time.monotonic)
    _nodes: int = 0

    def look(self) -> None:
        os.environ.update({name: self.cluster.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")})
        from ray.autoscaler.v2.sdk import get_cluster_status

        before = None
        while not self.ended.wait(_LOOK_EVERY):
            status = get_cluster_status(self.cluster.head.gcs)
            cpus = [usage for usage in status.cluster_resource_usage if usage.resource_name == "CPU"]
            self._nodes = len(self.cluster.worker_nodes())
            now = {"job": self.current, "nodes": self._nodes, "cpus_in_use": sum(usage.used for usage in cpus)}
            if now != before:
                self.results.add("nodes", seconds=round(time.monotonic() - self._since, 1), **now)
                before = now

    def job(self, command: str, run: Path, model: Path | None = None) -> int:
        """Submits and follows it, for another model if one is given; its log goes beside the run.

        Not again where an earlier start of this script has done it.
        """
        if self.results.of("job", job=f"{run.name}/{command}", code=0):
            return 0
        self.current = f"{run.name}/{command}"
        began = time.monotonic()
        log = run.parent / f"{run.name}-{command}.log"
        with log.open("w") as file:
            code = subprocess.run(
                self.cluster.submit(command, run, model),
                env=dict(self.cluster.environment),
                cwd=self.cluster.source,  # where `python -m` looks first
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        self.results.add("job", job=self.current, seconds=round(time.monotonic() - began, 1), code=code)
        print(f"{self.current}: exit code {code}" + (f", see {log}" if code else ""), flush=True)
        self.current = None
        return code

    def wait_until_none(self) -> bool:
        """Whether the last worker node goes by itself."""
        end = time.monotonic() + _GONE_WITHIN
        while self._nodes and time.monotonic() < end:
            time.sleep(_LOOK_EVERY)
        return self._nodes == 0

    def nodes_during(self, job: str) -> Sequence[int]:
        return [record["nodes"] for record in self.results.of("nodes", job=job)]

    @contextmanager
    def killing(self, kills: int) -> Iterator[None]:
        """Kills one of the nodes, with all its processes, each time that all are there and at work."""
        over = threading.Event()

        def work() -> None:
            while (killed := len(self.results.of("kill"))) < kills and not over.wait(_LOOK_EVERY):
                nodes = self.cluster.worker_nodes()
                working = {
                    name: raylet for name, raylet in nodes.items() if any(_sketches(p) for p in _below(raylet))
                }
                if len(working) < WORKERS.most:
                    continue
                name = sorted(working)[killed % len(working)]
                below = _below(working[name])
                kill(working[name])
                for process in below:
                    kill(process)
                self.results.add(
                    "kill", job=self.current, node=name, seconds=round(time.monotonic() - self._since, 1)
                )

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _larger_model(folder: Path) -> Path:
    """A model for whose sketches one worker takes minutes, so that there is time for nodes to come and go."""
    return make_tiny_model(folder, TEXTS, hidden=512, layers=8)


def _below(raylet: psutil.Process) -> list[psutil.Process]:
    try:
        return raylet.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _sketches(process: psutil.Process) -> bool:
    try:
        return "SketchReplica" in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


if __name__ == "__main__":
    sys.exit(main())
