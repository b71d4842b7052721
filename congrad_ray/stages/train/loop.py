"""What each training worker runs: the Trainer from start, or from the last checkpoint, to the policy."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from congrad_ray.config.recipe import Recipe
from congrad_ray.modeling.source import ModelSource
from congrad_ray.rundir.directory import Folder
from congrad_ray.runtime.notices import Notify
from congrad_ray.stages.train.arguments import training_arguments
from congrad_ray.stages.train.checkpoints import is_universal, readable_checkpoint, separate_step_counts
from congrad_ray.stages.train.metrics import FAILURE, MetricsWriter
from congrad_ray.stages.train.pairs import SelectedPairs
from congrad_ray.stages.train.policy import keep_best, load_policy, save_policy
from congrad_ray.stages.train.schedule import make_schedule
from congrad_ray.stages.train.split import trained_and_held_out
from congrad_ray.stages.train.trainer import PairTrainer, Parts, TrainingStopped, Watcher

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# The most by which the rewards' margins may differ from the reference's before the first step, on average.
_REFERENCE_TOLERANCE = {"float32": 0.01, "bfloat16": 0.25}


@dataclass(frozen=True)
class TrainingJob:
    """All that a training worker needs to know; travels to it by Ray."""

    recipe: Recipe
    policy: ModelSource
    selection: Folder  # holds selected.parquet
    output: Folder
    threads: int
    notify: Notify = field(default_factory=Notify)


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`; `config["job"]` is a `TrainingJob`.

    Goes on from the run's last checkpoint if there is one. DeepSpeed reads its checkpoints with torch's pickle
    loader: they are files that this run itself wrote in its own directory, and they are deleted at the end.
    """
    import ray.train
    import ray.train.torch

    job: TrainingJob = config["job"]
    context = ray.train.get_context()
    checkpoint = ray.train.get_checkpoint()
    # Not a folder that a failure would remove: checkpoints in it may be on their way to the run's storage.
    scratch = tempfile.mkdtemp(prefix="congrad-training-")
    with contextlib.ExitStack() as stack:
        resumed = None
        if checkpoint:
            folder = stack.enter_context(checkpoint.as_directory())
            resumed = readable_checkpoint(Path(folder), context.get_world_size())
        trainer = start(job, scratch, ray.train.torch.get_device(), context.get_world_size(), resumed)
        trainer.add_callback(_Report())
        stack.enter_context(logged(job, trainer, resumed))
        try:
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        except TrainingStopped as error:
            # Every worker is here: returning ends training without retries, which would meet the same numbers.
            if trainer.is_world_process_zero():
                job.output.write_json(FAILURE, {"message": str(error)})
            return
        save_policy(trainer, job.policy, job.recipe.train, job.output)
    ray.train.get_all_reported_checkpoints()  # waits for the last one
    shutil.rmtree(scratch, ignore_errors=True)


def train_alone(job: TrainingJob) -> PreTrainedModel | PeftModel:
    """The same training on the CPU of this process alone, without Ray and checkpoints; gives the trained model.

    With an adapter it is on the model that is given. Raises TrainingStopped.
    """
    with alone(), tempfile.TemporaryDirectory() as scratch:
        trainer = start(job, scratch, torch.device("cpu"), 1, None)
        trainer.args.save_strategy = "no"
        trainer.train()
        trained: Any = trainer.model
        del trained.forward  # the model's own
        return trained


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within, this process is the only worker of its training.

    Afterwards the environment and Accelerate are as before: the next trainer of this process would get DeepSpeed.
    The process group stays, since DeepSpeed does not forget it.
    """
    from accelerate.state import AcceleratorState

    before = os.environ.copy()
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(before)


def start(job: TrainingJob, scratch: str, device: torch.device, workers: int, resumed: Path | None) -> PairTrainer:
    """This worker's trainer, its model loaded; the process group must exist. Raises ModelError."""
    recipe, train = job.recipe, job.recipe.train
    job.notify.forward_warnings()
    job.notify(f"loading {job.policy.name} on each worker")
    torch.set_num_threads(job.threads)
    _set_up_deepspeed(device)
    tokenizer = job.policy.load_tokenizer()
    table = job.selection.read_table(name="selected.parquet").sort_by("pair_id")
    pairs = SelectedPairs(table, tokenizer, recipe.model.max_length, device, train.margin_weighting)
    parts = parts_of(recipe, pairs)
    universal = resumed is not None and is_universal(resumed)
    # They live as long as the trainer: under ZeRO 3 loading looks at them.
    arguments = training_arguments(recipe, scratch, workers, parts.schedule.total_steps, device.type, universal)
    arguments.eval_on_start = bool(parts.held_out) and resumed is None
    model = load_policy(job.policy, train, device)
    attention = model.config._attn_implementation
    if recipe.model.attn_implementation is None and attention != "sdpa":
        job.notify(f"attention is {attention}: this model's code has no other")
    callbacks: list[TrainerCallback] = []
    if universal:
        callbacks.append(_Loaded())
    if train.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(train.early_stopping_patience))
    # An adapter that is trained on has its dropout in the first pass too.
    dropout = train.lora is not None and train.lora.lora_dropout > 0 and job.policy.base is not None

    def improved(trainer: PairTrainer) -> None:
        if train.load_best_model_at_end:
            keep_best(trainer, job.policy, train, job.output)

    return PairTrainer(
        model,
        arguments,
        parts,
        train,
        math.inf if dropout else _REFERENCE_TOLERANCE[recipe.model.dtype],
        Watcher(job.notify.computed, improved, job.notify),
        eval_dataset=parts.held_out or None,
        callbacks=callbacks,
    )


def parts_of(recipe: Recipe, pairs: SelectedPairs) -> Parts:
    """What is trained on and what is held out. Raises TrainingError where there is nothing to train on."""
    trained, out = trained_and_held_out(pairs.table, recipe.train)
    schedule = make_schedule(recipe.train, len(trained))
    return Parts(pairs, schedule, trained, out, recipe.train.batch_tokens(pairs.device.type))


def _set_up_deepspeed(device: torch.device) -> None:
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory collective with g++ (half a minute) that only its inference
        # uses. This table, which it fills by probing compilers, is how it asks whether it may.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    # Known to DeepSpeed before the model is read: ZeRO 3 asks for the number of workers while reading.
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())


@contextlib.contextmanager
def logged(job: TrainingJob, trainer: PairTrainer, resumed: Path | None) -> Iterator[None]:
    """Writes what the first worker logs while the body runs."""
    if not trainer.is_world_process_zero():
        yield
        return
    step = 0 if resumed is None else _step_of(resumed)
    with contextlib.closing(
        MetricsWriter(job.output, step, "tensorboard" in job.recipe.train.report_to)
    ) as writer:
        trainer.add_callback(_Log(writer))
        yield


def _step_of(checkpoint: Path) -> int:
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_callback import TrainerState

    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step


class _Loaded(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        separate_step_counts(optimizer.optimizer)


class _Log(TrainerCallback):
    def __init__(self, writer: MetricsWriter) -> None:
        self._writer = writer

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and ("loss" in logs or "eval_loss" in logs):  # not the Trainer's summary at the end
            self._writer.add({"step": state.global_step, **logs})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._writer.flush()


class _Report(TrainerCallback):
    """Reports checkpoints to Ray Train, as Ray's own callback for the Trainer does, but without waiting.

    Each worker has written its shards to a folder of its own; Ray Train puts them together in the run's storage
    while training goes on, and deletes the folder.
    """

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        import ray.train
        from ray.train import CheckpointUploadMode

        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        ray.train.report(
            {"step": state.global_step},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
