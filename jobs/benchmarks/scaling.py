"""What grows with the number of pairs and of workers, measured on one machine (see docs/results/scaling.md).

    python jobs/benchmarks/scaling.py rows --pairs 1000000          pair, the resume filter, select
    python jobs/benchmarks/scaling.py store --pairs 64000           the resume filter where every file comes late
    python jobs/benchmarks/scaling.py scheduling --pairs 200000     the sketch stage with replicas that do nothing
    python jobs/benchmarks/scaling.py workers                       pairs/s of two sketching workers and of one

Tables are made once in --folder and stay there for the next time. Memory is what the processes of this script and
of its Ray hold beyond what an idle Ray holds, sampled; pages that are shared are counted once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from selection import LANGUAGES, held_memory, recipe_for, timed, write_tables

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import validate
from congrad_ray.data.tables import FAILURE_FIELD, table_of
from congrad_ray.modeling.source import policy
from congrad_ray.rundir.directory import RunDirectory, StageFolder
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.rows import PartWriter, outcome_of, read_missing_batches
from congrad_ray.runtime.session import connect
from congrad_ray.stages.generate.schema import RESPONSES
from congrad_ray.stages.judge.schema import JUDGEMENTS
from congrad_ray.stages.pair import stage as pair
from congrad_ray.stages.pair.schema import PAIRS
from congrad_ray.stages.select import stage as select
from congrad_ray.stages.sketch import stage as sketch
from congrad_ray.stages.sketch.replicas import ReplicaSpec, SketchReplica
from congrad_ray.stages.sketch.schema import sketch_bytes, sketches_schema

_WIDTH, _DTYPE = 256, "float16"
_RESPONSES_PER_PROMPT = 4
_ROWS_PER_PART = 4096
_LATE = 0.03  # seconds
_PAIRS_PER_BATCH = 64  # as the sketch stage writes them
_TEXT = "so many words as a short answer has, and then some more of them to the end of a line. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "store", "scheduling", "workers"))
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=2, help="how often measurements are taken")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "scaling-benchmark")
    parser.add_argument("--out", type=Path, help="add the figures to this file as a line of JSON")
    arguments = parser.parse_args()
    measurements = {"rows": rows, "store": store, "scheduling": scheduling, "workers": workers}
    figures = measurements[arguments.what](arguments.folder, arguments.pairs, arguments.rounds)
    line = json.dumps({"what": arguments.what, "pairs": arguments.pairs, **figures})
    print(line)
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(line + "\n")


def rows(folder: Path, pairs: int, rounds: int) -> dict[str, Any]:
    """Seconds, and GiB beyond idle, of what the driver does for this many pairs."""
    import ray

    recipe = recipe_for(_WIDTH, _DTYPE)
    recipe = recipe.model_copy(update={"pair": recipe.pair.model_copy(update={"language_check": False})})
    run = RunDirectory.open(folder / f"rows-{pairs}")
    write_responses(run, pairs // _RESPONSES_PER_PROMPT)  # as many rows as there are sketches below
    connect(Profile(name="benchmark"), 2)
    ray.data.range(100, override_num_blocks=8).map(lambda row: row).count()  # workers are up
    idle = held_memory()
    figures: dict[str, Any] = {"responses": pairs // _RESPONSES_PER_PROMPT * _RESPONSES_PER_PROMPT}

    def measure(name: str, work: Callable[[], object]) -> None:
        seconds, peak = timed(work)
        figures[name] = {"seconds": round(seconds, 1), "gib": round((peak - idle) / 2**30, 2)}
        print(f"{name}: {seconds:.1f} s, {(peak - idle) / 2**30:.2f} GiB beyond idle", flush=True)

    def pair_all() -> Outcome:
        output = run.stage("pairs", 0)
        output.delete()
        return pair.STAGE.run(Context(recipe, Profile(name="benchmark"), run, 0, output))

    measure("pair", pair_all)
    small, large = (folder / f"{name}-{pairs}" for name in ("small-parts", "large-parts"))
    write_parts(RunDirectory.open(small), pairs, _PAIRS_PER_BATCH)
    write_tables(RunDirectory.open(large), pairs, _WIDTH, _DTYPE)
    shutil.copytree(small / "iteration-0" / "pairs", large / "iteration-0" / "pairs", dirs_exist_ok=True)
    for where in (small, large):
        parts = RunDirectory.open(where)
        sketches, name = parts.stage("sketches", 0), where.name.rsplit("-", 1)[0]
        figures[f"{name}: files"] = len(sketches.files(".parquet"))
        measure(f"{name}: resume filter", lambda done=sketches: done.ids("pair_id"))  # type: ignore[misc]
        measure(
            f"{name}: all that is missing",
            lambda run=parts: read_missing_batches(  # type: ignore[misc]
                run.stage("pairs", 0), run.stage("sketches", 0), "pair_id", _PAIRS_PER_BATCH, 2**40
            ),
        )
        measure(f"{name}: doubled rows", lambda done=sketches: outcome_of(done, "pair_id"))  # type: ignore[misc]
        measure(f"{name}: select", lambda run=parts: run_select(run))  # type: ignore[misc]
    return figures


class LateFiles(FSSpecHandler):
    """A local disk that opens every file after a while, as an object store answers a request."""

    def open_input_file(self, path: str) -> Any:
        time.sleep(_LATE)
        return super().open_input_file(path)


def store(folder: Path, pairs: int, rounds: int) -> dict[str, Any]:
    """Seconds of the resume filter, and of reading the same files one after the other, on late files."""
    where = folder / f"small-parts-{pairs}"
    write_parts(RunDirectory.open(where), pairs, _PAIRS_PER_BATCH)
    local = RunDirectory.open(where).stage("sketches", 0)
    late = StageFolder(PyFileSystem(LateFiles(LocalFileSystem())), local.path)
    files = late.files(".parquet")
    figures: dict[str, Any] = {"files": len(files), "late_seconds": _LATE, "resume filter": [], "one by one": []}
    for _ in range(rounds):
        figures["resume filter"].append(round(timed(lambda: late.ids("pair_id"))[0], 2))
        one_by_one = timed(lambda: [late.read_parquet(path, ["pair_id"]) for path in files])
        figures["one by one"].append(round(one_by_one[0], 2))
        print(figures, flush=True)
    return figures


def run_select(run: RunDirectory) -> Outcome:
    output = run.stage("selection", 0)
    output.delete()
    return select.STAGE.run(Context(recipe_for(_WIDTH, _DTYPE), Profile(name="benchmark"), run, 0, output))


def write_responses(run: RunDirectory, prompts: int) -> None:
    """Four responses to each prompt with scores, in parts as engines write them: a prompt's lie close together."""
    responses, judgements = run.stage("responses", 0), run.stage("judgements", 0)
    generator = np.random.default_rng(0)
    for part, start in enumerate(range(0, prompts * _RESPONSES_PER_PROMPT, _ROWS_PER_PART)):
        name = f"part-{part:09}.parquet"
        if judgements.exists(name):
            continue
        numbers = range(start, min(start + _ROWS_PER_PART, prompts * _RESPONSES_PER_PROMPT))
        scores = generator.integers(0, 6, len(numbers)).astype(np.float64)
        common = [
            {
                "response_id": f"{number:032x}",
                # Spread like the hashes that prompts have.
                "prompt_id": f"{number // _RESPONSES_PER_PROMPT * 11400714819323198485 % 2**64:016x}" * 2,
                "language": LANGUAGES[number // _RESPONSES_PER_PROMPT % len(LANGUAGES)],
            }
            for number in numbers
        ]
        responses.write_table(
            name,
            table_of(
                [
                    {
                        **row,
                        "prompt": [{"role": "user", "content": _TEXT}],
                        "sample": number % _RESPONSES_PER_PROMPT,
                        "seed": number,
                        "response": f"{number} {_TEXT * 3}",
                        "prompt_tokens": 30,
                        "response_tokens": 90,
                        "truncated": False,
                    }
                    for number, row in zip(numbers, common, strict=True)
                ],
                RESPONSES,
            ),
        )
        judgements.write_table(
            name,
            table_of(
                [
                    {**row, "score": float(score), "readable": 1, "asked": 1, "outputs": [""]}
                    for score, row in zip(scores, common, strict=True)
                ],
                JUDGEMENTS,
            ),
        )


def write_parts(run: RunDirectory, pairs: int, rows_per_part: int) -> None:
    """Random sketches in parts of this many rows, and their pairs."""
    sketches = run.stage("sketches", 0)
    write_pairs(run, pairs)
    generator = np.random.default_rng(0)
    for start in range(0, pairs, rows_per_part):
        name = f"part-{start:09}.parquet"
        if sketches.exists(name):
            continue
        numbers = range(start, min(start + rows_per_part, pairs))
        ids = [f"{number:032x}" for number in numbers]
        sketches.write_table(name, sketch_rows(ids, [_language(number) for number in numbers], generator))


def write_pairs(run: RunDirectory, pairs: int) -> None:
    texts = run.stage("pairs", 0)
    if texts.exists("pairs.parquet"):
        return
    schema = PAIRS
    with (
        texts.output_stream("pairs.parquet") as sink,
        pq.ParquetWriter(sink, schema, compression="zstd") as writer,
    ):
        for start in range(0, pairs, _ROWS_PER_PART):
            numbers = range(start, min(start + _ROWS_PER_PART, pairs))
            writer.write_table(table_of([_pair(number) for number in numbers], schema), 1024)


def _pair(number: int) -> dict[str, Any]:
    return {
        **{name: f"{number:032x}" for name in ("pair_id", "prompt_id")},
        "language": _language(number),
        "prompt": [{"role": "user", "content": _TEXT}],
        "chosen": [{"role": "assistant", "content": f"{number} {_TEXT}"}],
        "rejected": [{"role": "assistant", "content": f"{_TEXT} {number}"}],
        **{name: 1.0 for name in ("chosen_score", "rejected_score")},
        **{name: "" for name in ("chosen_response_id", "rejected_response_id")},
    }


def _language(number: int) -> str:
    return LANGUAGES[number % len(LANGUAGES)]


def sketch_rows(ids: list[str], languages: list[str], generator: np.random.Generator) -> pa.Table:
    """Rows of the sketches table whose numbers are drawn."""
    schema = sketches_schema(_WIDTH, _DTYPE)
    columns: dict[str, Any] = {
        "pair_id": ids,
        "language": languages,
        "sketch": sketch_bytes(generator.standard_normal((len(ids), _WIDTH), dtype=np.float32).astype(_DTYPE)),
        **{name: np.ones(len(ids)) for name in ("sketch_scale", "norm", "coefficient")},
        **{name: np.full(len(ids), -10.0) for name in ("chosen_logps", "rejected_logps")},
    }
    for field in schema:
        if field.name not in columns:
            columns[field.name] = [None if field.nullable else 7] * len(ids)
    return pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema)


