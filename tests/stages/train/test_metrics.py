from __future__ import annotations

from pathlib import Path

import pyarrow.fs as pafs

from congrad_ray.rundir.directory import Folder
from congrad_ray.stages.train.metrics import MetricsWriter, read_metrics


def events(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return [(event.step, round(event.value, 4)) for event in found.Scalars("loss")]


def write_and_resume(folder: Folder) -> None:
    first = MetricsWriter(folder, start_step=0)
    for step in (1, 2, 3):
        first.add({"step": step, "loss": 1.0 / step})
    first.close()
    # The checkpoint was made after step 2: step 3 comes again.
    second = MetricsWriter(folder, start_step=2)
    for step in (3, 4):
        second.add({"step": step, "loss": 10.0})
    second.close()


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    folder = Folder(pafs.LocalFileSystem(), str(tmp_path))
    write_and_resume(folder)
    assert [(row["step"], row["loss"]) for row in read_metrics(folder)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 10.0),
        (4, 10.0),
    ]
    assert events(tmp_path) == [(1, 1.0), (2, 0.5), (3, 10.0), (4, 10.0)]


def test_the_same_on_a_filesystem_that_is_not_local(tmp_path: Path) -> None:
    folder = Folder(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "policy")
    write_and_resume(folder)
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4]
    assert events(tmp_path / "policy") == [(1, 1.0), (2, 0.5), (3, 10.0), (4, 10.0)]


def test_no_metrics_yet(tmp_path: Path) -> None:
    assert read_metrics(Folder(pafs.LocalFileSystem(), str(tmp_path))) == []
