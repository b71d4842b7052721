"""vLLM engines that outlive a stage: whoever asks the same model next finds them up.

They are plain Ray actors of the driver's process, so they end with it, however it ends. They start at their first
use and are let go when another model needs their room, when a stage needs it that asks no model, and at the end of
what `keeping` is around.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from congrad_ray.config.profile import Engines, Profile
from congrad_ray.modeling.source import ModelSource
from congrad_ray.runtime.driver_actors import driver_actor
from congrad_ray.runtime.resources import Machine, Node, nodes_of
from congrad_ray.runtime.session import connected, machine
from congrad_ray.runtime.vllm_engine import EngineLog, VLLMEngine

logger = logging.getLogger(__name__)

ENGINE_RESTARTS = 20
_CPU_BATCHED_TOKENS = 4096
_OF_LENGTH = ("max_model_len", "max_num_batched_tokens")
_STOP_SECONDS = 5.0
_PROCESS_GIB = 1.0


@dataclass(frozen=True)
class Hold:
    """What actors hold of the cluster while they are there: `count` times so many CPUs and GPUs on one node.

    `memory_gib`: of all of them. `nodes`: the name of the kind of nodes that they are bound to.
    """

    cpus: float
    gpus: float = 0.0
    count: int = 1
    memory_gib: float = 0.0
    nodes: str | None = None


@dataclass(frozen=True)
class EngineSpec:
    """An engine as it is started: `bundles` times the resources of a `bundle`, one for each of its GPUs."""

    source: ModelSource
    engine_kwargs: dict[str, Any]
    bundle: dict[str, float]
    bundles: int
    placement: str
    environment: dict[str, str]
    nodes: str | None = None
    memory_gib: float = 0.0

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.engine_kwargs["max_model_len"])

    @property
    def key(self) -> str:
        """Engines with the same key answer alike; their `length` is another matter."""
        kwargs = {name: value for name, value in self.engine_kwargs.items() if name not in _OF_LENGTH}
        model = (self.source.name, self.source.fingerprint)
        placed = (self.bundle, self.bundles, self.placement, self.environment, self.nodes)
        return json.dumps([model, kwargs, placed], sort_keys=True, default=str)

    def serves(self, asked: EngineSpec) -> bool:
        """Whether an engine of this kind can stand for the one asked for."""
        return self.key == asked.key and self.length >= asked.length

    def hold(self, count: int) -> Hold:
        """What so many engines hold, by engine where all of an engine is on one node, else by bundle."""
        whole = self.bundles if self.placement == "STRICT_PACK" else 1
        return Hold(
            self.bundle["CPU"] * whole,
            self.bundle.get("GPU", 0.0) * whole,
            count * self.bundles // whole,
            self.memory_gib * count,
            self.nodes,
        )


def engine_spec(source: ModelSource, profile: Profile, engines: Engines) -> EngineSpec:
    """How `complete` starts an engine for a model: long enough for all that any stage of the recipe asks of it."""
    settings, bundles = source.settings, engines.tensor_parallel_size
    on_cpu = profile.device == "cpu"
    length = _length(source)
    kwargs: dict[str, Any] = {
        "dtype": settings.dtype,
        "max_model_len": length,
        "max_num_seqs": engines.max_num_seqs,
        "trust_remote_code": settings.trust_remote_code,
        "enable_prefix_caching": True,
        "enforce_eager": on_cpu or engines.enforce_eager,
        "load_format": "safetensors",
        "disable_log_stats": True,
        "seed": 0,
        # One process less where one device is enough; several may be on several nodes.
        "distributed_executor_backend": "uni" if bundles == 1 else "ray",
    }
    if "revision" in source.pretrained_arguments():
        kwargs["revision"] = kwargs["tokenizer_revision"] = settings.revision
    bundle: dict[str, float] = {"CPU": engines.cpus / bundles, **engines.resources}
    if engines.memory_bytes:
        bundle["memory"] = engines.memory_bytes // bundles
    environment: dict[str, str] = {}
    memory_gib = engines.memory_gib or 0.0
    if on_cpu:
        environment = _cpu_environment(profile, engines)
        # vLLM 0.29 dies on a CPU ("CPU Generator does not use offset") when the prompt of a request with a seed
        # is computed in chunks, which happens as soon as many requests arrive together.
        kwargs["enable_chunked_prefill"] = False
        kwargs["max_num_batched_tokens"] = max(_CPU_BATCHED_TOKENS, length)
        memory_gib = max(memory_gib, _weights_gib(source) + engines.kv_cache_gib + _PROCESS_GIB)
    else:
        kwargs["tensor_parallel_size"] = bundles
        kwargs["gpu_memory_utilization"] = engines.gpu_memory_utilization
        bundle["GPU"] = engines.gpus / bundles
    kwargs |= engines.engine_kwargs
    return EngineSpec(source, kwargs, bundle, bundles, engines.placement, environment, engines.nodes, memory_gib)


def _length(source: ModelSource) -> int:
    asked = source.settings.max_length
    if source.longest <= asked:
        return asked
    # A comparison's length is a guess from above, which vLLM would refuse where the model is not as long.
    return max(asked, min(source.longest, positions(source) or source.longest))


def positions(source: ModelSource) -> int | None:
    """How many positions a model's configuration says it has, where it does."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.whole.files(), **source.whole.pretrained_arguments())
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _weights_gib(source: ModelSource) -> float:
    """Of the weights in a model's folder; infinite where it is not here, which leaves no room beside it."""
    files = list(Path(source.whole.files()).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) / 2**30 if files else math.inf


