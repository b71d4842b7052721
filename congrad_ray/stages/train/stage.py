"""train: M_{t+1} by length-penalised DPO on the selected pairs, with Ray Train and DeepSpeed."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.training import Train
from congrad_ray.modeling.source import ModelSource, policy, policy_input
from congrad_ray.planning.volume import rows_of
from congrad_ray.rundir.directory import Folder
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.notices import heard, looking
from congrad_ray.runtime.resources import Demand
from congrad_ray.stages.base import Stage
from congrad_ray.stages.select.schema import TOKENS
from congrad_ray.stages.train.estimate import ESTIMATE
from congrad_ray.stages.train.metrics import FAILURE, REFERENCE_GAP, Row, read_metrics
from congrad_ray.stages.train.schedule import TrainingError, make_schedule, pair_tokens
from congrad_ray.stages.train.split import trained_and_held_out

if TYPE_CHECKING:
    from congrad_ray.stages.train.loop import TrainingJob

logger = logging.getLogger(__name__)

# Where checkpoints live until the policy is written; the name inside says which workers can read them.
_RAY_TRAIN = "ray_train"
_CHECKED_PAIRS = 64

_GAUGES = {
    "congrad_training_step": "step",
    "congrad_training_loss": "loss",
    "congrad_training_accuracy": "rewards/accuracies",
    "congrad_training_margin": "rewards/margins",
    "congrad_training_gradient_norm": "grad_norm",
    "congrad_training_tokens_per_second": "tokens_per_second",
}


def settings(recipe: Recipe, iteration: int) -> dict[str, Any]:
    """What decides the policy; how often a run saves and logs, and in what passes, does not."""
    return {
        "model": recipe.model.model_dump(mode="json"),
        "train": recipe.train.model_dump(
            mode="json", exclude={"save_steps", "logging_steps", "max_tokens_per_batch", "report_to"}
        ),
    }


def run(context: Context) -> Outcome:
    """Trains on `selection/selected.parquet`; raises TrainingError naming what is wrong with it or with a step."""
    from congrad_ray.stages.train.loop import TrainingJob

    started = time.monotonic()
    train, workers = context.recipe.train, context.profile.trainers
    selection = context.input("selection")
    pairs = _check_selection(selection)
    trained, out = trained_and_held_out(_rows(selection, train), train)
    schedule = make_schedule(train, len(trained))
    source = policy(context.recipe, context.run, context.iteration)
    _check_model(context)
    _check_tokens(selection, source, context.recipe.model.max_length)
    job = TrainingJob(
        recipe=context.recipe,
        policy=source,
        selection=selection,
        output=context.output,
        threads=context.profile.threads_of(workers),
        notify=context.notify(),
    )
    held_out = f" and {len(out)} held out" if out else ""
    logger.info(
        f"{len(trained)} pairs{held_out}, {schedule.total_steps} steps of up to {train.batch_size} pairs: "
        f"{workers.num_workers} workers x passes of up to {train.batch_tokens(context.profile.device)} tokens, "
        f"ZeRO {train.zero_stage}"
    )
    busy = schedule.largest_batch
    if busy < workers.num_workers:
        logger.warning(
            f"{workers.num_workers - busy} of {workers.num_workers} workers have nothing to do: {len(trained)} "
            f"pairs with train.batch_size {train.batch_size} make steps of {busy} pairs at most; "
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
            "steps": int(rows[-1]["step"]),
            "final_loss": round(rows[-1]["loss"], 6),
            "final_rewards_accuracies": round(sum(row["rewards/accuracies"] for row in tail) / len(tail), 4),
            "final_rewards_margins": round(sum(row["rewards/margins"] for row in tail) / len(tail), 6),
            "reference_gap": round(rows[0].get(REFERENCE_GAP, 0.0), 8),
            "training_seconds": round(time.monotonic() - started, 1),
        },
    )


def _check_selection(selection: Folder) -> int:
    """The number of selected pairs. Raises TrainingError where one lacks its tokens or a finite reference."""
    columns = ["pair_id", "ref_chosen_logps", "ref_rejected_logps"]
    with selection.open_parquet(f"{selection.path}/selected.parquet") as file:
        table = file.read([*columns, *TOKENS])  # leaves out what is not there
    pair_tokens(table)
    for name in columns[1:]:
        good = pc.fill_null(pc.is_finite(table[name]), False)
        bad = table.filter(pc.invert(good))["pair_id"].to_pylist()
        if bad:
            raise TrainingError(
                f"{name} is not a finite number in {len(bad)} of {len(table)} pairs of {selection.path}"
                f"/selected.parquet, first {bad[0]}: run the sketch stage again with --redo"
            )
    return len(table)


def _rows(selection: Folder, train: Train) -> pa.Table:
    """What deciding on held-out pairs takes, in the workers' order."""
    columns = ["pair_id", "language", *(["prompt"] if train.eval_share else [])]
    return selection.read_table(columns, "selected.parquet").sort_by("pair_id")


def _check_model(context: Context) -> None:
    """Raises TrainingError where the run's sketches, and so the reference, are of a model with other settings."""
    manifest = context.run.stage("sketches", context.iteration).manifest()
    # The sketch stage puts the model's first among what its result is known by.
    then = manifest.settings[0] if manifest and isinstance(manifest.settings, list) else None
    now = context.recipe.model.model_dump(mode="json")
    if not isinstance(then, dict) or then == now:
        return
    changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    names = ", ".join(f"model.{name}" for name in changed)
    raise TrainingError(
        f"the reference log-probabilities of {context.input('selection').path}/selected.parquet were made with "
        f"another {names}: restore it, or run the sketch and select stages again with --redo"
    )


def _check_tokens(selection: Folder, source: ModelSource, max_length: int) -> None:
    """Raises TrainingError where some pairs' numbers of tokens are not those of their sketches; ModelError too."""
    from congrad_ray.stages.train.pairs import other_tokens, tokenized

    tokenizer = source.load_tokenizer()
    with selection.open_parquet(f"{selection.path}/selected.parquet") as file:
        batch = next(file.iter_batches(_CHECKED_PAIRS), None)
    for row in batch.to_pylist() if batch else ():
        difference = other_tokens(row, tokenized(row, tokenizer, max_length))
        if difference:
            raise TrainingError(
                f"the reference log-probabilities of {selection.path}/selected.parquet were made with another "
                f"tokenizer or chat template: of pair {row['pair_id']} {difference}. Run the sketch and select "
                "stages again with --redo"
            )


def _fit(context: Context, job: TrainingJob) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    from congrad_ray.stages.train.loop import train_worker

    profile, output = context.profile, context.output
    workers = profile.trainers
    if output.exists(FAILURE):
        output.filesystem.delete_file(f"{output.path}/{FAILURE}")
    storage = output / _RAY_TRAIN
    output.filesystem.create_dir(storage.path, recursive=True)
    resources = {"CPU": workers.cpus, **workers.resources}
    if workers.gpus:
        resources["GPU"] = workers.gpus
    if workers.memory_bytes:
        resources["memory"] = workers.memory_bytes
    # Ray's own types leave out that a range of workers is allowed.
    count: Any = (workers.min_workers, workers.num_workers) if workers.min_workers else workers.num_workers
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=count,
            use_gpu=profile.device == "cuda",
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name="checkpoints",
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
    train, tokens = context.recipe.train, context.recipe.train.batch_tokens(context.profile.device)
    return (
        f"A worker lacked memory for a pass of {tokens} tokens, or one longer pair, with ZeRO {train.zero_stage}: "
        "lower train.max_tokens_per_batch or model.max_length, set train.gradient_checkpointing: "
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
