"""The estimate of training, for plans."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.estimate import Change, Estimate, Planned, Replicas, with_changed
from congrad_ray.planning.flops import forward_flops
from congrad_ray.planning.memory import BYTES, Memory, process_bytes
from congrad_ray.planning.volume import Lengths, Volume, kept_pairs, pairs_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from congrad_ray.modeling.shape import ModelShape

# engine.deepspeed_config: elements of the buffer in which gradients wait to be reduced.
_REDUCE_BUCKET = 50_000_000
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
        trained=2 * seen * (lengths.prompt + lengths.paired_response),
        completions=2 * seen * lengths.paired_response,
    )


def train_flops(
    volume: Volume, shape: ModelShape, recipe: Recipe, lengths: Lengths, assumptions: Assumptions
) -> float:
    """Three times the forward (Kaplan et al. 2020: 6 per parameter and token), four with checkpointing.

    The logits are always computed a second time in the backward (`modeling.logprobs`).
    """
    row = lengths.prompt + lengths.paired_response
    tokens = volume.trained * (1 + assumptions.training_padding)
    passes = 4 if recipe.train.gradient_checkpointing else 3
    return forward_flops(shape, tokens, row / 2, 0) * passes + 8.0 * shape.head * volume.completions


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
        "process": process_bytes(profile, assumptions, 1),
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


def training_working_bytes(shape: ModelShape, recipe: Recipe, pairs: int) -> int:
    """Bytes beside weights, gradients and optimiser, at their peak, for a micro-batch of such pairs.

    A weight's gradient is freed when it is whole, as DeepSpeed does that moves it to where it gathers gradients.
    """
    import torch

    from congrad_ray.modeling.logprobs import summed_logprobs
    from congrad_ray.modeling.rehearsal import extrapolated, forget_gradient, peak_bytes
    from congrad_ray.modeling.shape import meta_model

    rows, length = 2 * pairs, recipe.model.max_length

    def peak(config: PretrainedConfig) -> int:
        model = meta_model(config, recipe.model.dtype).train()
        if recipe.train.gradient_checkpointing:
            with warnings.catch_warnings():  # of a new name for this, which training itself reports
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(forget_gradient)
        ids = torch.zeros((rows, length), dtype=torch.int64, device="meta")

        def step() -> None:
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            of_row = torch.zeros(rows * (length - 1), dtype=torch.int64, device="meta")
            logps = summed_logprobs(model, states[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), of_row, rows)
            logps.sum().backward()

        return peak_bytes(model, step)

    return extrapolated(shape, peak)


def policy_bytes(shape: ModelShape, recipe: Recipe) -> int:
    """Bytes of a checkpoint's safetensors: every parameter in the model's dtype, tied ones once."""
    return shape.parameters * BYTES[recipe.model.dtype]


def _checkpoints(planned: Planned, volume: Volume) -> float:
    """The two training checkpoints that are kept while training runs: weights, master copy, moments."""
    recipe, shape = planned.recipe, planned.shapes.policy
    steps = recipe.train.max_steps or volume.rows / recipe.train.batch_size
    return 0.0 if steps <= recipe.train.save_steps else 2.0 * shape.parameters * (BYTES[recipe.model.dtype] + 12)


def _changes(recipe: Recipe, profile: Profile) -> Iterator[Change]:
    texts: list[str] = []

    def changed(text: str) -> Change:
        texts.append(text)
        return Change(recipe, profile, " and ".join(texts))

    if not recipe.train.gradient_checkpointing:
        recipe = with_changed(recipe, "train", gradient_checkpointing=True)
        yield changed("--set train.gradient_checkpointing=true")
    if recipe.train.micro_batch_size > 1:
        recipe = with_changed(recipe, "train", micro_batch_size=1)
        yield changed("--set train.micro_batch_size=1")
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
            train_flops(volume, planned.shapes.policy, planned.recipe, planned.lengths, planned.assumptions),
            0.0,
        ),
        mfu=lambda assumptions: (assumptions.backward_mfu, 1.0),
        start_s=lambda assumptions: assumptions.replica_start_s,
        changes=_changes,
        min_replicas=lambda profile: profile.trainers.num_workers,
    ),
)
