"""What will run where, and whether the cluster can ever give it: CPUs and GPUs, as Ray counts them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from congrad_ray.config.profile import Cluster, Engines, Pool, Profile


class DoesNotFit(ValueError):
    """The cluster can never give what a stage needs; the text has both numbers."""


@dataclass(frozen=True)
class Node:
    """Nodes of one kind, `count` of them at most."""

    name: str
    cpus: float
    gpus: float
    count: int = 1

    def holds(self, demand: Demand) -> int:
        """How many of the stage's actors one such node has room for."""
        fitting = [
            math.floor(have / asked + 1e-9)
            for have, asked in ((self.cpus, demand.actor_cpus), (self.gpus, demand.actor_gpus))
            if asked
        ]
        return min(fitting, default=0)


@dataclass(frozen=True)
class Machine:
    """What there is to run on: CPUs and GPUs as Ray counts them, memory in GiB; its nodes where they are known."""

    cpus: float
    gpus: float
    memory_gib: float
    where: str
    nodes: tuple[Node, ...] = ()


def cluster_machine(cluster: Cluster) -> Machine:
    """What a cluster has when all its nodes are up."""
    types = [(cluster.head, 1), *((kind, kind.max_nodes) for kind in cluster.workers)]
    return Machine(
        sum(kind.cpus * count for kind, count in types),
        sum(kind.gpus * count for kind, count in types),
        sum(kind.memory_gib * count for kind, count in types),
        f"the profile's {cluster.provider} cluster",
        nodes_of(cluster),
    )


def pool_sizes(pool: Pool, profile: Profile, batches: int) -> tuple[int, int]:
    """The min and max number of actors of a pool for this many batches of work.

    On a cluster that grows (it has a section `cluster`) all that it has room for are asked for at once: an actor
    that waits brings a node. Left to Ray Data, the next node comes when those that are there are busy, and never
    where it keeps their CPUs for its other tasks.
    """
    most = max(pool.min_actors, min(pool.max_actors, batches))
    if profile.cluster is None:
        return pool.min_actors, most
    whole = cluster_machine(profile.cluster)
    room = math.floor((whole.cpus - profile.data_cpus) / pool.cpus)
    if pool.gpus:
        room = min(room, math.floor(whole.gpus / pool.gpus))
    all_at_once = max(pool.min_actors, min(most, room))
    return all_at_once, all_at_once


def nodes_of(cluster: Cluster | None) -> tuple[Node, ...]:
    """The kinds of nodes of a profile's cluster; none where it has no such section."""
    if cluster is None:
        return ()
    head = cluster.head
    return (
        Node(head.name, head.cpus, head.gpus),
        *(Node(kind.name, kind.cpus, kind.gpus, kind.max_nodes) for kind in cluster.workers),
    )


@dataclass(frozen=True)
class Demand:
    """What one stage asks for, and its rows (at most) in one iteration.

    `min_*` must be there for it to start at all, `max_*` is its full pool.

    `actor_*` is what one actor asks of one node; an engine over several GPUs asks in as many bundles, which may
    lie on several nodes. `min_actors` of them have to run at once.
    """

    stage: str
    rows: int
    what: str
    min_cpus: float = 0.0
    min_gpus: float = 0.0
    max_cpus: float = 0.0
    max_gpus: float = 0.0
    actor_cpus: float = 0.0
    actor_gpus: float = 0.0
    min_actors: int = 0
    setting: str = ""


def between(least: float, most: float) -> str:
    """'2' or '1..8'; nothing for none."""
    if not most:
        return ""
    return f"{least:g}" if least == most else f"{least:g}..{most:g}"


def driver_demand(stage: str, rows: int) -> Demand:
    """A stage that the driver's own process does."""
    return Demand(stage, rows, "this process")


def tasks_demand(stage: str, rows: int, profile: Profile) -> Demand:
    """A stage that Ray Data's tasks do."""
    return Demand(stage, rows, "Ray Data tasks", profile.data_cpus, 0.0, profile.data_cpus, 0.0)


def pool_demand(stage: str, rows: int, what: str, setting: str, profile: Profile) -> Demand:
    """A pool's actors hold their CPUs all the time; reading and writing needs some beside them.

    `setting`: the pool's section of the profile, such as "engines"; a section `judge_engines` that is null stands
    for `engines`.
    """
    if setting == "judge_engines" and profile.judge_engines is None:
        setting = "engines"
    pool: Pool = getattr(profile, setting)
    bundles = pool.tensor_parallel_size if isinstance(pool, Engines) else 1
    return Demand(
        stage,
        rows,
        f"{what}: {between(pool.min_actors, pool.max_actors)}",
        pool.min_actors * pool.cpus + profile.data_cpus,
        pool.min_actors * pool.gpus,
        pool.max_actors * pool.cpus + profile.data_cpus,
        pool.max_actors * pool.gpus,
        pool.cpus / bundles,
        pool.gpus / bundles,
        pool.min_actors * bundles,
        setting,
    )


def check_fits(demand: Demand, machine: Machine, cluster: Cluster | None = None) -> None:
    """Raises DoesNotFit with numbers when the stage's smallest form can never run on `machine`.

    Without this check Ray waits without a word: actors that hold all CPUs starve the map tasks that feed them, and
    an autoscaler looks for ever for a node as large as an actor that asks for more than any has. `cluster`: the
    profile's, whose nodes may still be brought up.
    """
    # Ray does not say to a driver how far its autoscaler may go (nor that there is one): the profile does.
    whole = cluster_machine(cluster) if cluster else machine
    cpus, gpus = max(machine.cpus, whole.cpus), max(machine.gpus, whole.gpus)
    short = []
    if demand.min_cpus > cpus:
        short.append(f"{demand.min_cpus:g} CPUs, there are {cpus:g}")
    if demand.min_gpus > gpus:
        short.append(f"{demand.min_gpus:g} GPUs, there are {gpus:g}")
    if short:
        grows = "" if cluster else " (what an autoscaler may add is set in the profile's section cluster)"
        raise DoesNotFit(
            f"{demand.stage} ({demand.what}) needs at least {' and '.join(short)} ({whole.where}): lower "
            f"min_actors, cpus or gpus in the profile, or use a larger cluster{grows}"
        )
    nodes = dict.fromkeys((*machine.nodes, *nodes_of(cluster)))
    if not nodes or not demand.setting:
        return
    asked = f"{demand.actor_cpus:g} CPUs" + (f" and {demand.actor_gpus:g} GPUs" if demand.actor_gpus else "")
    listed = ", ".join(
        f"{node.name}: {node.cpus:g} CPUs" + (f", {node.gpus:g} GPUs" if node.gpus else "") for node in nodes
    )
    if not any(node.holds(demand) for node in nodes):
        raise DoesNotFit(
            f"{demand.stage} ({demand.what}) needs {asked} on one node, and no node has them ({listed}): lower "
            f"{demand.setting}.cpus or {demand.setting}.gpus in the profile, or use larger nodes"
        )
    # Nodes that are there and those of the profile may be the same, so each view counts by itself.
    room = max(
        sum(node.holds(demand) * node.count for node in view) for view in (machine.nodes, nodes_of(cluster))
    )
    if room < demand.min_actors:
        raise DoesNotFit(
            f"{demand.stage} ({demand.what}) needs {demand.min_actors} times {asked} at once, and the nodes have "
            f"room for {room} ({listed}): lower {demand.setting} in the profile, or use more nodes"
        )
