"""What each training worker runs: DPO steps, checkpoints to resume from, and the checkpoint to keep."""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.fs as pafs
import torch
from torch import Tensor

from congrad_ray.config.recipe import Train
from congrad_ray.modeling.batching import PairBatch, collate_pairs
from congrad_ray.modeling.loss import ChosenRejected, LossSettings, dpo_loss
from congrad_ray.modeling.source import ModelSource
from congrad_ray.modeling.tokenization import Messages, tokenize_pair
from congrad_ray.rundir.directory import Folder
from congrad_ray.runtime.notices import Notify
from congrad_ray.stages.train.engine import (
    consolidated_weights,
    gradient_norm,
    set_learning_rate,
    start_engine,
    unsharded_gradient_norm,
)
from congrad_ray.stages.train.metrics import FAILURE, REFERENCE_GAP, MetricsWriter, Row
from congrad_ray.stages.train.schedule import Schedule, learning_rate, micro_batches

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CHECKPOINT_TAG = "state"
_MEANS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


@dataclass(frozen=True)
class TrainingJob:
    """All that a training worker needs to know; travels to it by Ray."""

    train: Train
    schedule: Schedule
    policy: ModelSource
    selection: Folder  # holds selected.parquet
    output: Folder
    threads: int
    notify: Notify = field(default_factory=Notify)


class NotFinite(ArithmeticError):
    """A loss or gradient is not a number; known to all workers at once."""


