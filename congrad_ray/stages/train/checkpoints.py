"""DeepSpeed's checkpoints, which belong to a number of workers, for another number of workers."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")
_UNIVERSAL = "latest_universal"
_WAIT_SECONDS = 3600


def workers_of(checkpoint: Path) -> int | None:
    """How many workers wrote shards of a DeepSpeed checkpoint; None where each has the whole (ZeRO 0)."""
    shards = {found[1] for path in checkpoint.glob("global_step*/*.pt") if (found := _SHARD.search(path.name))}
    return len(shards) or None


def is_universal(checkpoint: Path) -> bool:
    """Whether the checkpoint has been made universal, to its end."""
    return (checkpoint / _UNIVERSAL).exists()


def readable_checkpoint(checkpoint: Path, workers: int) -> Path:
    """The checkpoint as so many workers can read it: made universal, once, where another number wrote it.

    All workers call this: with the same folder on one node or a shared file system, else with their node's copy.
    """
    if workers_of(checkpoint) not in (None, workers):
        with FileLock(checkpoint / "universal.lock", timeout=_WAIT_SECONDS):
            if not is_universal(checkpoint):
                _make_universal(checkpoint)
    return checkpoint


def separate_step_counts(optimizer: Any) -> None:
    """After loading a universal checkpoint: gives every state of DeepSpeed's `optimizer` a step count of its own.

    DeepSpeed 0.19.8 enters one and the same tensor under ZeRO 3, so that Adam's count would rise with every group
    of parameters and not with every step.
    """
    for state in optimizer.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _make_universal(checkpoint: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    step = (checkpoint / "latest").read_text().strip()
    ds_to_universal.main(
        Namespace(
            input_folder=str(checkpoint / step),
            output_folder=str(checkpoint / f"{step}_universal"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