class NoReplica:
    """In place of the sketch stage's replica: no model, and sketches that are drawn."""

    def __init__(self, spec: ReplicaSpec, *, write: PartWriter, **others: Any) -> None:
        self._write = write
        self._generator = np.random.default_rng(0)

    def __call__(self, batch: pa.Table) -> pa.Table:
        found = sketch_rows(batch["pair_id"].to_pylist(), batch["language"].to_pylist(), self._generator)
        written: pa.Table = self._write(
            found.append_column(FAILURE_FIELD, pa.nulls(len(found), FAILURE_FIELD.type))
        )
        return written


def scheduling(folder: Path, pairs: int, rounds: int) -> dict[str, Any]:
    """Batches per second that Ray Data and the stage's writing get through when replicas take no time."""
    model = tiny_model(folder)
    run = RunDirectory.open(folder / f"scheduling-{pairs}")
    write_pairs(run, pairs)
    recipe = sketching(model, _WIDTH, _DTYPE)
    sketch.SketchReplica = NoReplica  # type: ignore[assignment, misc]
    found: dict[str, list[dict[str, float]]] = {}
    for actors in (2, 16):
        profile = validate(
            Profile,
            {"name": "b", "data_cpus": 8, "sketchers": {"min_actors": actors, "max_actors": actors}},
            "benchmark",
        )
        connect(profile, 32)
        for _ in range(rounds):
            output = run.stage("sketches", 0)
            output.delete()
            before = time.monotonic()
            sketch.STAGE.run(Context(recipe, profile, run, 0, output))
            seconds, steady = time.monotonic() - before, rate(output.files(".parquet"))
            found.setdefault(f"{actors} actors", []).append(
                {"seconds": round(seconds, 1), "batches_per_second": round(steady / _PAIRS_PER_BATCH, 1)}
            )
            print(found, flush=True)
    return found