def _cpu_environment(profile: Profile, engines: Engines) -> dict[str, str]:
    """Variables of an engine's process on a CPU; each saves seconds at the start or time while running."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(engines.kv_cache_gib))),
        # vLLM would pin every engine of a node to the same cores; threads that wait for a busy core spin.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(profile.threads_of(engines)),
        # Decoding is many small products, between which threads should not sleep: libgomp's own default, which
        # takes precedence over the waiting that session.connect sets for other workers.
        "GOMP_SPINCOUNT": "300000",
        # Without it the first request with log-probabilities waits for a C++ compilation of the sampler.
        "TORCH_COMPILE_DISABLE": "1",
    }


@dataclass
class EnginePool:
    """Engines of one kind that are up, starting, or waiting for a node."""

    spec: EngineSpec
    engines: dict[str, Any] = field(default_factory=dict)  # actors by name
    groups: dict[str, Any] = field(default_factory=dict)  # placement groups of those over several GPUs

    @property
    def hold(self) -> Hold:
        return self.spec.hold(len(self.engines))

    @property
    def described(self) -> str:
        number = len(self.engines)
        return f"vLLM for {self.spec.source.name} ({number} engine{'' if number == 1 else 's'})"


# Of one Ray, the one used longest ago first. Every Ray counts its jobs from 1; a node's id is its own.
_pools: dict[tuple[str, str], list[EnginePool]] = {}
_made = 0
_keepers = 0


@contextmanager
def keeping() -> Iterator[None]:
    """Engines that are started in the body are up until its end, unless their room is needed; it may be nested."""
    global _keepers
    _keepers += 1
    try:
        yield
    finally:
        _keepers -= 1
        if not _keepers:
            let_go()


def engines_for(
    spec: EngineSpec, least: int, most: int, profile: Profile, there_is: Machine | None = None
) -> EnginePool:
    """A pool of engines that serve `spec`: one that is there, or a new one, for which others may be let go.

    It gets from `least` to `most` engines, as many as the cluster has room for. Those that wait for a node join
    when it is up.
    """
    pools = _here()
    there_is = there_is or machine()
    data = Hold(profile.data_cpus)
    nodes = _nodes(spec, profile, there_is)
    count = most if profile.cluster else max(least, min(most, room(nodes, spec, [data], math.inf)))
    found = next((pool for pool in pools if pool.spec.serves(spec)), None)
    if found:
        _forget_dead(found)
    if not found or len(found.engines) < count:
        others = [pool for pool in pools if pool is not found]
        same = [pool.spec.key == spec.key for pool in others]  # too short
        memory = math.inf if profile.device == "cuda" else there_is.memory_gib
        holds = [pool.hold for pool in others]
        for place in in_the_way(nodes, spec, count, holds, same, data, memory):
            _end(others[place], "another model needs its room" if not same[place] else "it is too short")
            pools.remove(others[place])
    if not found:
        found = EnginePool(spec)
    elif found.engines:
        logger.info(f"{found.described} is up already")
    if found in pools:
        pools.remove(found)
    pools.append(found)
    while len(found.engines) < count:
        _add(found)
    return found


def room(nodes: Sequence[Node], spec: EngineSpec, held: Sequence[Hold], memory_gib: float) -> int:
    """How many engines fit beside what is held, wherever on the nodes that may be.

    An actor that is there takes the place of as many engines, or parts of one, as it is larger than one of them,
    rounded up. `memory_gib` is of all nodes together.
    """
    one = spec.hold(1)
    slots = 0
    for node in nodes:
        fitting = [math.floor(node.cpus / one.cpus + 1e-9)] if one.cpus else []
        fitting += [math.floor(node.gpus / one.gpus + 1e-9)] if one.gpus else []
        slots += node.count * min(fitting, default=0)
    for hold in held:
        if hold.nodes is not None and spec.nodes is not None and hold.nodes != spec.nodes:
            continue
        lost = [math.ceil(hold.cpus / one.cpus - 1e-9)] if one.cpus else []
        lost += [math.ceil(hold.gpus / one.gpus - 1e-9)] if one.gpus else []
        slots -= hold.count * max(lost, default=0)
    fitting_engines = max(0, slots) // one.count
    if one.memory_gib and math.isfinite(memory_gib):
        left = memory_gib - sum(hold.memory_gib for hold in held)
        by_memory = math.floor(left / one.memory_gib) if math.isfinite(left) else 0
        fitting_engines = min(fitting_engines, max(0, by_memory))
    return fitting_engines


def in_the_way(
    nodes: Sequence[Node],
    spec: EngineSpec,
    count: int,
    held: Sequence[Hold],
    useless: Sequence[bool],
    data: Hold,
    memory_gib: float,
) -> list[int]:
    """The places of the pools to be let go for `count` engines: useless ones, then those used longest ago.

    `held`: by the pools that are up, the one used longest ago first.
    """
    going = [place for place, is_useless in enumerate(useless) if is_useless]
    staying = [place for place in range(len(held)) if place not in going]
    while staying and room(nodes, spec, [data, *(held[place] for place in staying)], memory_gib) < count:
        going.append(staying.pop(0))
    return going


def _nodes(spec: EngineSpec, profile: Profile, there_is: Machine) -> Sequence[Node]:
    if profile.cluster is None:
        return there_is.nodes
    return [node for node in nodes_of(profile.cluster) if spec.nodes in (None, node.name)]


def let_go(why: str = "nothing asks it any more") -> None:
    """Ends all engines of the connected Ray, and says so."""
    if not connected():
        _pools.clear()
        return
    pools = _here()
    while pools:
        _end(pools.pop(), why)


def engine_starts() -> int:
    """How many engines the driver has started, those included that were started again."""
    import ray

    found: int = ray.get(driver_actor(EngineLog).starts.remote())
    return found


def _here() -> list[EnginePool]:
    """The pools of the connected Ray; handles of another Ray would end this process."""
    import ray

    context = ray.get_runtime_context()
    here = (context.get_node_id(), context.get_job_id())
    for key in [key for key in _pools if key != here]:
        del _pools[key]
    return _pools.setdefault(here, [])


def _add(pool: EnginePool) -> None:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    global _made
    spec = pool.spec
    name = f"engine-{_made}"
    _made += 1
    options: dict[str, Any] = {"max_restarts": ENGINE_RESTARTS, "max_task_retries": 0}
    if spec.environment:
        options["runtime_env"] = {"env_vars": spec.environment}
    if spec.bundles == 1:
        others = {key: value for key, value in spec.bundle.items() if key not in ("CPU", "GPU", "memory")}
        options |= {"num_cpus": spec.bundle["CPU"], "num_gpus": spec.bundle.get("GPU", 0.0), "resources": others}
        if "memory" in spec.bundle:
            options["memory"] = spec.bundle["memory"]
    else:
        # vLLM's own workers hold the bundles.
        bundles = [dict(spec.bundle) for _ in range(spec.bundles)]
        group = ray.util.placement_group(bundles, strategy=spec.placement)
        pool.groups[name] = group
        options |= {
            "num_cpus": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                group, placement_group_capture_child_tasks=True
            ),
        }
    actor = ray.remote(VLLMEngine).options(**options)
    pool.engines[name] = actor.remote(name, spec.source, spec.engine_kwargs)


def _forget_dead(pool: EnginePool) -> None:
    """Takes out engines that Ray does not start again."""
    import ray

    # As the watchdog: the public way to ask goes by the dashboard.
    states = {key: actor["State"] for key, actor in ray._private.state.actors().items()}
    for name, actor in list(pool.engines.items()):
        if states.get(actor._actor_id.hex()) == "DEAD":
            _remove(pool, name)


def _end(pool: EnginePool, why: str) -> None:
    import ray

    logger.info(f"{pool.described} ends: {why}")
    stopped = [actor.stop.remote() for actor in pool.engines.values()]
    with suppress(Exception):  # one that is starting, or gone
        ray.wait(stopped, num_returns=len(stopped), timeout=_STOP_SECONDS)
    for name in list(pool.engines):
        _remove(pool, name)


def _remove(pool: EnginePool, name: str) -> None:
    import ray

    ray.kill(pool.engines.pop(name))
    if name in pool.groups:
        ray.util.remove_placement_group(pool.groups.pop(name))
