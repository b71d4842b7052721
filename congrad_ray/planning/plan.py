"""The whole plan: what each stage needs, has, takes and leaves, and which settings would make it fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from congrad_ray.config.profile import Engines, NodeType, Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.estimate import Estimate, Planned, Replicas, Served
from congrad_ray.planning.memory import GIB, Memory
from congrad_ray.runtime.resources import Demand, Machine


class Plannable(Protocol):
    """What a plan asks of a stage."""

    @property
    def name(self) -> str:
        """As the plan calls it."""
        ...

    @property
    def demand(self) -> Callable[[Recipe, Profile], Demand]:
        """What it asks of a cluster."""
        ...

    @property
    def estimate(self) -> Estimate | None:
        """What it works through, needs and leaves; None: it is not in the plan."""
        ...


@dataclass(frozen=True)
class StagePlan:
    """A stage over all iterations. None: the profile and the assumptions do not say enough to know it."""

    stage: str
    what: str  # it runs as, with how many of them the profile asks for
    rows: float
    tokens: float
    flops: float
    replicas: int  # that run at once; 0: not on Ray actors
    needed: Memory | None  # of one replica
    available: float | None  # bytes for one replica
    sequences: int | None  # of mean length that the KV cache of an engine holds
    seconds: float | None
    dollars: float | None
    stored: float  # bytes
    temporary: float  # bytes on disk besides, only while it runs
    starts: int = 0  # of its actors, over all iterations: engines that are up already are not among them

    @property
    def fits(self) -> bool:
        """Whether one replica has the memory it needs, as far as is known."""
        return self.needed is None or self.available is None or self.needed.peak <= self.available


@dataclass(frozen=True)
class Plan:
    """All stages, and what has to be said beside the table."""

    stages: list[StagePlan]
    iterations: int
    advice: list[str]

    @property
    def short(self) -> list[StagePlan]:
        """The stages whose replicas do not have the memory."""
        return [stage for stage in self.stages if not stage.fits]

    def total(self, value: Callable[[StagePlan], float | None]) -> float | None:
        """The sum over the stages that have the value; None if none has."""
        found = [number for stage in self.stages if (number := value(stage)) is not None]
        return sum(found) if found else None


def make_plan(stages: Iterable[Plannable], planned: Planned, machine: Machine) -> Plan:
    """The plan of all iterations of a recipe. Runs nothing."""
    estimated = [(stage, stage.estimate) for stage in stages if stage.estimate is not None]
    starts = starts_by_stage([estimate for _, estimate in estimated], planned.recipe)
    plans = [
        _stage_plan(stage, estimate, planned, machine, of_stage)
        for (stage, estimate), of_stage in zip(estimated, starts, strict=True)
    ]
    advice = [
        f"{plan.stage}: {plan.needed.note}; the replica adapts when it starts"
        for plan in plans
        if plan.needed and plan.needed.note
    ]
    notes = [(stage.name, estimate.note(planned.recipe)) for stage, estimate in estimated]
    advice += [f"{name}: {note}" for name, note in notes if note]
    fewest = min((plan.sequences for plan in plans if plan.sequences), default=None)
    if fewest is not None and fewest < planned.profile.engines.max_num_seqs:
        advice.append(
            f"engines: the KV cache holds {fewest} sequences of mean length, fewer than engines.max_num_seqs "
            f"{planned.profile.engines.max_num_seqs}: vLLM will preempt some and compute them again; lower it to "
            f"{fewest}, or give an engine more GPUs (tensor_parallel_size)"
        )
    advice += [
        _fix(plan, stage.demand, estimate.replicas, planned, machine)
        for plan, (stage, estimate) in zip(plans, estimated, strict=True)
        if not plan.fits and estimate.replicas
    ]
    return Plan(plans, planned.recipe.iterations, advice)


def starts_by_stage(estimates: Sequence[Estimate], recipe: Recipe) -> list[list[int]]:
    """How often each stage waits for actors to start, by iteration.

    An engine is there already where the one asked last was of the same model, with no stage between that takes
    its room. This is from above: with room for two models beside each other both stay.
    """
    starts: list[list[int]] = [[] for _ in estimates]
    up: str | None = None
    for iteration in range(recipe.iterations):
        for estimate, of_stage in zip(estimates, starts, strict=True):
            if estimate.replicas is None:
                of_stage.append(0)
                continue
            started = 0
            for model in estimate.replicas.asks(recipe, iteration):
                started += model is None or model != up
                up = model
            of_stage.append(started)
    return starts


def _stage_plan(
    stage: Plannable, estimate: Estimate, planned: Planned, machine: Machine, starts: Sequence[int]
) -> StagePlan:
    volumes = [estimate.volume(planned, iteration) for iteration in range(planned.recipe.iterations)]
    profile, assumptions = planned.profile, planned.assumptions
    demand = stage.demand(planned.recipe, profile)
    kinds = _kinds(profile, demand)
    needed = available = took = dollars = sequences = None
    flops, replicas = 0.0, 0
    if estimate.replicas and demand.setting:  # a stage that only asks servers has none
        of_model = estimate.replicas
        work = [of_model.flops(planned, volume) for volume in volumes]
        flops = sum(sum(two) for two in work)
        available = _available(profile, assumptions, demand, kinds, machine)
        needed = of_model.memory(planned, available)
        replicas = _replicas(demand, profile, machine, kinds)
        peak = _peak_flops(profile, assumptions, demand, kinds)
        if peak is not None and replicas:
            mfu, start = of_model.mfu(assumptions), of_model.start_s(assumptions)
            took = sum(
                start * started
                + sum(part / share for part, share in zip(two, mfu, strict=True)) / (peak * replicas)
                for two, started in zip(work, starts, strict=True)
            )
            dollars = _dollars(profile, assumptions, demand, kinds, replicas, took)
        if of_model.sequences and profile.device == "cuda" and available is not None:
            mean = sum(v.prefill + v.decode for v in volumes) / sum(v.requests for v in volumes)
            sequences = of_model.sequences(planned, needed, available, mean)
    served = [estimate.served(planned, iteration) for iteration in range(planned.recipe.iterations)]
    if any(part != Served() for part in served):
        took = (took or 0.0) + sum(part.seconds for part in served)
        costs = [part.dollars for part in served]
        dollars = None if None in costs else (dollars or 0.0) + sum(cost or 0.0 for cost in costs)
    return StagePlan(
        stage.name,
        demand.what,
        sum(volume.rows for volume in volumes),
        sum(volume.tokens for volume in volumes),
        flops,
        replicas,
        needed,
        available,
        sequences,
        took,
        dollars,
        sum(estimate.stored(planned, volume) for volume in volumes),
        estimate.temporary(planned, volumes[0]),
        sum(starts),
    )


def _kinds(profile: Profile, demand: Demand) -> list[NodeType]:
    """The node types of the profile's cluster that a stage's actors can run on."""
    if profile.cluster is None:
        return []
    return [
        kind
        for kind in (profile.cluster.head, *profile.cluster.workers)
        if kind.cpus >= demand.actor_cpus and kind.gpus >= demand.actor_gpus
    ]


def _on_one_node(kind: NodeType, demand: Demand) -> int:
    rooms = [int(kind.cpus / demand.actor_cpus)] if demand.actor_cpus else []
    if demand.actor_gpus:
        rooms.append(int(kind.gpus / demand.actor_gpus))
    return min(rooms, default=0)


def _available(
    profile: Profile, assumptions: Assumptions, demand: Demand, kinds: list[NodeType], machine: Machine
) -> float | None:
    """Bytes for one replica on all its devices; on the least of the nodes that may be given to it."""
    if not demand.setting:
        return None
    if profile.device == "cuda":
        memories = [kind.gpu_memory_gib for kind in kinds if kind.gpu_memory_gib is not None]
        gib = min(memories, default=assumptions.gpu_memory_gib)
        if gib is None:
            return None
        engines = _engines(demand, profile)
        share = engines.gpu_memory_utilization if engines else 1.0
        bundles = _bundles(demand, profile)
        return gib * GIB * demand.actor_gpus * bundles * share
    # Each takes an equal part of its node's memory.
    shares = [kind.memory_gib / max(1, _on_one_node(kind, demand)) for kind in kinds]
    if not shares and len(machine.nodes) > 1:
        return None
    at_once = min(_most_replicas(demand, profile), int(machine.cpus // demand.actor_cpus))
    return min(shares, default=machine.memory_gib / max(1, at_once)) * GIB


def _most_replicas(demand: Demand, profile: Profile) -> int:
    if demand.setting == "trainers":
        return profile.trainers.num_workers
    engines = _engines(demand, profile)
    return engines.max_actors if engines else profile.sketchers.max_actors


def _engines(demand: Demand, profile: Profile) -> Engines | None:
    """The section of the profile that a stage's engines are of; None where it asks none."""
    pool = getattr(profile, demand.setting, None) if demand.setting else None
    return pool if isinstance(pool, Engines) else None


