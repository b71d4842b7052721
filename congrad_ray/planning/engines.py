"""What the stages that ask vLLM engines have in common in a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from congrad_ray.config.profile import PoolName, Profile
from congrad_ray.config.recipe import BUILTIN_WORLD, Recipe
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.estimate import Change, Replicas, with_changed
from congrad_ray.planning.flops import forward_flops
from congrad_ray.planning.memory import BYTES, GIB, Memory, process_bytes
from congrad_ray.planning.volume import Volume

if TYPE_CHECKING:
    from congrad_ray.modeling.shape import ModelShape
    from congrad_ray.planning.shapes import Shapes

# vLLM's default budget of tokens in one forward pass on data-centre GPUs (max_num_batched_tokens).
_ENGINE_BATCHED_TOKENS = 8192


def policy_name(iteration: int) -> str:
    """What `Replicas.asks` calls the policy that an iteration begins with."""
    return f"M_{iteration}"


def engine_replicas(
    model: Callable[[Shapes], ModelShape],
    asks: Callable[[Recipe, int], Sequence[str | None]] = lambda recipe, iteration: [None],
    pool: PoolName = "engines",
) -> Replicas:
    """A stage's engines of the profile's section `pool`; `model` picks the one that sets their memory and work.

    `asks(recipe, iteration)` names the models asked, in order, so that an engine that is up is not started again.
    """
    return Replicas(
        model=model,
        memory=lambda planned, available: engine_memory(
            model(planned.shapes), planned.recipe, planned.profile, planned.assumptions, pool
        ),
        flops=lambda planned, volume: engine_flops(model(planned.shapes), volume),
        mfu=lambda assumptions: (assumptions.prefill_mfu, assumptions.decode_mfu),
        start_s=lambda assumptions: assumptions.engine_start_s,
        changes=_changes,
        sequences=lambda planned, memory, available, tokens: sequences_that_fit(
            memory, available, model(planned.shapes), planned.recipe, tokens
        ),
        asks=asks,
    )


def engine_memory(
    shape: ModelShape, recipe: Recipe, profile: Profile, assumptions: Assumptions, pool: PoolName = "engines"
) -> Memory:
    """The least a vLLM engine starts with: its longest sequence has to fit its KV cache."""
    engines, width = profile.engines_of(pool), BYTES[recipe.model.dtype]
    compared = recipe.comparison_length if recipe.prompts.evaluation.name != BUILTIN_WORLD else 0
    longest = max(recipe.model.max_length, recipe.judgement_length, compared)
    overhead = process_bytes(profile, assumptions, engines.tensor_parallel_size)
    weights = float(shape.parameters * width)
    if profile.device == "cpu":
        # vLLM takes the KV cache that the profile gives it, whole.
        parts = {"weights": weights, "kv_cache": engines.kv_cache_gib * GIB, "process": overhead}
        return Memory(parts, sum(parts.values()))
    parts = {
        "weights": weights,
        "kv_cache": kv_bytes_per_token(shape, recipe) * longest,
        # One layer at a time: its input, its output, attention's and the two sides of the MLP; and float32
        # logits of the sampled tokens with the sampler's copy of them.
        "activations": _ENGINE_BATCHED_TOKENS * (4.0 * shape.hidden + 2.0 * shape.intermediate) * width
        + 8.0 * engines.max_num_seqs * shape.vocabulary,
        "process": overhead,
    }
    return Memory(parts, sum(parts.values()))


def kv_bytes_per_token(shape: ModelShape, recipe: Recipe) -> float:
    """A key and a value for each layer and key-value head. Sliding windows are not taken off."""
    return 2.0 * shape.layers * shape.key_value_heads * shape.head_size * BYTES[recipe.model.dtype]


def sequences_that_fit(memory: Memory, available: float, shape: ModelShape, recipe: Recipe, tokens: float) -> int:
    """How many sequences of this many tokens an engine's KV cache holds, which takes all memory that is left."""
    left = available - memory.peak + memory.parts["kv_cache"]
    return max(0, int(left / (kv_bytes_per_token(shape, recipe) * tokens)))


def engine_flops(shape: ModelShape, volume: Volume) -> tuple[float, float]:
    """FLOPs on prompts, and on generated tokens."""
    if not volume.requests:
        return 0.0, 0.0
    read, written = volume.prefill / volume.requests, volume.decode / volume.requests
    # Causal: a prompt's token sees half of the prompt on average. Only the last one is predicted from.
    prefill = forward_flops(shape, volume.prefill, read / 2, volume.requests)
    return prefill, forward_flops(shape, volume.decode, read + written / 2, volume.decode)


def _changes(recipe: Recipe, profile: Profile) -> Iterator[Change]:
    engines = profile.engines
    if profile.device == "cuda":
        for seqs in (64, 16):
            if seqs < engines.max_num_seqs:
                lower = with_changed(profile, "engines", max_num_seqs=seqs)
                yield Change(recipe, lower, f"engines.max_num_seqs: {seqs} in the profile")
        for size in (2, 4, 8):
            if size > engines.tensor_parallel_size:
                cpus = max(engines.cpus, float(size))
                wider = with_changed(
                    profile, "engines", tensor_parallel_size=size, gpus=float(size), cpus=cpus, min_actors=1
                )
                yield Change(
                    recipe, wider, f"engines.tensor_parallel_size: {size} and gpus: {size} in the profile"
                )
    elif engines.kv_cache_gib > 1:
        smaller = with_changed(profile, "engines", kv_cache_gib=1.0)
        yield Change(recipe, smaller, "engines.kv_cache_gib: 1 in the profile")
