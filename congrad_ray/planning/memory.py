"""Memory of one engine, sketch replica or training worker, by part, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import BUILTIN_WORLD, Recipe
from congrad_ray.modeling.rehearsal import sketch_working_bytes, training_working_bytes
from congrad_ray.modeling.shape import BYTES, ModelShape
from congrad_ray.planning.assumptions import Assumptions

GIB = 2**30
# vLLM's default budget of tokens in one forward pass on data-centre GPUs (max_num_batched_tokens).
_ENGINE_BATCHED_TOKENS = 8192
# stages.train.engine.deepspeed_config: elements of the buffer in which gradients wait to be reduced.
_REDUCE_BUCKET = 50_000_000
# DeepSpeed's default stage3_max_live_parameters: elements of gathered weights alive at a time.
_LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """What one replica needs on its devices together. `peak` is not the sum of the parts where they take turns."""

    parts: dict[str, float]  # bytes
    peak: float  # bytes
    note: str = ""


def engine_memory(shape: ModelShape, recipe: Recipe, profile: Profile, assumptions: Assumptions) -> Memory:
    """The least a vLLM engine starts with: its longest sequence has to fit its KV cache."""
    engines, width = profile.engines, BYTES[recipe.model.dtype]
    compared = recipe.comparison_length if recipe.prompts.evaluation.name != BUILTIN_WORLD else 0
    longest = max(recipe.model.max_length, recipe.judgement_length, compared)
    overhead = _process(profile, assumptions, engines.tensor_parallel_size)
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
    """Sequences of so many tokens that the KV cache of an engine holds, which takes all memory that is left."""
    left = available - memory.peak + memory.parts["kv_cache"]
    return max(0, int(left / (kv_bytes_per_token(shape, recipe) * tokens)))


def sketch_memory(
    shape: ModelShape, recipe: Recipe, profile: Profile, assumptions: Assumptions, available: float | None
) -> Memory:
    """A sketch replica with micro-batches as large as fit `available`, one pair at least."""
    settings, longest = recipe.sketch, 2 * recipe.model.max_length
    devices, budget = max(1, int(profile.sketchers.gpus)), settings.batch_tokens(profile.device)
    wanted = max(1, budget // longest)
    fixed = {
        "weights": float(shape.parameters * BYTES[recipe.model.dtype]),
        "sketch_tables": 0.0,  # the map works places out; see stages.sketch.countsketch
        "sketches": 8.0 * wanted * settings.width,  # float32, with what turns over the end
        "process": _process(profile, assumptions, devices),
    }
    if settings.method == "exact":
        entries = sum(out * into for out, into in shape.linear)
        fixed["language_gradients"] = 4.0 * entries * len(recipe.prompts.languages)

    def memory(pairs: int, note: str = "") -> Memory:
        working = sketch_working_bytes(shape, recipe, pairs) * (1 + assumptions.overhead(profile.device))
        parts = {**fixed, "activations": working}
        return Memory(parts, sum(parts.values()), note)

    found = memory(wanted)
    if available is None or found.peak <= available or wanted == 1:
        return found
    one = memory(1)
    if one.peak > available:
        return one
    fitting = max(1, int((available - one.peak) // one.parts["activations"]) + 1)
    note = f"micro-batches of {fitting * longest:,} tokens fit, not sketch.max_tokens_per_batch"
    return memory(fitting, f"{note} = {budget:,}")


def training_memory(shape: ModelShape, recipe: Recipe, profile: Profile, assumptions: Assumptions) -> Memory:
    """A training worker of DeepSpeed under ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3).

    Mixed precision takes 2 bytes a weight and a gradient, and 4 each for the float32 master copy and Adam's two
    moments. Stage 1 spreads the last three over the workers, stage 2 the gradients as well, stage 3 the weights.
    DeepSpeed keeps a master copy under float32 too, except without ZeRO. The optimiser's step comes after the
    backward, so its float32 gradients and temporaries and the activations are not there together.
    """
    train, workers = recipe.train, profile.trainers.num_workers
    count, width, stage = float(shape.parameters), BYTES[recipe.model.dtype], recipe.train.zero_stage
    no_master = stage == 0 and recipe.model.dtype == "float32"
    share = count if no_master else count / workers
    parts = {
        "weights": width * count / (workers if stage == 3 else 1),
        "master_weights": 0.0 if no_master else 4 * share,
        "moments": 8 * share,
        # Without ZeRO bfloat16 gradients are gathered in float32.
        "gradients": count * (4 if stage == 0 else width) / (workers if stage >= 2 else 1),
        "process": _process(profile, assumptions, 1),
    }
    if stage == 3:
        parts["gathered_weights"] = width * min(count, _LIVE_PARAMETERS)
    elif stage > 0:
        # Memory of a CPU that was never written to is not there: a small model does not fill the bucket.
        filled = min(count, _REDUCE_BUCKET) if profile.device == "cpu" else _REDUCE_BUCKET
        parts["reduce_bucket"] = width * float(filled)
    standing = sum(parts.values())
    overhead = 1 + assumptions.overhead(profile.device)
    working = overhead * training_working_bytes(shape, recipe, train.micro_batch_size)
    parts["activations"] = working
    # The shares' gradients in float32; on a CPU, AdamW makes two tensors as large as its weights besides.
    step = 4 * share * ((0 if no_master else 1) + (2 if profile.device == "cpu" else 0))
    parts["optimiser_step"] = step
    return Memory(parts, standing + max(working, step))


def _process(profile: Profile, assumptions: Assumptions, devices: int) -> float:
    gib = assumptions.process_gib if profile.device == "cpu" else assumptions.device_overhead_gib * devices
    return gib * GIB
