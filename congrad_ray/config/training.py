"""The section `train` of a recipe, with `train.lora`."""

from __future__ import annotations

import operator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from congrad_ray.config.fields import (
    Positive,
    batch_tokens,
    is_null,
)
from congrad_ray.config.loss import SIMPO_GAMMA, LossType, loss_settings
from congrad_ray.config.settings import Settings


class Lora(Settings):
    """Training by a low-rank adapter on frozen weights; names as in peft's LoraConfig where it has them."""

    r: Positive = Field(16, description="rank of the adapter's matrices")
    lora_alpha: Positive = Field(32, description="what the adapter adds is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="of the adapter's inputs in training")
    target_modules: Annotated[list[str], Field(min_length=1)] | str = Field(
        "all-linear",
        description="ends of the names of the layers with an adapter, [q_proj, v_proj], or a regular expression "
        "for whole names; all-linear: every linear layer but the output embedding",
    )
    use_dora: bool = Field(False, description="DoRA: the lengths of the weights' rows are trained apart")
    quantization: Literal["nf4"] | None = Field(
        None,
        description="QLoRA: the frozen weights in 4 bits while sketching and training; on GPUs, by bitsandbytes",
    )
    merge: bool = Field(
        True,
        description="the policy is written with the adapter merged into the weights; false: as the adapter alone, "
        "which the next iteration trains on",
    )


class Train(Settings):
    """Preference training with DeepSpeed; names as in TRL's DPOConfig and CPOConfig where they have them.

    The losses: docs/explanation/losses.md.
    """

    gone: ClassVar = {
        "micro_batch_size": "leave it out, or give max_tokens_per_batch, which counts tokens instead of pairs",
    }
    loss_type: LossType = Field(
        "sigmoid",
        exclude_if=lambda name: name == "sigmoid",
        description="the preference loss: sigmoid is DPO; docs/explanation/losses.md has them all",
    )
    beta: float = Field(
        0.1,
        gt=0,
        description="of the loss. DPO: how strongly the policy is kept near the reference. Losses over means want "
        "larger ones: sigmoid_norm about 5, simpo 2 to 10",
    )
    length_penalty: float = Field(
        0.0, ge=0, description="alpha of R-DPO (2403.19159), per token; sigmoid, hinge, robust"
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        exclude_if=operator.not_,
        description="robust only: the share of pairs whose chosen is taken for the worse",
    )
    simpo_gamma: float = Field(
        SIMPO_GAMMA,
        ge=0,
        exclude_if=lambda gamma: gamma == SIMPO_GAMMA,
        description="simpo only: the margin aimed at",
    )
    sft_weight: float = Field(
        0.0,
        ge=0,
        exclude_if=operator.not_,
        description="of -log p(chosen) per token, added to the loss (2404.19733); orpo has such a term of its own",
    )
    margin_weighting: bool = Field(
        False,
        exclude_if=operator.not_,
        description="weight a pair's loss by tanh(margin / 2) of the judge's scores; needs judged pairs",
    )
    learning_rate: float = Field(5e-7, gt=0, description="the peak, after warmup")
    num_train_epochs: Positive = Field(1, description="passes over the kept pairs")
    max_steps: Positive | None = Field(None, description="optimiser steps; overrides num_train_epochs")
    batch_size: Positive = Field(32, description="pairs per optimiser step over all workers")
    max_tokens_per_batch: Positive | None = Field(
        None,
        description="max tokens per worker in one forward pass, of prompts (each once) and both responses; null: "
        "8192, on a CPU 4096; a larger pair gets a pass of its own",
    )
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="share of the steps in which the learning rate rises")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="how the learning rate falls after warmup"
    )
    min_lr_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        exclude_if=operator.not_,  # what was trained before there was this setting is still known as done
        description="linear and cosine: share of the learning rate that it falls to at the end",
    )
    weight_decay: float = Field(0.0, ge=0, description="of AdamW, on matrices alone: not on norms and biases")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    optim: str = Field(
        "adamw_torch",
        exclude_if=lambda value: value == "adamw_torch",
        description="optimiser, by its name in transformers' TrainingArguments: adamw_torch_fused, adamw_8bit, "
        "paged_adamw_8bit (the last two need bitsandbytes and a GPU)",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="DeepSpeed's ZeRO stage: what is spread over the workers"
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        exclude_if=operator.not_,
        description="more of DeepSpeed's configuration, over what this recipe makes of it: "
        "{zero_optimization: {offload_optimizer: {device: cpu}}}",
    )
    gradient_checkpointing: bool = Field(False, description="less memory for about a third more time")
    use_liger_kernel: bool = Field(
        False, exclude_if=operator.not_, description="Liger's kernels for GPUs, where liger-kernel is installed"
    )
    eval_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        exclude_if=operator.not_,
        description="share of each language's prompts whose pairs are held out: their loss, margin and accuracy "
        "are logged by language",
    )
    eval_steps: Positive = Field(
        50, exclude_if=lambda value: value == 50, description="optimiser steps between looks at held-out pairs"
    )
    load_best_model_at_end: bool = Field(
        True,
        exclude_if=bool,
        description="with eval_share: the policy is that of the lowest held-out loss, not the last",
    )
    early_stopping_patience: Positive | None = Field(
        None,
        exclude_if=operator.not_,
        description="with eval_share: training ends after this many looks without a lower held-out loss",
    )
    save_steps: Positive = Field(50, description="optimiser steps between checkpoints")
    logging_steps: Positive = Field(1, description="optimiser steps between rows of metrics.jsonl")
    report_to: list[str] = Field(
        ["tensorboard"],
        description="trackers beside metrics.jsonl: tensorboard, wandb, mlflow, trackio and others of "
        "transformers; their packages and keys must be on the workers",
    )
    seed: int = Field(0, ge=0, description="of the order of pairs, and of a new adapter's numbers")
    lora: Lora | None = Field(
        None, exclude_if=is_null, description="train an adapter of low rank; null: all weights are trained"
    )

    def batch_tokens(self, device: str) -> int:
        """`max_tokens_per_batch` on a device."""
        return batch_tokens(self.max_tokens_per_batch, device)

    @model_validator(mode="after")
    def _loss(self) -> Self:
        loss_settings(self)  # which refuses what does not go together
        return self

    @model_validator(mode="after")
    def _whole_quantized_weights(self) -> Self:
        if self.lora and self.lora.quantization and self.zero_stage == 3:
            raise ValueError(
                f"lora.quantization {self.lora.quantization} does not go with zero_stage 3, which would cut the "
                "packed weights: set zero_stage to 2 or less"
            )
        return self
