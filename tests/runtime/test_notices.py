"""What workers say reaches the screen, once, and rows that are computed but not written count as progress."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import validate
from congrad_ray.data.tables import FAILURE_FIELD
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.context import Context
from congrad_ray.runtime.notices import Notify
from congrad_ray.runtime.progress import Progress
from congrad_ray.runtime.rows import write_rows

SCHEMA = pa.schema([("id", pa.string()), ("language", pa.string())])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    monkeypatch.setattr("congrad_ray.runtime.progress.time.monotonic", lambda: now[0])
    yield now


def test_what_workers_say_and_warn_is_on_the_screen_once(
    tmp_path: Path, shared_ray: None, caplog: pytest.LogCaptureFixture, warned: Callable[[], list[str]]
) -> None:
    import ray

    recipe = validate(Recipe, {"name": "t", "prompts": {"languages": ["en"]}}, "t")
    run = RunDirectory.open(tmp_path)
    progressed: list[bool] = []
    context = Context(
        recipe,
        Profile(name="t"),
        run,
        0,
        run.stage("rows", 0),
        progressed=lambda: progressed.append(True),
    )
    notify = context.notify()

    class Worker:
        def __init__(self) -> None:
            notify.forward_warnings()
            notify("loading a model")

        def __call__(self, batch: pa.Table) -> pa.Table:
            logging.getLogger("congrad_ray.anything").warning("the prompt's end is dropped")
            notify.computed(len(batch), last=True)
            return batch

    rows = [{"id": str(number), "language": "en", "failure": None} for number in range(20)]
    table = pa.Table.from_pylist(rows, schema=pa.schema([*SCHEMA, FAILURE_FIELD]))
    dataset = ray.data.from_arrow(table).repartition(10)
    # Two that share a CPU: the Ray of a test before may have two, and the other tasks need one.
    two = ray.data.ActorPoolStrategy(size=2)
    worked = dataset.map_batches(Worker, batch_format="pyarrow", batch_size=None, compute=two, num_cpus=0.5)
    write_rows(worked, context, SCHEMA, "id", 20)
    lines = caplog.messages
    assert lines.count("loading a model") == 1
    assert warned() == ["the prompt's end is dropped"]
    assert lines[-1].startswith("20/20 rows") or "20/20 rows" in " ".join(lines)
    assert progressed


def test_rows_computed_and_not_written_yet_are_progress(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    progress = Progress(100, every_seconds=10)
    clock[0] += 60  # an engine starts: no row, no line, and no part of the rate
    progress.computed(1)
    clock[0] += 10
    progress.computed(21)
    assert caplog.messages[-1] == "21/100 rows, 2 rows/s, 40 s left"
    progress.add(16, tokens=160)
    assert caplog.messages[-1] == "21/100 rows, 2 rows/s, 40 s left"  # nothing new within ten seconds
    clock[0] += 10
    progress.add(16, failed=2, tokens=160)
    # 320 tokens in 34 rows, 33 of them in the 20 seconds since the first.
    assert caplog.messages[-1] == "34/100 rows, 2 failed, 1.6 rows/s, 16 tokens/s, 40 s left"
    clock[0] += 1
    progress.add(66)
    last = caplog.messages[-1]
    assert last.startswith("100/100 rows, 2 failed") and "left" not in last
    progress.computed(100)
    assert len(caplog.messages) == 4  # the end is reported once


def test_the_first_rows_that_come_written_start_the_clock(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """Of the time that they took nothing is known, so neither they nor their tokens count in the rate."""
    progress = Progress(40, every_seconds=10)
    progress.add(30, tokens=3000)
    clock[0] += 10
    progress.add(10, tokens=1000)
    assert caplog.messages[-1] == "40/40 rows, 1 rows/s, 100 tokens/s"


def test_without_ray_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    notify = Notify()
    notify("loading a model")
    notify.computed(3, last=True)
    assert caplog.messages == ["loading a model"]