@dataclass
class _Worker:
    """What the steps of one worker share."""

    job: TrainingJob
    engine: DeepSpeedEngine
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pairs: pa.Table
    lengths: list[int]
    device: torch.device
    rank: int


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`; `config["job"]` is a `TrainingJob`.

    Goes on from the run's last checkpoint if there is one. DeepSpeed reads its checkpoints with torch's pickle
    loader: they are files that this run itself wrote in its own directory, and they are deleted at the end.
    """
    import ray.train
    import ray.train.torch

    job: TrainingJob = config["job"]
    worker = _start(job, ray.train.torch.get_device(), ray.train.get_context().get_world_rank())
    engine = worker.engine
    start = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            _, state = engine.load_checkpoint(folder, tag=_CHECKPOINT_TAG)
        start = state["step"]
    writer = MetricsWriter(job.output, start) if worker.rank == 0 else None
    try:
        _steps(worker, start, writer)
    except NotFinite as error:
        # Every worker is here: returning ends training without Ray's retries, which would meet the same numbers.
        if worker.rank == 0:
            job.output.write_json(FAILURE, {"message": str(error)})
        return
    finally:
        if writer:
            writer.close()
    _save_policy(worker)


def train_alone(job: TrainingJob) -> PreTrainedModel:
    """The same steps on the CPU of this process alone, without Ray Train and checkpoints; gives the trained model.

    Raises NotFinite.
    """
    unsaved = job.train.model_copy(update={"save_steps": job.schedule.total_steps})
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed's launchers set it
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    worker = _start(replace(job, train=unsaved), torch.device("cpu"), 0)
    _steps(worker, 0, None)
    return worker.model


def _start(job: TrainingJob, device: torch.device, rank: int) -> _Worker:
    job.notify.forward_warnings()
    job.notify(f"loading {job.policy.name} on each worker")
    torch.set_num_threads(job.threads)
    os.environ["DS_ACCELERATOR"] = device.type
    engine, model = start_engine(job.train, job.schedule, job.policy, device)
    pairs = job.selection.read_table(name="selected.parquet").sort_by("pair_id")
    return _Worker(
        job=job,
        engine=engine,
        model=model,
        tokenizer=job.policy.load_tokenizer(),
        pairs=pairs,
        lengths=_text_lengths(pairs),
        device=device,
        rank=rank,
    )


def _steps(worker: _Worker, start: int, writer: MetricsWriter | None) -> None:
    job, schedule = worker.job, worker.job.schedule
    for step in range(start, schedule.total_steps):
        before = time.monotonic()
        rate = learning_rate(job.train, step, schedule.total_steps)
        set_learning_rate(worker.engine, rate)
        means, tokens = _optimiser_step(worker, step)
        last = step + 1 == schedule.total_steps
        if writer and ((step + 1) % job.train.logging_steps == 0 or step == 0 or last):
            seconds = time.monotonic() - before
            writer.add(
                {
                    "step": step + 1,
                    "epoch": schedule.epoch_after(step),
                    "learning_rate": rate,
                    **means,
                    "tokens_per_second": tokens / seconds,
                }
            )
        if (step + 1) % job.train.save_steps == 0 and not last:
            if writer:
                writer.flush()
            _report_checkpoint(worker.engine, step + 1, means)


def _optimiser_step(worker: _Worker, step: int) -> tuple[Row, float]:
    """One step over the whole batch: the means over its pairs, and the number of tokens. Raises NotFinite."""
    schedule, engine = worker.job.schedule, worker.engine
    batch = schedule.batch(step)
    passes = micro_batches(batch, worker.lengths, schedule.accumulation, schedule.workers)
    sums = torch.zeros(len(_MEANS) + 2, dtype=torch.float64, device=worker.device)
    not_finite: list[str] = []
    norm: float | None = None
    for number, shares in enumerate(passes):
        share = shares[worker.rank]
        # Each pass is a collective: a worker without a pair runs one along with weight 0.
        indexes = share or batch[:1]
        rows = worker.pairs.take(indexes).to_pylist()
        pairs = _collate(worker, rows)
        losses, pass_sums = _losses(worker, pairs, rows)
        # DeepSpeed averages over passes and workers; we want the mean over the pairs of the batch.
        weight = schedule.accumulation * schedule.workers / len(batch) if share else 0.0
        engine.backward(losses.sum() * weight)
        worker.job.notify.computed(len(share))
        if share:
            sums += pass_sums
            finite = torch.isfinite(losses).tolist()
            not_finite += [row["pair_id"] for row, good in zip(rows, finite, strict=True) if not good]
        if number + 1 == len(passes):
            # Before the weights change: a loss that is not a number must not reach them.
            sums = _sum_over_workers(sums)
            _check_losses(sums, not_finite, step)
            norm = unsharded_gradient_norm(engine)
        engine.step()
    norm = gradient_norm(engine) if norm is None else norm
    if not math.isfinite(norm):
        ids = ", ".join(worker.pairs.take(batch)["pair_id"].to_pylist()[:20])
        raise NotFinite(
            f"the gradient of step {step + 1} is {norm} although its losses are finite; pairs of the step: {ids}. "
            "Lower train.learning_rate or train.max_grad_norm, or use model.dtype: float32."
        )
    *totals, gap, tokens = sums.tolist()
    means = {name: total / len(batch) for name, total in zip(_MEANS, totals, strict=True)}
    if step == 0:
        means[REFERENCE_GAP] = gap / len(batch)
    return {**means, "grad_norm": norm}, tokens


def _collate(worker: _Worker, rows: list[dict[str, Any]]) -> PairBatch:
    pairs = []
    for row in rows:
        try:
            pairs.append(
                tokenize_pair(
                    worker.tokenizer,
                    row["prompt"],
                    row["chosen"],
                    row["rejected"],
                    worker.job.policy.settings.max_length,
                )
            )
        except ValueError as error:
            raise ValueError(f"pair {row['pair_id']}: {error}") from error
    pad = worker.tokenizer.pad_token_id
    assert isinstance(pad, int)  # modeling.tokenization.load_tokenizer ensures it
    return collate_pairs(pairs, pad, worker.device)


def _losses(worker: _Worker, pairs: PairBatch, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """The losses (B,), and sums over the pairs: of _MEANS, of the gap to the table's reference, of tokens."""

    def column(name: str) -> Tensor:
        return torch.tensor([row[name] for row in rows], dtype=torch.float32, device=worker.device)

    logps = worker.engine(pairs.input_ids, pairs.attention_mask, pairs.completion_mask)
    reference = torch.cat([column("ref_chosen_logps"), column("ref_rejected_logps")])
    losses, metrics = dpo_loss(
        ChosenRejected(*logps.chunk(2)),
        ChosenRejected(*reference.chunk(2)),
        LossSettings(worker.job.train.beta, worker.job.train.length_penalty),
        ChosenRejected(pairs.chosen_tokens, pairs.rejected_tokens),
    )
    gap = (logps.detach() - reference).abs() / pairs.completion_mask.sum(dim=1)
    means = [losses.detach().mean(), *(metrics[name] for name in _MEANS[1:])]
    sums = [mean.double() * pairs.pairs for mean in means]
    return losses, torch.stack([*sums, gap.double().sum() / 2, pairs.attention_mask.sum().double()])


def _sum_over_workers(values: Tensor) -> Tensor:
    torch.distributed.all_reduce(values)
    return values


def _check_losses(sums: Tensor, not_finite: list[str], step: int) -> None:
    if math.isfinite(float(sums[0])):
        return
    everyone: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyone, not_finite)
    ids = sorted(identifier for found in everyone for identifier in found)
    raise NotFinite(
        f"the loss of step {step + 1} is not finite; pairs: {', '.join(ids[:20])}. The last checkpoint is kept. "
        "Look at these pairs and at grad_norm in metrics.jsonl; lower train.learning_rate if it had been growing."
    )


def _report_checkpoint(engine: DeepSpeedEngine, step: int, means: Row) -> None:
    """Each worker writes its shards; Ray Train puts them together in the run's storage."""
    import ray.train

    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag=_CHECKPOINT_TAG, client_state={"step": step})
        ray.train.report({**means, "step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _save_policy(worker: _Worker) -> None:
    """Writes the policy as a Hugging Face checkpoint: safetensors, config, tokenizer, chat template."""
    weights = consolidated_weights(worker.engine)
    if worker.rank != 0:
        return
    output = worker.job.output
    with tempfile.TemporaryDirectory() as scratch:
        folder = output.path if output.is_local else scratch
        worker.model.save_pretrained(folder, state_dict=weights)
        worker.tokenizer.save_pretrained(folder)
        if not output.is_local:
            pafs.copy_files(
                folder,
                output.path,
                source_filesystem=pafs.LocalFileSystem(),
                destination_filesystem=output.filesystem,
            )


def _text_lengths(pairs: pa.Table) -> list[int]:
    """Characters of each pair: all that dealing out micro-batches needs, without tokenising the whole table.

    A text is a string or chat messages: `congrad filter` takes both.
    """
    names = ("prompt", "chosen", "rejected")

    def length(text: str | Messages) -> int:
        return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)

    return [
        sum(length(row[name]) for name in names)
        for batch in pairs.select(names).to_batches()
        for row in batch.to_pylist()
    ]
