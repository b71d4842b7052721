"""The model that training starts from, and what it ends with."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs
import torch
from torch import Tensor, nn

from congrad_ray.config.training import Train
from congrad_ray.modeling.adapters import merged_policy, model_to_train, save_adapter
from congrad_ray.modeling.source import ModelSource
from congrad_ray.rundir.directory import Folder
from congrad_ray.stages.train.trainer import PairTrainer, prepare

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedModel

# Where the best weights so far lie until training ends.
_BEST = "best"


def load_policy(source: ModelSource, train: Train, device: torch.device) -> PreTrainedModel:
    """The model to train, with an adapter where the recipe has one, for a trainer. Raises ModelError."""
    model: Any = model_to_train(source, train, str(device))
    _disable_dropout(model)
    prepare(model)
    return model


def _disable_dropout(model: nn.Module) -> None:
    """Sets every dropout of the model to 0, as TRL does: the policy starts as exactly the reference.

    That of new adapters stays: they add nothing yet.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and ".lora_dropout." not in name:
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def keep_best(trainer: PairTrainer, source: ModelSource, train: Train, output: Folder) -> None:
    """Writes the weights as they are now, the best so far, beside the policy to come; all workers call it."""
    with _scratch(output) as folder:
        if _write_trained(trainer, source, train, folder):
            best = output / _BEST
            best.delete()
            _move(folder, best)


def save_policy(trainer: PairTrainer, source: ModelSource, train: Train, output: Folder) -> None:
    """Writes the policy as a Hugging Face checkpoint: safetensors, config, tokenizer, chat template.

    It is the best one where `keep_best` has kept one, else the trainer's. With `train.lora` it is an adapter, or
    the model that it makes (`merge`). All workers must call it.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    best = output / _BEST
    with _scratch(output) as trained, _scratch(output) as merged:
        if trainer.state.best_metric is not None and train.load_best_model_at_end:
            first = trainer.is_world_process_zero()
            if first:
                _copy(best, trained)
        else:
            first = _write_trained(trainer, source, train, trained)
        if not first:
            return
        policy = trained
        if train.lora and train.lora.merge:
            unset_hf_deepspeed_config()  # under ZeRO 3 all workers would have to load the model
            merged_policy(source, trained).save_pretrained(merged)
            policy = merged
        source.load_tokenizer().save_pretrained(policy)
        _move(policy, output)
    best.delete()


def _write_trained(trainer: PairTrainer, source: ModelSource, train: Train, folder: Path) -> bool:
    """Writes what is trained, model or adapter, on the first worker alone, which gets True."""
    model: Any = trainer.model
    weights = _consolidated(trainer.model_wrapped, trained_only=train.lora is not None)
    if not trainer.is_world_process_zero():
        return False
    if train.lora:
        save_adapter(model, folder, source.whole.name, weights)
    else:
        model.save_pretrained(folder, state_dict=weights)
    return True


def _consolidated(engine: DeepSpeedEngine, trained_only: bool) -> dict[str, Tensor]:
    """The state dict on the CPU of the first worker, empty on the others; all must call it.

    ZeRO 3's shards are gathered one parameter at a time. Tied parameters stay one tensor.
    """
    from deepspeed.runtime.zero import GatheredParameters

    sharded = engine.zero_optimization_partition_weights()
    weights: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, value in engine.module.state_dict(keep_vars=True).items():
        if trained_only and not value.requires_grad:
            continue
        with GatheredParameters([value], enabled=sharded and isinstance(value, nn.Parameter)):
            if engine.global_rank == 0:
                weights[name] = copies.setdefault(id(value), value.detach().cpu().clone())
    return weights


@contextmanager
def _scratch(output: Folder) -> Iterator[Path]:
    """A folder of this node, on the disk of `output` where that is one: a policy may be larger than /tmp."""
    beside = output.path if output.is_local else None
    if beside:
        Path(beside).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".policy-") as folder:
        yield Path(folder)


def _move(folder: Path, target: Folder) -> None:
    target.filesystem.create_dir(target.path, recursive=True)
    if target.is_local:
        for file in folder.iterdir():
            shutil.move(file, Path(target.path) / file.name)
        return
    local = pafs.LocalFileSystem()
    pafs.copy_files(str(folder), target.path, source_filesystem=local, destination_filesystem=target.filesystem)


def _copy(source: Folder, folder: Path) -> None:
    local = pafs.LocalFileSystem()
    pafs.copy_files(source.path, str(folder), source_filesystem=source.filesystem, destination_filesystem=local)
