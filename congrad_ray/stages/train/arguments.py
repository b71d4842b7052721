"""What the recipe's train section is in the words of transformers' Trainer and of DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from congrad_ray.config.recipe import Recipe
from congrad_ray.config.training import Train

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Elements of the buffers in which gradients wait to be reduced and weights to be gathered. Small ones cost nothing
# on models that fit a node and keep tiny ones from reserving gigabytes.
REDUCE_BUCKET = 50_000_000


def deepspeed_config(train: Train, dtype: str, workers: int, universal: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration, with the recipe's `train.deepspeed` over ours.

    DeepSpeed is told that a step is one pass: it would divide a loss by the number of passes, which differs from
    step to step here. With `universal` the checkpoint to resume from is one in DeepSpeed's universal format.
    """
    config: dict[str, Any] = {
        "train_batch_size": workers,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        # Passes of one step are added up in float32 whatever the weights are: many small ones vanish in bfloat16.
        # Without ZeRO, DeepSpeed can only do so in the weights' type.
        "data_types": {"grad_accum_dtype": "fp32" if train.zero_stage or dtype == "float32" else "bf16"},
        "zero_optimization": {
            "stage": train.zero_stage,
            "reduce_bucket_size": REDUCE_BUCKET,
            "allgather_bucket_size": REDUCE_BUCKET,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        # An optimiser with its state on the CPU may still be torch's.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if universal:
        config["checkpoint"] = {"load_universal": True}
    return _merged(config, train.deepspeed)


def _merged(config: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in over.items():
        inner = config.get(name)
        config[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return config


def training_arguments(
    recipe: Recipe, output: str, workers: int, steps: int, device: str, universal: bool = False
) -> TrainingArguments:
    """The Trainer's arguments; checkpoints go to the folder `output` of each worker.

    Where ZeRO's stage is 3 it must live while a model is loaded: transformers then spreads the weights over the
    workers as it reads them.
    """
    from transformers import TrainingArguments

    train, bfloat16 = recipe.train, recipe.model.dtype == "bfloat16"
    return TrainingArguments(
        output_dir=output,
        # One item of the data is a whole step: `trainer.PairTrainer` goes through its passes.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=steps,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optim,
        bf16=bfloat16,
        use_cpu=device == "cpu",
        seed=train.seed,
        # Each worker continues at the step after its checkpoint without drawing what was before.
        ignore_data_skip=True,
        deepspeed=deepspeed_config(train, recipe.model.dtype, workers, universal),
        activation_checkpointing=train.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
        use_liger_kernel=train.use_liger_kernel,
        save_strategy="steps",
        save_steps=train.save_steps,
        logging_strategy="steps",
        logging_steps=train.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if train.eval_share else "no",
        eval_steps=train.eval_steps,
        metric_for_best_model="eval_loss" if train.eval_share else None,
        greater_is_better=False,
        # metrics.jsonl and TensorBoard are `metrics.MetricsWriter`'s, which goes on after a restart.
        report_to=[name for name in train.report_to if name != "tensorboard"],
        run_name=recipe.name,
        disable_tqdm=True,
        log_level="warning",
        remove_unused_columns=False,
    )
