"""The estimate of training, for plans."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.estimate import Change, Estimate, Planned, Replicas, with_changed
from congrad_ray.planning.flops import forward_flops
from congrad_ray.planning.memory import BYTES, Memory, process_bytes, weight_bytes
from congrad_ray.planning.volume import Lengths, Volume, kept_pairs, pairs_of
from congrad_ray.stages.train.arguments import REDUCE_BUCKET

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from congrad_ray.modeling.shape import ModelShape

# DeepSpeed's default stage3_max_live_parameters: elements of gathered weights alive at a time.
_LIVE_PARAMETERS = 1_000_000_000


def _volume(planned: Planned, iteration: int) -> Volume:
    train, lengths = planned.recipe.train, planned.lengths
    kept = kept_pairs(planned.recipe, lengths, planned.assumptions, pairs_of(planned.recipe, lengths))
    seen = kept * train.num_train_epochs
    if train.max_steps is not None:
        seen = train.max_steps * min(train.batch_size, kept)
    return Volume(
        seen,
        2 * seen,
        trained=seen * (lengths.prompt + 2 * lengths.paired_response),
        completions=2 * seen * lengths.paired_response,
    )


def train_flops(volume: Volume, shape: ModelShape, recipe: Recipe, lengths: Lengths) -> float:
    """Three times the forward (Kaplan et al. 2020: 6 per parameter and token), four with checkpointing.

    Attention runs over two rows a pair, all else over the tokens of `modeling.packing`, each prompt once. The
    logits are always computed a second time in the backward (`modeling.logprobs`). With an adapter the weights
    themselves get no gradients, which is one forward less, and the adapter's own products are not counted.
    """
    row = lengths.prompt + lengths.paired_response
    attended = volume.requests * row
    attention = forward_flops(shape, attended, row / 2, 0) - forward_flops(shape, attended, 0, 0)
    passes = 4 if recipe.train.gradient_checkpointing else 3
    tokens = forward_flops(shape, volume.trained, 0, 0)
    if recipe.train.lora is not None:
        return tokens * (passes - 1) + attention * passes + 4.0 * shape.head * volume.completions
    return (tokens + attention) * passes + 8.0 * shape.head * volume.completions


def trainable_parameters(shape: ModelShape, recipe: Recipe) -> int:
    """How many numbers the optimiser changes: all of the model's, or those of an adapter."""
    if recipe.train.lora is None:
        return shape.parameters
    model = _model_to_train(shape.config, recipe)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _model_to_train(config: PretrainedConfig, recipe: Recipe) -> PreTrainedModel:
    """The model without numbers, in evaluation mode, with a new adapter in its layers where the recipe has one."""
    from congrad_ray.modeling.adapters import with_adapter
    from congrad_ray.modeling.shape import meta_model

    model, lora = meta_model(config, recipe.model.dtype).eval(), recipe.train.lora
    if lora is not None:
        with _no_warnings_of_names():
            with_adapter(model, lora, recipe.train.seed)  # puts it into the model's own layers
    return model


