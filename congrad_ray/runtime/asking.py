"""Asking a judge, wherever it is: engines of this cluster, or a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from congrad_ray.config.endpoint import Endpoint
from congrad_ray.config.profile import Profile
from congrad_ray.modeling.source import ModelSource
from congrad_ray.runtime.engines import Task, complete
from congrad_ray.runtime.notices import Notify

if TYPE_CHECKING:
    from ray.data import Dataset


def ask(
    dataset: Dataset,
    rows: int,
    judge: ModelSource | Endpoint,
    profile: Profile,
    task: Task,
    notify: Notify,
) -> Dataset:
    """As `complete`, of a model or an endpoint."""
    if isinstance(judge, Endpoint):
        raise NotImplementedError
    return complete(dataset, rows, judge, profile, task, notify)
