"""What a run's driver does for millions of rows, before and after a change (see docs/results/scaling.md).

    python jobs/benchmarks/scale.py make --rows 1000000
    python jobs/benchmarks/scale.py measure --rows 1000000 --out after.jsonl
    PYTHONPATH=../before python jobs/benchmarks/scale.py measure --rows 1000000 --out before.jsonl

`make` writes made tables to --folder: prompts as JSONL, responses and judgements in parts of 4,096, sketches in
parts of 64 as the sketch stage writes them. `measure` does each step in a process of its own, on the package that
PYTHONPATH names. Memory is what the step's process and its Ray hold beyond what they held before the step, sampled
every tenth of a second; pages that are shared are counted once. With --digest a line has a hash of the step's
result, to be compared between two versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from scaling import sketch_rows, write_pairs, write_responses
from selection import LANGUAGES, held_memory, recipe_for

import congrad_ray
from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.rundir.directory import MANIFEST, Folder, RunDirectory
from congrad_ray.runtime.context import Context
from congrad_ray.runtime.rows import outcome_of, read_missing_batches
from congrad_ray.runtime.session import connect
from congrad_ray.stages.pair import stage as pair
from congrad_ray.stages.prompts import stage as prompts

PROFILE = Profile(name="benchmark")
_ROWS_PER_PART = 64
_DRAWN_PER_LANGUAGE = 10_000
_SAMPLE_EVERY = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "measure", *STEPS))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "scale-benchmark")
    parser.add_argument("--digest", action="store_true")
    parser.add_argument("--out", type=Path, help="add a line of JSON for each step to this file")
    arguments = parser.parse_args()
    run = RunDirectory.open(arguments.folder / str(arguments.rows))
    if arguments.what == "make":
        make(run, arguments.rows)
    elif arguments.what != "measure":
        print(json.dumps(measured(arguments.what, run, arguments.rows, arguments.digest)))
    else:
        for step in arguments.steps.split(","):
            command = [sys.executable, __file__, step, *sys.argv[2:]]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            line = (result.stdout.splitlines() or [""])[-1] if result.returncode == 0 else result.stderr
            print(line, flush=True)
            if arguments.out and result.returncode == 0:
                with arguments.out.open("a") as file:
                    file.write(line + "\n")


def make(run: RunDirectory, rows: int) -> None:
    """The tables that the steps read."""
    write_responses(run, rows // 4)
    write_pairs(run, rows)
    with (Path(run.path) / "prompts.jsonl").open("w") as file:
        for number in range(rows):
            # Every tenth is there twice, every twentieth in a language that is not asked for.
            text = f"{number - number % 10 if number % 10 == 1 else number}: so many words as a prompt has."
            language = "mt" if number % 20 == 7 else LANGUAGES[number // 10 % len(LANGUAGES)]
            file.write(json.dumps({"prompt": text, "language": language}) + "\n")
    sketches = Path(run.stage("sketches", 0).path)
    sketches.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for start in range(0, rows, _ROWS_PER_PART):
        ids = [f"{number:032x}" for number in range(start, min(start + _ROWS_PER_PART, rows))]
        digest = hashlib.blake2b(ids[0].encode(), digest_size=16).hexdigest()
        languages = [LANGUAGES[number % len(LANGUAGES)] for number in range(len(ids))]
        pq.write_table(sketch_rows(ids, languages, generator), sketches / f"part-{digest}.parquet")


def measured(step: str, run: RunDirectory, rows: int, digest: bool) -> dict[str, Any]:
    """Seconds, GiB at the most beyond what was held before, and what the step says of its result."""
    work = STEPS[step](run, rows)
    driver = psutil.Process()
    before, of_driver = held_memory(), driver.memory_full_info().pss
    peak, peak_of_driver = before, of_driver
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak, peak_of_driver
        while not ended.wait(_SAMPLE_EVERY):
            peak_of_driver = max(peak_of_driver, driver.memory_full_info().pss)
            peak = max(peak, held_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.monotonic()
    result = work()
    seconds = time.monotonic() - start
    ended.set()
    thread.join()
    found = {
        "step": step,
        "rows": rows,
        "seconds": round(seconds, 1),
        "gib": round((peak - before) / 2**30, 2),
        "driver_gib": round((peak_of_driver - of_driver) / 2**30, 2),
    }
    of_result = result(digest) if callable(result) else {}
    return {**found, **of_result, "package": str(Path(congrad_ray.__file__).parent)}


def context(run: RunDirectory, folder: str, recipe: Recipe, iteration: int | None = 0) -> Context:
    """For a stage that has still to begin."""
    output = run.stage(folder, iteration)
    output.delete()
    return Context(recipe, PROFILE, run, 0, output)


def table_facts(folder: Folder) -> Callable[[bool], dict[str, Any]]:
    """Rows and parts of a table, and a hash of all its values in their order."""

    def facts(digest: bool) -> dict[str, Any]:
        paths = folder.files(".parquet")
        found: dict[str, Any] = {"parts": len(paths), "result": sum(pq.read_metadata(p).num_rows for p in paths)}
        if digest:
            values = hashlib.blake2b(digest_size=8)
            for path in paths:
                for batch in pq.ParquetFile(path).iter_batches(4096):
                    values.update("".join(map(repr, batch.to_pylist())).encode())
            found["digest"] = values.hexdigest()
        return found

    return facts


def start_ray() -> None:
    import ray

    connect(PROFILE, 2)
    ray.data.range(100, override_num_blocks=8).map(lambda row: row).count()  # workers are up


def draw_prompts(run: RunDirectory, rows: int) -> Callable[[], object]:
    source = {"name": f"{run.path}/prompts.jsonl"}
    values = recipe_for(256, "float16").model_dump(mode="json")
    values["prompts"] |= {
        "train": source,
        "evaluation": source,
        "languages": list(LANGUAGES),
        "train_per_language": _DRAWN_PER_LANGUAGE,
        "evaluation_per_language": 100,
    }
    of_run = context(run, "prompts", Recipe.model_validate(values), None)

    def work() -> object:
        prompts.STAGE.run(of_run)
        return table_facts(of_run.output)

    return work


def pair_responses(run: RunDirectory, rows: int) -> Callable[[], object]:
    recipe = recipe_for(256, "float16")
    recipe = recipe.model_copy(update={"pair": recipe.pair.model_copy(update={"language_check": False})})
    of_run = context(run, "paired", recipe)
    if pair.STAGE.uses_ray:
        start_ray()

    def work() -> object:
        pair.STAGE.run(of_run)
        return table_facts(of_run.output)

    return work


def resume_filter(run: RunDirectory, rows: int) -> Callable[[], object]:
    def work() -> object:
        count = len(run.stage("sketches", 0).ids("pair_id"))
        return lambda digest: {"result": count}

    return work


def what_is_missing(run: RunDirectory, rows: int) -> Callable[[], object]:
    start_ray()

    def work() -> object:
        missing = read_missing_batches(run.stage("pairs", 0), run.stage("sketches", 0), "pair_id", 64, 2**40)
        return lambda digest: {"result": missing.count}

    return work


def doubled_rows(run: RunDirectory, rows: int) -> Callable[[], object]:
    def work() -> object:
        outcome = outcome_of(run.stage("sketches", 0), "pair_id")
        return lambda digest: {"result": outcome.rows}

    return work


def commit(run: RunDirectory, rows: int) -> Callable[[], object]:
    """The manifest of a stage with all these parts, and the check of it when the stage is met again."""
    folder = run.stage("sketches", 0)

    def work() -> object:
        folder.commit("sketch", 0, "f", None, {}, rows, 0.0, {})
        state = folder.begin("f", False, "sketch")
        size = len(folder.read_bytes(MANIFEST))
        for name in (MANIFEST, "_files.arrow"):
            Path(f"{folder.path}/{name}").unlink(missing_ok=True)
        return lambda digest: {"state": state, "manifest_bytes": size}

    return work


def merge_small_parts(run: RunDirectory, rows: int) -> Callable[[], object]:
    """What an earlier version does not do."""
    from congrad_ray.runtime.merging import merge_parts

    start_ray()
    copy = run.stage("merged", 0)
    copy.delete()
    shutil.copytree(run.stage("sketches", 0).path, copy.path)

    def work() -> object:
        merge_parts(copy)
        return table_facts(copy)

    return work


STEPS: dict[str, Callable[[RunDirectory, int], Callable[[], object]]] = {
    "prompts": draw_prompts,
    "pair": pair_responses,
    "filter": resume_filter,
    "missing": what_is_missing,
    "doubled": doubled_rows,
    "commit": commit,
    "merge": merge_small_parts,
}

if __name__ == "__main__":
    main()
