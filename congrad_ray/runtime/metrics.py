"""What a run reports to Prometheus, through Ray's metrics; `cluster/grafana-dashboard.json` shows it.

All is recorded by the driver, of what has been written: a batch that is lost with its worker is not counted.
Ray exports every metric with the prefix `ray_`, and counters with the suffix `_total`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.util.metrics import Counter, Gauge

ABOUT = ("run", "stage", "iteration")
# By name: what it is, and the labels beside ABOUT. Rates of counters are per second.
COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "congrad_rows": ("rows written (outcome: written) or quarantined (failed)", ("outcome",)),
    "congrad_tokens": ("tokens of the rows written, prompts and what was generated; evaluate: the latter", ()),
    "congrad_judgements": ("judgements made", ("language",)),
    "congrad_unreadable_judgements": ("judgements without a score", ("language",)),
    "congrad_cost_usd": ("US dollars for the tokens of a judge behind HTTP, by the recipe's prices", ()),
    "congrad_attention_padding": ("positions of attention that were padding; the others are its tokens", ()),
    "congrad_attention_tokens": ("positions of attention that were tokens", ()),
}
GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "congrad_stage_running": ("1 while the stage is at work, 0 after it", ()),
    "congrad_rows_left": ("rows of the stage that are still to be done", ()),
    "congrad_pairs": ("pairs with a sketch", ("language",)),
    "congrad_conflicting_share": ("share of pairs whose gradient points away from the direction", ("language",)),
    "congrad_kept_share": ("share of pairs that are kept", ("language",)),
    "congrad_training_step": ("optimiser steps done", ()),
    "congrad_training_steps": ("optimiser steps in all", ()),
    "congrad_training_loss": ("loss of the last logged step", ()),
    "congrad_training_accuracy": ("share of pairs whose chosen response has the higher reward", ()),
    "congrad_training_margin": ("chosen less rejected reward", ()),
    "congrad_training_gradient_norm": ("norm of the gradient before clipping", ()),
    "congrad_training_tokens_per_second": ("tokens per second of all training workers together", ()),
}


@dataclass(frozen=True)
class Meter:
    """Records what a stage does, where there is a Ray to record it; otherwise nothing."""

    run: str = ""
    stage: str = ""
    iteration: int | None = None

    def count(self, name: str, value: float, **labels: str) -> None:
        """Adds to one of COUNTERS. Raises KeyError for another name."""
        description, further = COUNTERS[name]
        if value > 0 and _is_connected():  # Ray refuses 0
            _counter(name, description, (*ABOUT, *further)).inc(value, tags=self._labels(labels))

    def set(self, name: str, value: float, **labels: str) -> None:
        """Sets one of GAUGES. Raises KeyError for another name."""
        description, further = GAUGES[name]
        if _is_connected():
            _gauge(name, description, (*ABOUT, *further)).set(value, tags=self._labels(labels))

    def _labels(self, labels: Mapping[str, str]) -> dict[str, str]:
        iteration = "" if self.iteration is None else str(self.iteration)
        return {"run": self.run, "stage": self.stage, "iteration": iteration, **labels}


def _is_connected() -> bool:
    import ray

    return ray.is_initialized()


@cache
def _counter(name: str, description: str, labels: tuple[str, ...]) -> Counter:
    from ray.util.metrics import Counter

    return Counter(name, description, tag_keys=labels)


@cache
def _gauge(name: str, description: str, labels: tuple[str, ...]) -> Gauge:
    from ray.util.metrics import Gauge

    return Gauge(name, description, tag_keys=labels)
