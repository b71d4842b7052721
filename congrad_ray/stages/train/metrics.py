"""The training curves: one JSON line per logged step, and the same as TensorBoard events."""

from __future__ import annotations

import json
import tempfile
import time
from typing import TYPE_CHECKING

import pyarrow.fs as pafs

from congrad_ray.rundir.directory import Folder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FAILURE = "failure.json"
REFERENCE_GAP = "logps/reference_gap"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"

Row = dict[str, float]


def read_metrics(folder: Folder) -> list[Row]:
    """The logged steps in `folder`, in order; none where nothing was logged yet."""
    return [row for row in _read(folder) if "loss" in row]


def read_evaluations(folder: Folder) -> list[Row]:
    """What was found on the held-out pairs, in order of the steps before it (`eval_loss`, `eval_de_loss`, ...)."""
    return [row for row in _read(folder) if "eval_loss" in row]


def _read(folder: Folder) -> list[Row]:
    if not folder.exists(METRICS):
        return []
    return [json.loads(line) for line in folder.read_bytes(METRICS).decode().splitlines()]


class MetricsWriter:
    """Writes the curves of a run that may be a resumed one; rows from `start_step` on are replaced.

    Object stores cannot append, so the whole file is written again, at most every few seconds and before each
    checkpoint: it always holds at least the rows up to the checkpoint from which a restart resumes.
    """

    def __init__(
        self, folder: Folder, start_step: int, tensorboard: bool = True, every_seconds: float = 5.0
    ) -> None:
        self._folder, self._every = folder, every_seconds
        self._rows = [row for row in _read(folder) if row["step"] <= start_step]
        self._last = time.monotonic()
        self._events: SummaryWriter | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if tensorboard:
            self._open_events()

    def _open_events(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        events = self._folder / TENSORBOARD
        events.delete()
        self._scratch = None if self._folder.is_local else tempfile.TemporaryDirectory()
        self._events_path = self._scratch.name if self._scratch else events.path
        self._events = SummaryWriter(self._events_path)
        for row in self._rows:
            self._add_events(row)

    def add(self, row: Row) -> None:
        """Logs an optimiser step; `row["step"]` counts from 1."""
        self._rows.append(row)
        self._add_events(row)
        if len(self._rows) == 1 or time.monotonic() - self._last > self._every:
            self.flush()

    def _add_events(self, row: Row) -> None:
        for name, value in row.items():
            if name != "step" and self._events:
                self._events.add_scalar(name, value, int(row["step"]))

    def flush(self) -> None:
        self._last = time.monotonic()
        lines = "".join(json.dumps(row) + "\n" for row in self._rows)
        self._folder.write_bytes(METRICS, lines.encode())
        if self._events:
            self._events.flush()
        if self._scratch:
            target = self._folder / TENSORBOARD
            target.filesystem.create_dir(target.path, recursive=True)
            pafs.copy_files(
                self._events_path,
                target.path,
                source_filesystem=pafs.LocalFileSystem(),
                destination_filesystem=target.filesystem,
            )

    def close(self) -> None:
        self.flush()
        if self._events:
            self._events.close()
        if self._scratch:
            self._scratch.cleanup()
