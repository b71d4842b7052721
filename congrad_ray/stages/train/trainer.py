"""transformers' Trainer on preference pairs: ours are the pass, the loss and the sums over workers."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainingArguments

from congrad_ray.config.training import Train
from congrad_ray.modeling.loss import ChosenRejected, loss_settings, needs_reference, over_means, preference_loss
from congrad_ray.modeling.packing import PairTokens
from congrad_ray.modeling.shared_prompts import attention_over, completion_sums, hidden_states, why_not_shared
from congrad_ray.stages.sketch.layers import base_causal_model
from congrad_ray.stages.train.metrics import REFERENCE_GAP
from congrad_ray.stages.train.pairs import MicroBatch, SelectedPairs
from congrad_ray.stages.train.schedule import Schedule, learning_rate, pair_tokens, passes_of

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedModel

METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


class TrainingStopped(Exception):
    """Training cannot go on, and would not after a restart either; every worker raises it at the same step."""


@dataclass(frozen=True)
class Parts:
    """Which of the selected pairs are trained on, in which order, and which are held out."""

    pairs: SelectedPairs
    schedule: Schedule
    trained: Sequence[int]  # the schedule counts these
    held_out: Sequence[int]
    max_tokens: int
    """Tokens of a worker's share of a pass."""


@dataclass
class Watcher:
    """What a run wants to know of its trainer; by default nothing."""

    computed: Callable[[int], None] = lambda pairs: None
    """Told of the pairs that this worker is done with."""
    improved: Callable[[PairTrainer], None] = lambda trainer: None
    """Called by all workers when the loss on the held-out pairs is the lowest so far."""
    say: Callable[[str], None] = field(default=lambda text: None)


def prepare(model: nn.Module) -> None:
    """Makes the model's forward take a `PairTokens` and give the completions' log-probabilities, (2B,) float32.

    DeepSpeed's ZeRO 3 gathers weights in hooks around the module that it was given, so all of a pass has to happen
    inside that module's forward; and the Trainer saves the module that it was given, so that stays the model.
    """
    causal = base_causal_model(model)

    def forward(batch: PairTokens, arguments: dict[str, Any], states: bool = False) -> Tensor:
        return (hidden_states if states else completion_sums)(causal, batch, arguments)

    model.forward = forward


