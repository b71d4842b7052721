"""How much work was done, seen from outside: Ray's own record of every attempt of every task.

A batch is begun when an attempt of its task begins to run in an engine or in a gradient actor. All batches begun,
less those that the undisturbed run began for the same rows, were done more than once. A batch is counted whole
however little of it was done when it was lost, and a resumed stage cuts what is missing into batches anew, with
one that is not full: so these are upper bounds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from faults.command import ENGINE_BATCH, SAVE_STEPS, SKETCH_BATCH
from faults.compare import POLICY

# The stages with actors that compute batches of rows: parts of the task's name, and the rows of a batch.
COMPUTING = {
    "baseline": ("VLLMEngine", "ask", ENGINE_BATCH),
    "generate": ("VLLMEngine", "ask", ENGINE_BATCH),
    "judge": ("VLLMEngine", "ask", ENGINE_BATCH),
    "sketch": ("SketchReplica", "submit", SKETCH_BATCH),
    "evaluate": ("VLLMEngine", "ask", ENGINE_BATCH),
}
_ENGINE_START = 10.0  # seconds; batches follow each other within less, and no engine starts so fast
_RUNNING = 8  # Ray's TaskStatus.RUNNING


@dataclass(frozen=True)
class Computed:
    """What the actors of a stage did within a span of time."""

    batches: int  # begun
    seconds: float  # from the first one's beginning to the last one's, less the start of a second engine


def computed(stage: str, events: Iterable[Any], since: float, until: float) -> Computed:
    """`since` and `until` in seconds since the epoch; the stage is one of COMPUTING."""
    name, method, _ = COMPUTING[stage]
    begun = set()
    times = []
    for event in events:
        if name not in event.task_info.name or not event.task_info.name.endswith(method):
            continue
        started = event.state_updates.state_ts_ns.get(_RUNNING, 0) / 1e9
        if since <= started <= until:
            begun.add((event.task_id, event.attempt_number))
            times.append(started)
    pauses = [later - earlier for earlier, later in pairwise(sorted(times))]
    return Computed(len(begun), sum(pause for pause in pauses if pause < _ENGINE_START))


@dataclass(frozen=True)
class TrainingState:
    """Where training stands: the last step in its metrics, and that of the checkpoint it would go on from."""

    logged_step: int
    checkpoint_step: int

    @property
    def steps_lost_at_most(self) -> int:
        """Rows are written before every checkpoint, so at most the steps between two are not among them."""
        return self.logged_step - self.checkpoint_step + SAVE_STEPS


def training_state(run: Path) -> TrainingState:
    policy = run / POLICY
    checkpoints = [0]
    for snapshot in policy.glob("ray_train/*/checkpoint_manager_snapshot.json"):
        with suppress(ValueError):  # being written
            latest = json.loads(snapshot.read_text()).get("latest_checkpoint_result")
            checkpoints.append(latest["metrics"]["step"] if latest else 0)
    metrics = policy / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return TrainingState(int(json.loads(lines[-1])["step"]) if lines else 0, max(checkpoints))


def rows_written(run: Path, stage: str) -> int:
    """Rows in the parts of a stage, as they are on the disk now."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folders = {
        "baseline": "../baseline",
        "generate": "responses",
        "judge": "judgements/samples",
        "sketch": "sketches",
        "evaluate": "evaluation",
    }
    if stage not in folders:
        return 0
    rows = 0
    for part in (run / "iteration-0" / folders[stage]).glob("*.parquet"):
        try:
            rows += pq.read_metadata(part).num_rows
        except (pa.ArrowInvalid, OSError):  # removed, or cut off, by the kill of a moment ago
            continue
    return rows
