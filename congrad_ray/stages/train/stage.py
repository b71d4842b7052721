"""train: M_{t+1} by length-penalised DPO on the selected pairs, with Ray Train and DeepSpeed."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.modeling.source import policy, policy_input
from congrad_ray.planning.volume import rows_of
from congrad_ray.rundir.directory import Folder
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.notices import heard, looking
from congrad_ray.runtime.resources import Demand
from congrad_ray.stages.base import Stage
from congrad_ray.stages.train.estimate import ESTIMATE
from congrad_ray.stages.train.metrics import FAILURE, REFERENCE_GAP, Row, read_metrics
from congrad_ray.stages.train.schedule import TrainingError, make_schedule

if TYPE_CHECKING:
    from congrad_ray.stages.train.loop import TrainingJob

logger = logging.getLogger(__name__)

# Where checkpoints live until the policy is written; the name inside says which workers can read them.
_RAY_TRAIN = "ray_train"
# nats per token by which the policy's first log-probabilities may differ from the table's
_REFERENCE_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}

_GAUGES = {
    "congrad_training_step": "step",
    "congrad_training_loss": "loss",
    "congrad_training_accuracy": "rewards/accuracies",
    "congrad_training_margin": "rewards/margins",
    "congrad_training_gradient_norm": "grad_norm",
    "congrad_training_tokens_per_second": "tokens_per_second",
}


def settings(recipe: Recipe, iteration: int) -> dict[str, Any]:
    """What decides the policy; how often a run saves and logs does not."""
    return {
        "model": recipe.model.model_dump(mode="json"),
        "train": recipe.train.model_dump(mode="json", exclude={"save_steps", "logging_steps"}),
    }


def run(context: Context) -> Outcome:
    """Trains on `selection/selected.parquet`; raises TrainingError naming what is wrong with it or with a step."""
    from congrad_ray.stages.train.loop import TrainingJob

    started = time.monotonic()
    train, workers = context.recipe.train, context.profile.trainers
    selection = context.input("selection")
    pairs = _check_selection(selection)
    schedule = make_schedule(train, pairs, workers.num_workers)
    source = policy(context.recipe, context.run, context.iteration)
    source.load_tokenizer()  # report what is wrong with it before workers start
    job = TrainingJob(
        train=train,
        schedule=schedule,
        policy=source,
        selection=selection,
        output=context.output,
        threads=context.profile.threads_of(workers),
        notify=context.notify(),
    )
    logger.info(
        f"{pairs} pairs, {schedule.total_steps} steps of up to {train.batch_size} pairs: {workers.num_workers} "
        f"workers x {schedule.accumulation} passes x up to {train.micro_batch_size} pairs, ZeRO {train.zero_stage}"
    )
    busy = schedule.pairs_per_pass
    if busy < workers.num_workers:
        logger.warning(
            f"{workers.num_workers - busy} of {workers.num_workers} workers have nothing to do: {pairs} "
            f"pairs in steps of up to train.batch_size {train.batch_size} make passes of {busy} pairs at most; "
            "lower trainers.num_workers in the profile, or raise train.batch_size"
        )
    with (
        _progress(context, schedule.total_steps),
        heard(job.notify, lambda pairs: context.progressed()),
    ):
        _fit(context, job)
    rows = read_metrics(context.output)
    (context.output / _RAY_TRAIN).delete()
    tail = rows[-max(1, len(rows) // 10) :]
    return Outcome(
        rows=pairs,
        counters={
            "steps": schedule.total_steps,
            "final_loss": round(rows[-1]["loss"], 6),
            "final_rewards_accuracies": round(sum(row["rewards/accuracies"] for row in tail) / len(tail), 4),
            "final_rewards_margins": round(sum(row["rewards/margins"] for row in tail) / len(tail), 6),
            "reference_gap": round(rows[0].get(REFERENCE_GAP, 0.0), 8),
            "training_seconds": round(time.monotonic() - started, 1),
        },
    )


def _check_selection(selection: Folder) -> int:
    """The number of selected pairs. Raises TrainingError where a reference log-probability is no number."""
    columns = ["pair_id", "ref_chosen_logps", "ref_rejected_logps"]
    table = selection.read_table(columns, "selected.parquet")
    for name in columns[1:]:
        good = pc.fill_null(pc.is_finite(table[name]), False)
        bad = table.filter(pc.invert(good))["pair_id"].to_pylist()
        if bad:
            raise TrainingError(
                f"{name} is not a finite number in {len(bad)} of {len(table)} pairs of {selection.path}"
                f"/selected.parquet, first {bad[0]}: run the sketch stage again with --redo"
            )
    return len(table)


def _fit(context: Context, job: TrainingJob) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    from congrad_ray.stages.train.loop import train_worker

    profile, output = context.profile, context.output
    workers = profile.trainers
    if output.exists(FAILURE):
        output.filesystem.delete_file(f"{output.path}/{FAILURE}")
    storage = output / _RAY_TRAIN
    # ZeRO's shards fit only the number of workers that wrote them, so another number starts again from step 0.
    name = f"{workers.num_workers}-workers"
    output.filesystem.create_dir(storage.path, recursive=True)
    resources = {"CPU": workers.cpus, **workers.resources}
    if workers.gpus:
        resources["GPU"] = workers.gpus
    if workers.memory_bytes:
        resources["memory"] = workers.memory_bytes
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=profile.device == "cuda",
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage.path,
            storage_filesystem=storage.filesystem,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit as end:
        # Ray Train's own answer to Ctrl-C: it aborts the run in order and then leaves the process with "success".
        raise KeyboardInterrupt from end
    except TrainingFailedError as error:
        raise TrainingError(
            f"training failed after {workers.max_failures} restarts: {error}\n"
            f"{_out_of_memory(context, str(error))}The same command resumes from the last checkpoint."
        ) from error
    finally:
        # Ray Train leaves its handler behind, which would swallow a Ctrl-C in the stages after this one.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)
    found = output.read_json(FAILURE)
    if found:
        raise TrainingError(found["message"])


def _out_of_memory(context: Context, said: str) -> str:
    """What to do where that was the reason; nothing for other reasons."""
    if "out of memory" not in said.lower() and "can't allocate memory" not in said:
        return ""
    train, length = context.recipe.train, context.recipe.model.max_length
    return (
        f"A worker lacked memory for {train.micro_batch_size} pairs of up to twice {length} tokens with ZeRO "
        f"{train.zero_stage}: lower train.micro_batch_size or model.max_length, set train.gradient_checkpointing: "
        "true or a higher train.zero_stage, or use more or larger workers in the profile. "
    )


@contextmanager
def _progress(context: Context, total_steps: int, every_seconds: float = 5.0) -> Iterator[None]:
    """Logs the newest line of the metrics while the body runs: the workers write it, the driver only looks."""
    rows = read_metrics(context.output)
    seen = rows[-1]["step"] if rows else 0.0

    def look() -> None:
        nonlocal seen
        rows = read_metrics(context.output)
        if not rows or rows[-1]["step"] == seen:
            return
        if seen == 0.0:
            _warn_of_reference_gap(rows, context)
        seen = rows[-1]["step"]
        context.progressed()
        logger.info(_line(rows[-1], total_steps))
        context.meter.set("congrad_training_steps", total_steps)
        for name, column in _GAUGES.items():
            context.meter.set(name, rows[-1][column])

    with looking(look, every_seconds):
        yield


def _line(row: Row, total_steps: int) -> str:
    return (
        f"step {int(row['step'])}/{total_steps}: loss {row['loss']:.4f}, "
        f"accuracy {row['rewards/accuracies']:.2f}, margin {row['rewards/margins']:.4f}, "
        f"gradient norm {row['grad_norm']:.3g}, {row['tokens_per_second']:.0f} tokens/s"
    )


def _warn_of_reference_gap(rows: list[Row], context: Context) -> None:
    gap = rows[0].get(REFERENCE_GAP, 0.0)
    tolerance = _REFERENCE_TOLERANCE[context.recipe.model.dtype]
    if gap > tolerance:
        logger.warning(
            "before the first step the policy's log-probabilities differ from the selection's reference "
            f"by {gap:.4g} nats per token on average (tolerance {tolerance:g}). Was the selection made with "
            "another model, tokenizer or chat template?"
        )


def _demand(recipe: Recipe, profile: Profile) -> Demand:
    kept, workers = round(rows_of(recipe).training * recipe.select.keep), profile.trainers
    cpus, gpus = workers.num_workers * workers.cpus, workers.num_workers * workers.gpus
    return Demand(
        "train",
        kept * recipe.train.num_train_epochs,
        f"DeepSpeed workers: {workers.num_workers}, ZeRO {recipe.train.zero_stage}",
        cpus,
        gpus,
        cpus,
        gpus,
        workers.cpus,
        workers.gpus,
        workers.num_workers,
        "trainers",
    )


STAGE = Stage(
    name="train",
    folder="policy",
    summary="Train by DPO on the kept pairs, with Ray Train and DeepSpeed",
    example="train.beta=0.2",
    inputs=lambda iteration: [("selection", iteration), *policy_input(iteration)],
    settings=settings,
    run=run,
    demand=_demand,
    estimate=ESTIMATE,
)
