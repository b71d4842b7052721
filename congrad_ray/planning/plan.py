"""The whole plan: what each stage needs, has, takes and leaves, and which settings would make it fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from congrad_ray.config.profile import NodeType, Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import SettingsType
from congrad_ray.modeling.shape import ModelShape
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.memory import (
    GIB,
    Memory,
    engine_memory,
    sequences_that_fit,
    sketch_memory,
    training_memory,
)
from congrad_ray.planning.storage import checkpoint_bytes, stage_bytes
from congrad_ray.planning.tokens import Lengths, StageCount, stage_counts
from congrad_ray.planning.work import seconds, stage_flops
from congrad_ray.runtime.resources import Machine, StageNeed, needs


@dataclass(frozen=True)
class Shapes:
    """The models of a recipe: most recipes have one that is all three."""

    policy: ModelShape
    judge: ModelShape
    evaluation_judge: ModelShape

    def largest_of(self, stage: str) -> ModelShape:
        """The model that sets a stage's memory and work."""
        if stage == "judge":
            return self.judge
        if stage == "evaluate":
            return max(self.policy, self.evaluation_judge, key=lambda shape: shape.parameters)
        return self.policy


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

    @property
    def fits(self) -> bool:
        """Whether one replica has the memory it needs, as far as is known."""
        return self.needed is None or self.available is None or self.needed.peak <= self.available


@dataclass(frozen=True)
class Plan:
    """All stages, and what has to be said beside the table."""

    stages: list[StagePlan]
    iterations: int
    training_checkpoints: float  # bytes, only while training
    advice: list[str]

    @property
    def short(self) -> list[StagePlan]:
        """The stages whose replicas do not have the memory."""
        return [stage for stage in self.stages if not stage.fits]

    def total(self, value: Callable[[StagePlan], float | None]) -> float | None:
        """The sum over the stages that have the value; None if none has."""
        found = [number for stage in self.stages if (number := value(stage)) is not None]
        return sum(found) if found else None


def make_plan(
    recipe: Recipe,
    profile: Profile,
    shapes: Shapes,
    lengths: Lengths,
    assumptions: Assumptions,
    machine: Machine,
) -> Plan:
    """The plan of all iterations of a recipe. Runs nothing."""
    rounds = [stage_counts(recipe, lengths, assumptions, iteration) for iteration in range(recipe.iterations)]
    asked = {need.stage: need for need in needs(recipe, profile)}
    stages, advice = [], []
    for counts in zip(*rounds, strict=True):
        stage = counts[0].stage
        shape = shapes.largest_of(stage)
        work = [stage_flops(count, shape, recipe, lengths, assumptions) for count in counts]
        kinds = _kinds(profile, asked[stage])
        available = _available(profile, assumptions, asked[stage], kinds, machine)
        needed = _memory(stage, shape, recipe, profile, assumptions, available)
        replicas = _replicas(asked[stage], profile, machine, kinds) if needed else 0
        took = dollars = sequences = None
        if needed:
            peak = _peak_flops(profile, assumptions, asked[stage], kinds)
            if peak is not None and replicas:
                took = sum(seconds(stage, flops, peak, replicas, assumptions) for flops in work)
                dollars = _dollars(profile, assumptions, asked[stage], kinds, replicas, took)
            if stage in ("generate", "judge", "evaluate") and profile.device == "cuda" and available is not None:
                mean = sum(count.prefill + count.decode for count in counts) / sum(c.requests for c in counts)
                sequences = sequences_that_fit(needed, available, shape, recipe, mean)
            if needed.note:
                advice.append(f"{stage}: {needed.note}; the replica sees to it when it starts")
        stored = sum(
            stage_bytes(
                count,
                {c.stage: c for c in every},
                shapes.policy,
                recipe,
                lengths,
                assumptions,
                profile,
            )
            for count, every in zip(counts, rounds, strict=True)
        )
        stages.append(
            StagePlan(
                stage,
                asked[stage].what,
                sum(count.rows for count in counts),
                sum(count.tokens for count in counts),
                sum(sum(flops) for flops in work),
                replicas,
                needed,
                available,
                sequences,
                took,
                dollars,
                stored,
            )
        )
    fewest = min((stage.sequences for stage in stages if stage.sequences), default=None)
    if fewest is not None and fewest < profile.engines.max_num_seqs:
        advice.append(
            f"engines: the KV cache holds {fewest} sequences of mean length, fewer than engines.max_num_seqs "
            f"{profile.engines.max_num_seqs}: vLLM will preempt some and compute them again; lower it to "
            f"{fewest}, or give an engine more GPUs (tensor_parallel_size)"
        )
    advice += [
        _mend(short, shapes.largest_of(short.stage), recipe, profile, assumptions, machine)
        for short in stages
        if not short.fits
    ]
    steps = _training_steps(recipe, rounds[0])
    return Plan(stages, recipe.iterations, checkpoint_bytes(shapes.policy, recipe, steps), advice)


