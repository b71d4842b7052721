"""Asking a judge, wherever it is: engines of this cluster, or a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from congrad_ray.config.endpoint import Endpoint
from congrad_ray.config.profile import PoolName, Profile
from congrad_ray.modeling.source import ModelSource
from congrad_ray.runtime.endpoint import ask_endpoint, endpoint_key
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
    *,
    pool: PoolName = "engines",
) -> Dataset:
    """As `complete`, of a model or an endpoint; see `ask_endpoint` for what becomes of its rows.

    Raises SettingsError where the endpoint's key is not in the environment.
    """
    if isinstance(judge, Endpoint):
        return ask_endpoint(dataset, rows, judge, endpoint_key(judge), task, notify)
    return complete(dataset, rows, judge, profile, task, notify, pool=pool)
