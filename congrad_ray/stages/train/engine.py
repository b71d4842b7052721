"""The DeepSpeed side of training: its configuration, its engine, and the weights it ends with."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from congrad_ray.config.recipe import Train
from congrad_ray.modeling.batching import PairBatch
from congrad_ray.modeling.logprobs import completion_logprobs
from congrad_ray.modeling.source import ModelSource
from congrad_ray.stages.train.schedule import Schedule

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedModel


class CompletionLogprobs(nn.Module):
    """A causal language model whose forward gives the completions' log-probabilities.

    DeepSpeed's ZeRO 3 gathers weights in hooks around the module it was given, so the whole computation has to
    happen inside that module's forward.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        """(2B, T) each -> (2B,) float32 summed log-probabilities, chosen rows first."""
        return completion_logprobs(self.model, PairBatch(input_ids, attention_mask, completion_mask))


def deepspeed_config(train: Train, schedule: Schedule, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration. The optimiser and the learning rate are ours; DeepSpeed shards and clips.

    DeepSpeed wants its three sizes to multiply out, so that of the batch may exceed train.batch_size. It only
    divides by the numbers of passes and workers, which the weights of the losses make up for.
    """
    return {
        "train_batch_size": schedule.accumulation * train.micro_batch_size * schedule.workers,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": schedule.accumulation,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        # Small buckets cost nothing on models of this size and keep tiny ones from reserving gigabytes.
        "zero_optimization": {
            "stage": train.zero_stage,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "overlap_comm": False,
            "contiguous_gradients": True,
        },
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def start_engine(
    train: Train, schedule: Schedule, source: ModelSource, device: torch.device
) -> tuple[DeepSpeedEngine, PreTrainedModel]:
    """The policy as a DeepSpeed engine on this worker; the process group must exist. Raises ModelError."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory collective with g++ (half a minute) that only its inference
        # uses. This table, which it fills by probing compilers, is how it asks whether it may.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    # Known to DeepSpeed before the model is read: ZeRO 3 asks for the number of workers while reading.
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())
    config = deepspeed_config(train, schedule, source.settings.dtype)
    zero3_context = _partition_while_loading(config) if train.zero_stage == 3 else None
    model = source.load_model(str(device))
    del zero3_context
    disable_dropout(model)
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay, fused=device.type == "cuda"
    )
    engine, *_ = deepspeed.initialize(model=CompletionLogprobs(model), optimizer=optimizer, config=config)
    engine.train()
    return engine, model


def _partition_while_loading(config: dict[str, Any]) -> object:
    """While the returned object lives, from_pretrained spreads the weights over the workers as it reads them."""
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout of the model to 0, as TRL does: the policy starts as exactly the reference."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def set_learning_rate(engine: DeepSpeedEngine, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def unsharded_gradient_norm(engine: DeepSpeedEngine) -> float | None:
    """Before a step: Euclidean norm of the reduced gradient where DeepSpeed keeps none (ZeRO 0, float32)."""
    if engine.zero_optimization() or engine.bfloat16_enabled():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def gradient_norm(engine: DeepSpeedEngine) -> float:
    """After a step: Euclidean norm of its gradient before clipping (not for ZeRO 0 in float32)."""
    return float(engine.get_global_grad_norm())


def consolidated_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """The model's whole state dict on the CPU of the first worker, empty on the others; all must call it.

    ZeRO 3's shards are gathered one parameter at a time. Tied parameters stay one tensor.
    """
    from deepspeed.runtime.zero import GatheredParameters

    sharded = engine.zero_optimization_partition_weights()
    weights: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, value in engine.module.model.state_dict(keep_vars=True).items():
        with GatheredParameters([value], enabled=sharded and isinstance(value, nn.Parameter)):
            if engine.global_rank == 0:
                weights[name] = copies.setdefault(id(value), value.detach().cpu().clone())
    return weights