@contextmanager
def _no_warnings_of_names() -> Iterator[None]:
    """Within, none of a new name for gradient checkpointing, which training itself reports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def pass_tokens(recipe: Recipe, profile: Profile) -> int:
    """Tokens of the largest pass: those of the budget, or of one pair with two rows of model.max_length."""
    return max(recipe.train.batch_tokens(profile.device), 2 * recipe.model.max_length)


def training_memory(shape: ModelShape, recipe: Recipe, profile: Profile, assumptions: Assumptions) -> Memory:
    """A training worker of DeepSpeed under ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3).

    Mixed precision takes 2 bytes a weight and a gradient, and 4 each for the float32 master copy and Adam's two
    moments. Stage 1 spreads the last three over the workers, stage 2 the gradients as well, stage 3 the weights.
    DeepSpeed keeps a master copy under float32 too, except without ZeRO. What is not trained has weights alone.
    The optimiser's step comes after the backward, so its float32 gradients and temporaries and the activations are
    not there together on a GPU. On a CPU they are: glibc keeps what the backward freed in pieces below 32 MiB, and
    the step's are larger.
    """
    workers, stage = profile.trainers.num_workers, recipe.train.zero_stage
    width, trained = BYTES[recipe.model.dtype], float(trainable_parameters(shape, recipe))
    adapter = 0.0 if recipe.train.lora is None else trained  # beside the model's own weights
    no_master = stage == 0 and recipe.model.dtype == "float32"
    share = trained if no_master else trained / workers
    parts = {
        "weights": (weight_bytes(shape, recipe, recipe.train.lora) + width * adapter)
        / (workers if stage == 3 else 1),
        "master_weights": 0.0 if no_master else 4 * share,
        "moments": 8 * share,
        # Without ZeRO bfloat16 gradients are gathered in float32.
        "gradients": trained * (4 if stage == 0 else width) / (workers if stage >= 2 else 1),
        "process": process_bytes(profile, assumptions, 1),
    }
    if stage == 3:
        parts["gathered_weights"] = width * min(float(shape.parameters), _LIVE_PARAMETERS)
    elif stage > 0:
        # Memory of a CPU that was never written to is not there: a small model does not fill the bucket.
        filled = min(trained, REDUCE_BUCKET) if profile.device == "cpu" else REDUCE_BUCKET
        parts["reduce_bucket"] = width * float(filled)
    standing = sum(parts.values())
    overhead = 1 + assumptions.overhead(profile.device)
    working = overhead * training_working_bytes(shape, recipe, pass_tokens(recipe, profile))
    parts["activations"] = working
    # The shares' gradients in float32; on a CPU, AdamW makes two tensors as large as its weights besides.
    step = 4 * share * ((0 if no_master else 1) + (2 if profile.device == "cpu" else 0))
    parts["optimiser_step"] = step
    return Memory(parts, standing + (working + step if profile.device == "cpu" else max(working, step)))


def training_working_bytes(shape: ModelShape, recipe: Recipe, tokens: int) -> int:
    """Bytes beside weights, gradients and optimiser, at their peak, for a pass of so many tokens.

    They are those of pairs with rows of model.max_length, and of a shorter pair for the rest. A weight's gradient
    is freed when it is whole, as DeepSpeed does that moves it to where it gathers gradients.
    """
    from congrad_ray.modeling.packing import shared_prompt_tokens, two_sequence_tokens
    from congrad_ray.modeling.rehearsal import extrapolated, forget_gradient, peak_bytes
    from congrad_ray.modeling.shared_prompts import attention_over, completion_sums, why_not_shared
    from congrad_ray.modeling.tokenization import TokenizedPair

    full, rest = divmod(tokens, 2 * recipe.model.max_length)
    responses = [recipe.model.max_length - 1] * full + ([rest // 2] if rest > 1 else [])
    pairs = [TokenizedPair([0], [0] * length, [0] * length) for length in responses]

    def peak(config: PretrainedConfig) -> int:
        model = _model_to_train(config, recipe)
        shared = why_not_shared(model) is None
        batch = shared_prompt_tokens(pairs, "meta") if shared else two_sequence_tokens(pairs, 0, "meta")
        model.train()
        if recipe.train.gradient_checkpointing:
            with _no_warnings_of_names():
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter.register_post_accumulate_grad_hook(forget_gradient)

        def step() -> None:
            with attention_over(model, batch) as arguments:
                completion_sums(model, batch, arguments).sum().backward()

        return peak_bytes(model, step)

    return extrapolated(shape, peak)


def policy_bytes(shape: ModelShape, recipe: Recipe) -> int:
    """Bytes of a checkpoint's safetensors: every parameter in its dtype, tied ones once, or the adapter's."""
    lora = recipe.train.lora
    written = shape.parameters if lora is None or lora.merge else trainable_parameters(shape, recipe)
    return written * BYTES[recipe.model.dtype]


def _checkpoints(planned: Planned, volume: Volume) -> float:
    """The two training checkpoints that are kept while training runs: weights, master copy, moments."""
    recipe, shape = planned.recipe, planned.shapes.policy
    steps = recipe.train.max_steps or volume.rows / recipe.train.batch_size
    return (
        0.0
        if steps <= recipe.train.save_steps
        else 2.0 * (BYTES[recipe.model.dtype] * shape.parameters + 12 * trainable_parameters(shape, recipe))
    )


def _changes(recipe: Recipe, profile: Profile) -> Iterator[Change]:
    texts: list[str] = []

    def changed(text: str) -> Change:
        texts.append(text)
        return Change(recipe, profile, " and ".join(texts))

    if not recipe.train.gradient_checkpointing:
        recipe = with_changed(recipe, "train", gradient_checkpointing=True)
        yield changed("--set train.gradient_checkpointing=true")
    longest = 2 * recipe.model.max_length
    if recipe.train.batch_tokens(profile.device) > longest:  # the longest pair is not made smaller
        recipe = with_changed(recipe, "train", max_tokens_per_batch=longest)
        yield changed(f"--set train.max_tokens_per_batch={longest}")
    if recipe.train.zero_stage < 3:
        recipe = with_changed(recipe, "train", zero_stage=3)
        yield changed("--set train.zero_stage=3")
    for factor in (2, 4, 8):
        workers = profile.trainers.num_workers * factor
        if workers <= recipe.train.batch_size:  # more would have nothing to do
            more = with_changed(profile, "trainers", num_workers=workers)
            yield Change(recipe, more, " and ".join([*texts, f"trainers.num_workers: {workers} in the profile"]))


ESTIMATE = Estimate(
    volume=_volume,
    stored=lambda planned, volume: float(policy_bytes(planned.shapes.policy, planned.recipe)),
    temporary=_checkpoints,
    replicas=Replicas(
        model=lambda shapes: shapes.policy,
        memory=lambda planned, available: training_memory(
            planned.shapes.policy, planned.recipe, planned.profile, planned.assumptions
        ),
        flops=lambda planned, volume: (
            train_flops(volume, planned.shapes.policy, planned.recipe, planned.lengths),
            0.0,
        ),
        mfu=lambda assumptions: (assumptions.backward_mfu, 1.0),
        start_s=lambda assumptions: assumptions.replica_start_s,
        changes=_changes,
        min_replicas=lambda profile: profile.trainers.num_workers,
    ),
)