def workers(folder: Path, pairs: int, rounds: int) -> dict[str, Any]:
    """Pairs per second of the sketch stage with one and with two workers of one thread, in turn; and of as many
    plain processes without Ray, which is what the machine has to give."""
    import ray

    model = tiny_model(folder, hidden=256, layers=4)
    pairs = min(pairs, 4096)
    run = RunDirectory.open(folder / f"workers-{pairs}")
    write_pairs(run, pairs)
    recipe = sketching(model, 4096, "float32")
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        for count in (1, 2):
            plain = plain_rate(recipe, run, count, batches=max(1, pairs // _PAIRS_PER_BATCH // 4))
            rates.setdefault(f"{count} plain", []).append(round(plain, 2))
            profile = validate(
                Profile,
                {"name": "b", "threads": 1, "sketchers": {"min_actors": count, "max_actors": count}},
                "benchmark",
            )
            connect(profile, count + profile.data_cpus)
            output = run.stage("sketches", 0)
            output.delete()
            sketch.STAGE.run(Context(recipe, profile, run, 0, output))
            ray.shutdown()
            rates.setdefault(f"{count} under Ray", []).append(round(rate(output.files(".parquet")), 2))
            print(rates, flush=True)
    ratios = {
        how: round(float(np.median(np.divide(rates[f"2 {how}"], rates[f"1 {how}"]))), 3)
        for how in ("plain", "under Ray")
    }
    return {"pairs_per_second": rates, "ratio": ratios}


def plain_rate(recipe: Recipe, run: RunDirectory, count: int, batches: int) -> float:
    """Pairs per second of this many processes together, each with a sketch replica of one thread and no Ray."""
    context = multiprocessing.get_context("spawn")
    ready, seconds = context.Barrier(count), context.Queue()
    work = (recipe, run, batches, ready, seconds)
    processes = [context.Process(target=sketch_plainly, args=work) for _ in range(count)]
    for process in processes:
        process.start()
    found = [seconds.get() for _ in processes]
    for process in processes:
        process.join()
    return float(sum(batches * _PAIRS_PER_BATCH / each for each in found))


def sketch_plainly(recipe: Recipe, run: RunDirectory, batches: int, ready: Any, seconds: Any) -> None:
    """Sketches this many batches when all are ready, and returns how long it took."""
    replica = SketchReplica(ReplicaSpec(policy(recipe, run, 0), recipe))
    pairs = run.stage("pairs", 0).read_table()
    replica(pairs.slice(0, _PAIRS_PER_BATCH))
    ready.wait()
    before = time.monotonic()
    for batch in range(batches):
        replica(pairs.slice(batch * _PAIRS_PER_BATCH, _PAIRS_PER_BATCH))
    seconds.put(time.monotonic() - before)


def sketching(model: Path, width: int, dtype: str) -> Recipe:
    """A recipe that sketches for this model, without an audit."""
    recipe = recipe_for(width, dtype)
    return recipe.model_copy(
        update={
            # float32: of the processors here some multiply bfloat16 natively and some forty times slower.
            "model": recipe.model.model_copy(update={"name": str(model), "dtype": "float32"}),
            "sketch": recipe.sketch.model_copy(update={"audit_pairs": 0}),
        }
    )


def rate(paths: list[str]) -> float:
    """Rows per second while parts are written, without the start of the workers: the slope of rows over time."""
    written = sorted((Path(path).stat().st_mtime, pq.read_metadata(path).num_rows) for path in paths)
    times, counts = zip(*written, strict=True)
    return float(np.polyfit(np.array(times) - times[0], np.cumsum(counts), 1)[0])


def tiny_model(folder: Path, hidden: int = 64, layers: int = 2) -> Path:
    """A Llama with random weights and a tokenizer trained on the benchmark's text."""
    from small_llama import Shape, save_random

    where = folder / f"model-{hidden}-{layers}"
    if not where.exists():
        shape = Shape(hidden_size=hidden, layers=layers, intermediate_size=3 * hidden, heads=4, key_value_heads=2)
        save_random(where, shape, [_TEXT])
    return where


if __name__ == "__main__":
    main()