def _training_steps(recipe: Recipe, counts: list[StageCount]) -> float:
    seen = next(count.rows for count in counts if count.stage == "train")
    return recipe.train.max_steps or seen / recipe.train.batch_size


def _memory(
    stage: str,
    shape: ModelShape,
    recipe: Recipe,
    profile: Profile,
    assumptions: Assumptions,
    available: float | None,
) -> Memory | None:
    if stage in ("generate", "judge", "evaluate"):
        return engine_memory(shape, recipe, profile, assumptions)
    if stage == "sketch":
        return sketch_memory(shape, recipe, profile, assumptions, available)
    if stage == "train":
        return training_memory(shape, recipe, profile, assumptions)
    return None


def _kinds(profile: Profile, need: StageNeed) -> list[NodeType]:
    """The node types of the profile's cluster that a stage's actors can run on."""
    if profile.cluster is None:
        return []
    return [
        kind
        for kind in (profile.cluster.head, *profile.cluster.workers)
        if kind.cpus >= need.actor_cpus and kind.gpus >= need.actor_gpus
    ]


def _on_one_node(kind: NodeType, need: StageNeed) -> int:
    rooms = [int(kind.cpus / need.actor_cpus)] if need.actor_cpus else []
    if need.actor_gpus:
        rooms.append(int(kind.gpus / need.actor_gpus))
    return min(rooms, default=0)


