"""How long `select` takes, and how much memory, against reading the same bytes twice with pyarrow.

    python jobs/benchmarks/selection.py --pairs 200000 --width 16384 --folder /tmp/select-benchmark

Writes random sketches once (13 GB for the numbers above) and leaves them for the next time. Memory is what the
processes of this script and of its Ray hold beyond what an idle Ray holds, sampled; pages that are shared (the
object store's) are counted once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import validate
from congrad_ray.data.tables import table_of
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.context import Context
from congrad_ray.runtime.session import connect
from congrad_ray.stages.pair.schema import PAIRS
from congrad_ray.stages.select import stage as select
from congrad_ray.stages.sketch.schema import sketch_bytes, sketches_schema

LANGUAGES = ("de", "el", "en", "es", "fr", "hi", "ru", "tr")
_PAIRS_PER_PART = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=16_384)
    parser.add_argument("--dtype", choices=("float32", "float16", "int8"), default="float32")
    parser.add_argument("--rounds", type=int, default=2, help="how often the two are timed, in turn")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "select-benchmark")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    run = RunDirectory.open(arguments.folder / f"{arguments.pairs}-{arguments.width}-{arguments.dtype}")
    write_tables(run, arguments.pairs, arguments.width, arguments.dtype)
    recipe = recipe_for(arguments.width, arguments.dtype)
    connect(Profile(name="benchmark"), 2)
    files = run.stage("sketches", 0).files(".parquet")
    select_seconds, read_seconds, peaks = [], [], []
    idle = held_memory()
    print(f"idle Ray and this process: {idle / 2**30:.2f} GiB", flush=True)
    for number in range(arguments.rounds):
        seconds, _ = timed(lambda: read_twice(files))
        read_seconds.append(seconds)
        seconds, peak = timed(lambda: run_select(run, recipe))
        select_seconds.append(seconds)
        peaks.append(peak - idle)
        print(
            f"round {number}: reading twice {read_seconds[-1]:.1f} s, select {seconds:.1f} s "
            f"({seconds / read_seconds[-1]:.2f} times), {peaks[-1] / 2**30:.2f} GiB beyond idle",
            flush=True,
        )
    figures = {
        "pairs": arguments.pairs,
        "width": arguments.width,
        "dtype": arguments.dtype,
        "read_twice_seconds": read_seconds,
        "select_seconds": select_seconds,
        "ratios": [a / b for a, b in zip(select_seconds, read_seconds, strict=True)],
        "gib_beyond_idle": [peak / 2**30 for peak in peaks],
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1))


def recipe_for(width: int, dtype: str) -> Recipe:
    """A recipe whose sketches are of this width and dtype."""
    values: dict[str, Any] = {
        "name": "benchmark",
        "prompts": {"languages": list(LANGUAGES)},
        "sketch": {"width": width, "dtype": dtype},
    }
    return validate(Recipe, values, "benchmark")


def write_tables(run: RunDirectory, pairs: int, width: int, dtype: str) -> None:
    """Random sketches of languages that agree a little, in parts as a run writes them; pairs with short texts."""
    sketches, texts = run.stage("sketches", 0), run.stage("pairs", 0)
    if texts.exists("pairs.parquet"):
        return
    generator = np.random.default_rng(0)
    shift = generator.normal(size=(len(LANGUAGES) + 1, width)).astype(np.float32)
    schema = sketches_schema(width, dtype)
    rows: list[dict[str, Any]] = []
    for start in range(0, pairs, _PAIRS_PER_PART):
        count = min(_PAIRS_PER_PART, pairs - start)
        language = (np.arange(start, start + count)) % len(LANGUAGES)
        numbers = generator.standard_normal((count, width), dtype=np.float32)
        numbers += 0.1 * shift[language] + 0.05 * shift[-1]
        stored = (numbers * 30).clip(-127, 127).astype(np.int8) if dtype == "int8" else numbers.astype(dtype)
        columns: dict[str, Any] = {
            "pair_id": [f"{number:032x}" for number in range(start, start + count)],
            "language": [LANGUAGES[index] for index in language],
            "sketch": sketch_bytes(stored),
            **{name: np.ones(count) for name in ("sketch_scale", "norm", "coefficient")},
            **{name: np.full(count, -10.0) for name in ("chosen_logps", "rejected_logps")},
        }
        for field in schema:
            if field.name not in columns:
                columns[field.name] = [None if field.nullable else 7] * count
        table = pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema)
        sketches.write_table(f"part-{start:09}.parquet", table)
        message = [{"role": "user", "content": "text " * 20}]
        rows += [
            {
                **{name: identifier for name in ("pair_id", "prompt_id")},
                "language": LANGUAGES[index],
                **{name: message for name in ("prompt", "chosen", "rejected")},
                **{name: 1.0 for name in ("chosen_score", "rejected_score")},
                **{name: "" for name in ("chosen_response_id", "rejected_response_id")},
            }
            for identifier, index in zip(columns["pair_id"], language, strict=True)
        ]
        print(f"writing sketches: {start + count}/{pairs}", flush=True)
    texts.write_table("pairs.parquet", table_of(rows, PAIRS))


def read_twice(files: list[str]) -> None:
    """The floor: every sketch read from its file into memory, two times, a file at a time on all cores."""
    for _ in range(2):
        for path in files:
            pq.read_table(path, columns=["sketch"])


def run_select(run: RunDirectory, recipe: Recipe) -> None:
    """The select stage as a run calls it."""
    output = run.stage("selection", 0)
    output.delete()
    select.STAGE.run(Context(recipe, Profile(name="benchmark"), run, 0, output))


def held_memory() -> int:
    """Bytes held by this process and all below it; pages that several share are counted once (PSS)."""
    total = 0
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def timed(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds that `work` takes, and the most memory held while it runs."""
    peak, stop = held_memory(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.5):
            peak = max(peak, held_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    before = time.monotonic()
    try:
        work()
    finally:
        seconds = time.monotonic() - before
        stop.set()
        thread.join()
    return seconds, peak


if __name__ == "__main__":
    main()