class PairTrainer(Trainer):
    """Preference training by transformers' Trainer under DeepSpeed, of a model that `prepare` has changed.

    The Trainer's loop, optimisers, checkpoints, trackers and callbacks are its own. An item of its data is the
    number of a step. A step goes through as many passes as its pairs need under the budget of tokens, with the
    prompt of a pair computed once where the model allows it, and weighs them so that the gradient is that of the
    mean loss over the step's pairs, on any number of workers.

    Raises TrainingStopped from `train` where a loss or gradient is not a number, naming the pairs, and where the
    reference log-probabilities are not those of the model that training starts from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        parts: Parts,
        train: Train,
        reference_tolerance: float = math.inf,
        watcher: Watcher | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(model=model, args=args, **arguments)
        self.remove_callback(PrinterCallback)
        self._parts, self._train = parts, train
        self._loss = loss_settings(train)
        self._causal = base_causal_model(model)
        self._tolerance = reference_tolerance
        self._watcher = watcher or Watcher()
        self._shared: bool | None = None
        self._sizes: list[int] = []
        self._logged: defaultdict[str, list[float]] = defaultdict(list)
        self._tokens, self._since = 0.0, time.monotonic()

    # What the Trainer asks of its data and schedule.

    def get_train_dataloader(self) -> Any:
        return _Steps(self)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            total, peak = num_training_steps, self._train.learning_rate
            of: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(
                of,
                lambda step: learning_rate(self._train, min(step, total - 1), total) / peak,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the Trainer's count needs padded batches of ids

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._logged.items()}
            logs["tokens_per_second"] = self._tokens / (time.monotonic() - self._since)
            self._restart_clock()
        # The Trainer's own count starts anew with the steps that a restart skipped.
        self.state.epoch = self.state.global_step / self._parts.schedule.steps_per_epoch
        super().log(logs, start_time)

    def _restart_clock(self) -> None:
        self._logged.clear()
        self._tokens, self._since = 0.0, time.monotonic()

    # A step.

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """All passes of one optimiser step; the mean loss over its pairs, the same on every worker."""
        model.train()
        step, first = inputs["step"], inputs["step"] == 0
        batch = [self._parts.trained[index] for index in self._parts.schedule.batch(step)]
        passes = self._passes(model, batch)
        # DeepSpeed averages over the workers; we want the mean over the pairs of the step.
        weight = self.args.world_size / len(batch)
        totals = torch.zeros(len(METRICS) + 2, dtype=torch.float64, device=self.args.device)
        not_finite: list[str] = []
        norm: float | None = None
        for number, shares in enumerate(passes):
            share, last = shares[self.args.process_index], number + 1 == len(passes)
            # Each pass is a collective: a worker without a pair runs one along with weight 0.
            pairs = self._parts.pairs.micro_batch(share or batch[:1], self._shared is True)
            with attention_over(self._causal, pairs.tokens) as arguments:
                logps = model(pairs.tokens, arguments)
                losses, found = self._losses(pairs, logps)
                model.set_gradient_accumulation_boundary(is_boundary=last)
                model.backward(losses.sum() * (weight if share else 0.0), scale_wrt_gas=False)
            self._watcher.computed(len(share))
            if share:
                totals += torch.cat([found.sum(1), self._gap_and_tokens(pairs, logps.detach())])
                finite = torch.isfinite(losses).tolist()
                not_finite += [name for name, good in zip(pairs.ids, finite, strict=True) if not good]
            if last:
                # Before the weights change: a loss that is not a number must not reach them.
                _sum_over_workers(totals)
                self._check(totals, not_finite, step, len(batch))
                norm = _unsharded_gradient_norm(model)
                model.step()
        norm = float(model.get_global_grad_norm()) if norm is None else norm
        if not math.isfinite(norm):
            ids = ", ".join(self._parts.pairs.table.take(batch)["pair_id"].to_pylist()[:20])
            raise TrainingStopped(
                f"the gradient of step {step + 1} is {norm} although its losses are finite; pairs of the step: "
                f"{ids}. Lower train.learning_rate or train.max_grad_norm, or use model.dtype: float32."
            )
        if step + 1 == self._parts.schedule.total_steps:
            self.control.should_log = True  # whatever logging_steps is
        *sums, gap, tokens = totals.tolist()
        means = {name: total / len(batch) for name, total in zip(METRICS, sums, strict=True)}
        if first:
            means[REFERENCE_GAP] = gap / len(batch)
        for name, value in {**means, "grad_norm": norm}.items():
            self._logged[name].append(value)
        self._tokens += tokens
        return torch.tensor(means["loss"], device=self.args.device)

    def _passes(self, model: Any, indexes: Sequence[int]) -> list[list[list[int]]]:
        if self._shared is None:
            self._shared = self._can_share(model)
            self._sizes = pair_tokens(self._parts.pairs.table, self._shared)
        return passes_of(indexes, self._sizes, self._parts.max_tokens, self.args.world_size)

    def _can_share(self, model: Any) -> bool:
        was_training = model.training
        model.eval()
        reason = why_not_shared(self._causal, lambda batch, arguments: model(batch, arguments, states=True))
        model.train(was_training)
        if reason:
            self._watcher.say(f"each prompt is computed twice, once for each response: {reason}")
        return reason is None

    def _losses(self, pairs: MicroBatch, logps: Tensor) -> tuple[Tensor, Tensor]:
        """The losses (B,), and METRICS of every pair, detached, (len(METRICS), B) float64."""
        losses, metrics = preference_loss(
            ChosenRejected(*logps.chunk(2)), pairs.reference, self._loss, pairs.lengths, pairs.weights
        )
        return losses, torch.stack([losses.detach(), *(metrics[name] for name in METRICS[1:])]).double()

    def _gap_and_tokens(self, pairs: MicroBatch, logps: Tensor) -> Tensor:
        """How far the margins are from the reference's, summed over pairs in units of reward, and tokens."""
        chosen, rejected = logps.double().chunk(2)
        gaps = ChosenRejected(chosen - pairs.reference.chosen, rejected - pairs.reference.rejected)
        if over_means(self._loss):
            gaps = ChosenRejected(gaps.chosen / pairs.lengths.chosen, gaps.rejected / pairs.lengths.rejected)
        gap = gaps.chosen - gaps.rejected
        return torch.stack([self._train.beta * gap.abs().sum(), gap.new_tensor(pairs.token_count)])

    def _check(self, totals: Tensor, not_finite: Sequence[str], step: int, pairs: int) -> None:
        if not math.isfinite(float(totals[0])):
            everyone: list[Any] = [None] * self.args.world_size
            torch.distributed.all_gather_object(everyone, list(not_finite))
            ids = sorted(identifier for found in everyone for identifier in found)
            raise TrainingStopped(
                f"the loss of step {step + 1} is not finite; pairs: {', '.join(ids[:20])}. The last checkpoint is "
                "kept. Look at these pairs and at grad_norm in metrics.jsonl; lower train.learning_rate if it had "
                "been growing."
            )
        gap = float(totals[-2]) / pairs
        if step == 0 and gap > self._tolerance and needs_reference(self._loss):
            raise TrainingStopped(
                "the reference log-probabilities in the selection are not those of the model that training starts "
                f"from: before the first step the rewards' margins differ by {gap:.3g} on average (beta * nats; "
                f"rounding makes at most {self._tolerance:g}). They were made with another model: run the sketch "
                "and select stages again with --redo"
            )

    # Held-out pairs.

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and TRL's metrics of the held-out pairs: `eval_loss`, ..., and by language `eval_de_loss`, ..."""
        started = time.monotonic()
        model: Any = self.model_wrapped
        languages = sorted(set(self._parts.pairs.table.take(list(self._parts.held_out))["language"].to_pylist()))
        # Sums of METRICS by language, and the number of pairs.
        totals = torch.zeros(len(languages), len(METRICS) + 1, dtype=torch.float64, device=self.args.device)
        passes = self._passes(model, self._parts.held_out)
        model.eval()
        for shares in passes:
            share = shares[self.args.process_index]
            pairs = self._parts.pairs.micro_batch(share or self._parts.held_out[:1], self._shared is True)
            with torch.no_grad(), attention_over(self._causal, pairs.tokens) as arguments:
                _, found = self._losses(pairs, model(pairs.tokens, arguments))
            if share:
                rows = [languages.index(language) for language in pairs.languages]
                sums = torch.cat([found.T, torch.ones_like(found[:1].T)], 1)
                totals.index_add_(0, torch.tensor(rows, device=totals.device), sums)
        model.train()
        _sum_over_workers(totals)
        metrics: dict[str, float] = {}
        groups = ["", *(f"{language}_" for language in languages)]
        for group, sums in zip(groups, [totals.sum(0), *totals], strict=True):
            for name, mean in zip(METRICS, (sums[:-1] / sums[-1]).tolist(), strict=True):
                metrics[f"{metric_key_prefix}_{group}{name}"] = mean
        best = self.state.best_metric
        # Where training starts is no candidate.
        if self.state.global_step and (best is None or metrics[f"{metric_key_prefix}_loss"] < best):
            self._watcher.improved(self)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since += time.monotonic() - started  # tokens/s are those of training
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes nothing: a checkpoint to resume from has the weights in DeepSpeed's state, once."""


class _Steps:
    """The Trainer's data loader: the numbers of one epoch's steps, from the first that is not done yet."""

    def __init__(self, trainer: PairTrainer) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        return self._trainer._parts.schedule.steps_per_epoch

    def __iter__(self) -> Iterator[dict[str, int]]:
        done = self._trainer.state.global_step
        end = min((done // len(self) + 1) * len(self), self._trainer._parts.schedule.total_steps)
        return iter([{"step": step} for step in range(done, end)])


def _sum_over_workers(values: Tensor) -> None:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)


def _unsharded_gradient_norm(engine: DeepSpeedEngine) -> float | None:
    """Before a step: Euclidean norm of the reduced gradient where DeepSpeed keeps none (ZeRO 0, float32)."""
    if engine.zero_optimization() or engine.bfloat16_enabled():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))
