"""What can be killed in which stage, and how it is found: by the titles that Ray and vLLM give their processes."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import psutil

from faults.cluster import LocalCluster, kill, workers

Kind = Literal["engine actor", "engine core", "data worker", "gradient actor", "training rank", "node", "driver"]

# The engine is two processes: Ray's actor, and vLLM's core below it, which holds the model.
_ENGINE_STAGE: tuple[Kind, ...] = ("engine actor", "engine core", "data worker", "node", "driver")
KINDS: dict[str, tuple[Kind, ...]] = {
    "prompts": ("driver",),
    "baseline": _ENGINE_STAGE,
    "generate": _ENGINE_STAGE,
    "judge": _ENGINE_STAGE,
    "pair": ("driver",),
    "sketch": ("gradient actor", "data worker", "node", "driver"),
    "select": ("data worker", "driver"),
    "train": ("training rank", "node", "driver"),
    "evaluate": _ENGINE_STAGE,
    "report": ("driver",),
}
_TITLES: dict[Kind, re.Pattern[str]] = {
    "engine actor": re.compile(r"ray::VLLMEngine"),
    "engine core": re.compile(r"VLLM::EngineCore"),
    "gradient actor": re.compile(r"ray::MapWorker\(.*SketchReplica"),
    "training rank": re.compile(r"ray::RayTrainWorker"),
    # Tasks of Ray Data's operators, the actors that read Parquet footers for them, and the one that asks engines.
    "data worker": re.compile(
        r"ray::(MapWorker\(.*AskEngines|(?!MapWorker)(ListFiles|FooterReader|Read\w+|FromItems|\w+\())"
    ),
}
_ACTORS: tuple[Kind, ...] = ("engine actor", "gradient actor", "training rank")
# An engine or gradient actor that is past its constructor and has had a batch.
_AT_WORK = re.compile(r"ray::(VLLMEngine\.ask|MapWorker\(.*SketchReplica.*\.submit)")


@dataclass(frozen=True)
class Victim:
    """Something to be killed: a process, a node, or the driver (neither)."""

    kind: Kind
    title: str
    process: psutil.Process | None = None
    node: Any = None


def titled(cluster: LocalCluster) -> Iterator[tuple[Any, psutil.Process, str]]:
    """Every worker process of the cluster with its node and title."""
    for node in cluster.nodes():
        for process in workers(node):
            try:
                yield node, process, " ".join(process.cmdline()).strip()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue


def at_work(cluster: LocalCluster) -> bool:
    """Whether an engine or a gradient actor is past its start."""
    return any(_AT_WORK.search(title) for _, _, title in titled(cluster))


def find_victim(kind: Kind, cluster: LocalCluster, chance: random.Random) -> Victim | None:
    """One of the kind that is there now, or None. Of nodes, one that does some of the work."""
    if kind == "driver":
        return Victim(kind, "congrad run")
    if kind == "node":
        nodes = cluster.worker_nodes()
        busy: dict[Any, str] = {}
        for wanted in (*_ACTORS, "data worker"):  # a node with actors if there is one
            for node, _, title in titled(cluster):
                if node in nodes and _TITLES[wanted].match(title):
                    busy.setdefault(node, title)
            if busy:
                node = chance.choice(sorted(busy, key=nodes.index))
                return Victim(kind, f"node with {busy[node]}", node=node)
        return None
    found = [(process, title) for _, process, title in titled(cluster) if _TITLES[kind].match(title)]
    if not found:
        return None
    process, title = chance.choice(found)
    return Victim(kind, title, process)


def actors_hit(victim: Victim, cluster: LocalCluster) -> int:
    """How many engines, gradient actors or training ranks end with the victim."""
    if victim.kind in (*_ACTORS, "engine core"):
        return 1
    if victim.kind == "data worker":
        return 0
    nodes = [victim.node] if victim.node is not None else cluster.nodes()
    return sum(
        node in nodes and any(_TITLES[kind].match(title) for kind in _ACTORS) for node, _, title in titled(cluster)
    )


def strike(victim: Victim, cluster: LocalCluster) -> bool:
    """SIGKILL; False where it had ended by itself. Not for the driver."""
    if victim.node is not None:
        cluster.kill_node(victim.node)
        return True
    assert victim.process is not None
    return kill(victim.process)