def _available(
    profile: Profile, assumptions: Assumptions, need: StageNeed, kinds: list[NodeType], machine: Machine
) -> float | None:
    """Bytes for one replica on all its devices; on the least of the nodes that may be given to it."""
    if not need.setting:
        return None
    if profile.device == "cuda":
        memories = [kind.gpu_memory_gib for kind in kinds if kind.gpu_memory_gib is not None]
        gib = min(memories, default=assumptions.gpu_memory_gib)
        if gib is None:
            return None
        share = profile.engines.gpu_memory_utilization if need.setting == "engines" else 1.0
        bundles = profile.engines.tensor_parallel_size if need.setting == "engines" else 1
        return gib * GIB * need.actor_gpus * bundles * share
    # Each takes an equal part of its node's memory.
    shares = [kind.memory_gib / max(1, _on_one_node(kind, need)) for kind in kinds]
    if not shares and len(machine.nodes) > 1:
        return None
    alone = machine.memory_gib / max(1, min(_most_replicas(need, profile), int(machine.cpus // need.actor_cpus)))
    return min(shares, default=alone) * GIB


def _most_replicas(need: StageNeed, profile: Profile) -> int:
    if need.setting == "trainers":
        return profile.trainers.num_workers
    return profile.engines.max_actors if need.setting == "engines" else profile.sketchers.max_actors


def _replicas(need: StageNeed, profile: Profile, machine: Machine, kinds: list[NodeType]) -> int:
    """How many of a stage's replicas run at once when all nodes are up."""
    bundles = profile.engines.tensor_parallel_size if need.setting == "engines" else 1
    if machine.nodes:
        room = sum(node.holds(need) * node.count for node in machine.nodes)
    else:
        room = int(machine.gpus // need.actor_gpus) if need.actor_gpus else int(machine.cpus // need.actor_cpus)
    beside = machine.cpus if need.setting == "trainers" else machine.cpus - profile.data_cpus
    room = min(room, int(beside // need.actor_cpus))
    return max(0, min(_most_replicas(need, profile), room // bundles))


def _peak_flops(
    profile: Profile, assumptions: Assumptions, need: StageNeed, kinds: list[NodeType]
) -> float | None:
    """Peak FLOP/s of one replica, on the slowest nodes that may be given to it."""
    if profile.device == "cpu":
        return assumptions.core_gigaflops * 1e9 * need.actor_cpus
    rates = [kind.gpu_teraflops for kind in kinds if kind.gpu_teraflops is not None]
    teraflops = min(rates, default=assumptions.gpu_teraflops)
    bundles = profile.engines.tensor_parallel_size if need.setting == "engines" else 1
    return None if teraflops is None else teraflops * 1e12 * need.actor_gpus * bundles


def _dollars(
    profile: Profile,
    assumptions: Assumptions,
    need: StageNeed,
    kinds: list[NodeType],
    replicas: int,
    took: float,
) -> float | None:
    """The nodes that the replicas fill, and the head, for the time of the stage."""
    if profile.cluster is None:
        return None if assumptions.price_per_hour is None else assumptions.price_per_hour * took / 3600
    bundles = profile.engines.tensor_parallel_size if need.setting == "engines" else 1
    per_hour, left = profile.cluster.head.price_per_hour or 0.0, replicas * bundles
    for kind in kinds:
        if kind is profile.cluster.head:
            left -= _on_one_node(kind, need)
            continue
        if kind.price_per_hour is None:
            return None
        nodes = min(kind.max_nodes, math.ceil(max(0, left) / max(1, _on_one_node(kind, need))))
        left -= nodes * _on_one_node(kind, need)
        per_hour += nodes * kind.price_per_hour
    return per_hour * took / 3600


@dataclass(frozen=True)
class _Change:
    """Settings changed together, and how a person would change them."""

    recipe: Recipe
    profile: Profile
    text: str


def _mend(
    short: StagePlan,
    shape: ModelShape,
    recipe: Recipe,
    profile: Profile,
    assumptions: Assumptions,
    machine: Machine,
) -> str:
    """What is short, and the first of the changes worth trying that make it fit, one by one or together."""
    assert short.needed is not None and short.available is not None
    start = f"{short.stage} needs {short.needed.peak / GIB:.1f} GiB a replica and has {short.available / GIB:.1f}"
    tried = False
    for change in _changes(short.stage, recipe, profile):
        need = next(need for need in needs(change.recipe, change.profile) if need.stage == short.stage)
        kinds = _kinds(change.profile, need)
        available = _available(change.profile, assumptions, need, kinds, machine)
        room = _replicas(need, change.profile, machine, kinds)
        least = change.profile.trainers.num_workers if short.stage == "train" else 1
        if available is None or room < least:
            continue
        tried = True
        needed = _memory(short.stage, shape, change.recipe, change.profile, assumptions, available)
        if needed is not None and needed.peak <= available:
            return (
                f"{start}; with {change.text} it would need {needed.peak / GIB:.1f} of {available / GIB:.1f} GiB"
            )
    why = "no setting tried here makes it fit" if tried else "there is no room for a larger replica"
    return f"{start}; {why}: use GPUs with more memory, more of them, or a smaller model"


def _changes(stage: str, recipe: Recipe, profile: Profile) -> Iterator[_Change]:
    """Changes in the order of what they cost; the later ones keep what the earlier ones changed."""
    texts: list[str] = []

    def changed(text: str) -> _Change:
        texts.append(text)
        return _Change(recipe, profile, " and ".join(texts))

    if stage == "sketch":
        if not recipe.sketch.gradient_checkpointing:
            recipe = _with(recipe, "sketch", gradient_checkpointing=True)
            yield changed("--set sketch.gradient_checkpointing=true")
        if profile.device == "cuda":
            for gpus in (2.0, 4.0, 8.0):
                if gpus > profile.sketchers.gpus:
                    profile = _with(profile, "sketchers", gpus=gpus)
                    yield _Change(
                        recipe, profile, " and ".join([*texts, f"sketchers.gpus: {gpus:g} in the profile"])
                    )
    elif stage == "train":
        if not recipe.train.gradient_checkpointing:
            recipe = _with(recipe, "train", gradient_checkpointing=True)
            yield changed("--set train.gradient_checkpointing=true")
        if recipe.train.micro_batch_size > 1:
            recipe = _with(recipe, "train", micro_batch_size=1)
            yield changed("--set train.micro_batch_size=1")
        if recipe.train.zero_stage < 3:
            recipe = _with(recipe, "train", zero_stage=3)
            yield changed("--set train.zero_stage=3")
        for factor in (2, 4, 8):
            workers = profile.trainers.num_workers * factor
            if workers <= recipe.train.batch_size:  # more would have nothing to do
                more = _with(profile, "trainers", num_workers=workers)
                yield _Change(
                    recipe, more, " and ".join([*texts, f"trainers.num_workers: {workers} in the profile"])
                )
    elif profile.device == "cuda":
        for seqs in (64, 16):
            if seqs < profile.engines.max_num_seqs:
                lower = _with(profile, "engines", max_num_seqs=seqs)
                yield _Change(recipe, lower, f"engines.max_num_seqs: {seqs} in the profile")
        for size in (2, 4, 8):
            if size > profile.engines.tensor_parallel_size:
                cpus = max(profile.engines.cpus, float(size))
                wider = _with(
                    profile, "engines", tensor_parallel_size=size, gpus=float(size), cpus=cpus, min_actors=1
                )
                yield _Change(
                    recipe, wider, f"engines.tensor_parallel_size: {size} and gpus: {size} in the profile"
                )
    elif profile.engines.kv_cache_gib > 1:
        yield _Change(
            recipe, _with(profile, "engines", kv_cache_gib=1.0), "engines.kv_cache_gib: 1 in the profile"
        )


def _with(settings: SettingsType, section: str, **values: object) -> SettingsType:
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})