def _bundles(demand: Demand, profile: Profile) -> int:
    engines = _engines(demand, profile)
    return engines.tensor_parallel_size if engines else 1


def _replicas(demand: Demand, profile: Profile, machine: Machine, kinds: list[NodeType]) -> int:
    """How many of a stage's replicas run at once when all nodes are up."""
    bundles = _bundles(demand, profile)
    if machine.nodes:
        room = sum(node.holds(demand) * node.count for node in machine.nodes)
    elif demand.actor_gpus:
        room = int(machine.gpus // demand.actor_gpus)
    else:
        room = int(machine.cpus // demand.actor_cpus)
    beside = machine.cpus if demand.setting == "trainers" else machine.cpus - profile.data_cpus
    room = min(room, int(beside // demand.actor_cpus))
    return max(0, min(_most_replicas(demand, profile), room // bundles))


def _peak_flops(profile: Profile, assumptions: Assumptions, demand: Demand, kinds: list[NodeType]) -> float | None:
    """Peak FLOP/s of one replica, on the slowest nodes that may be given to it."""
    if profile.device == "cpu":
        return assumptions.core_gigaflops * 1e9 * demand.actor_cpus
    rates = [kind.gpu_teraflops for kind in kinds if kind.gpu_teraflops is not None]
    teraflops = min(rates, default=assumptions.gpu_teraflops)
    bundles = _bundles(demand, profile)
    return None if teraflops is None else teraflops * 1e12 * demand.actor_gpus * bundles


def _dollars(
    profile: Profile,
    assumptions: Assumptions,
    demand: Demand,
    kinds: list[NodeType],
    replicas: int,
    took: float,
) -> float | None:
    """The nodes that the replicas fill, and the head, for the time of the stage."""
    if profile.cluster is None:
        return None if assumptions.price_per_hour is None else assumptions.price_per_hour * took / 3600
    bundles = _bundles(demand, profile)
    per_hour, left = profile.cluster.head.price_per_hour or 0.0, replicas * bundles
    for kind in kinds:
        if kind is profile.cluster.head:
            left -= _on_one_node(kind, demand)
            continue
        if kind.price_per_hour is None:
            return None
        nodes = min(kind.max_nodes, math.ceil(max(0, left) / max(1, _on_one_node(kind, demand))))
        left -= nodes * _on_one_node(kind, demand)
        per_hour += nodes * kind.price_per_hour
    return per_hour * took / 3600


def _fix(
    short: StagePlan,
    demand_of: Callable[[Recipe, Profile], Demand],
    replicas: Replicas,
    planned: Planned,
    machine: Machine,
) -> str:
    """What is short, and the first of the changes worth trying that make it fit, one by one or together."""
    assert short.needed is not None and short.available is not None
    start = f"{short.stage} needs {short.needed.peak / GIB:.1f} GiB a replica and has {short.available / GIB:.1f}"
    tried = False
    for change in replicas.changes(planned.recipe, planned.profile):
        changed = replace(planned, recipe=change.recipe, profile=change.profile)
        demand = demand_of(change.recipe, change.profile)
        kinds = _kinds(change.profile, demand)
        available = _available(change.profile, planned.assumptions, demand, kinds, machine)
        room = _replicas(demand, change.profile, machine, kinds)
        if available is None or room < replicas.min_replicas(change.profile):
            continue
        tried = True
        needed = replicas.memory(changed, available)
        if needed.peak <= available:
            return (
                f"{start}; with {change.text} it would need {needed.peak / GIB:.1f} of {available / GIB:.1f} GiB"
            )
    why = "no setting tried here makes it fit" if tried else "there is no room for a larger replica"
    return f"{start}; {why}: use GPUs with more memory, more of them, or a smaller model"
