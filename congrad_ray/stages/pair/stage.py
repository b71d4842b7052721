"""pair: the best against the worst response of every prompt, as TRL preference rows.

Prompts go by their ids into buckets of about equal size, and each bucket's pairs are one Parquet part, in the
order of the ids. A Ray Data pipeline brings a bucket's responses and judgements together; where one bucket holds
all, they are read here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from congrad_ray.config.recipe import Recipe
from congrad_ray.data.records import InputError
from congrad_ray.planning.volume import rows_of
from congrad_ray.rundir.directory import Folder, RunDirectoryError, StageFolder, each
from congrad_ray.rundir.ids import keys_of
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.resources import tasks_demand
from congrad_ray.stages.base import Stage
from congrad_ray.stages.generate.schema import RESPONSES
from congrad_ray.stages.judge.combine import disagreeing, disagreement_settings
from congrad_ray.stages.judge.schema import JUDGEMENTS
from congrad_ray.stages.pair.estimate import ESTIMATE
from congrad_ray.stages.pair.pairing import RESPONSE_COLUMNS, Counts, pair_responses
from congrad_ray.stages.pair.schema import PAIRS
from congrad_ray.stages.view import Step, rows_by_language

logger = logging.getLogger(__name__)

# Of responses, whichever is reached first. A task holds a bucket several times.
_ROWS_PER_BUCKET = 2**16
_BYTES_PER_BUCKET = 2**26
# Ray spreads buckets by a hash of its own: with so many places for each, few tasks get several.
_PLACES_PER_BUCKET = 4
# From so many buckets on, 2 GiB, tasks send each other rows by way of their nodes' disks.
_BY_DISK = 32
_READ = {"responses": RESPONSE_COLUMNS, "judgements": ["response_id", "prompt_id", "score"]}
# What the pipeline moves: rows of responses, without a score, and of judgements, with nothing but one.
_MOVED = pa.schema(
    [
        pa.field("bucket", pa.int32()),
        *(RESPONSES.field(name).with_nullable(True) for name in RESPONSE_COLUMNS),
        JUDGEMENTS.field("score"),
    ]
)
_COUNTS = b"congrad_counts"  # in a part's metadata: what became of the prompts of its bucket


def run(context: Context) -> Outcome:
    """Joins responses and judgements by id and pairs them prompt by prompt; buckets that are there are kept.

    Raises InputError where there is not one pair, and RunDirectoryError where there are no responses.
    """
    responses, output = context.input("responses"), context.output
    rows, number = _rows_and_buckets(responses)
    parts = [f"pairs-{bucket:05}-of-{number:05}.parquet" for bucket in range(number)]
    there = {path.rsplit("/", 1)[1] for path in output.parts()}
    for name in there - set(parts):  # by another version
        output.filesystem.delete_file(f"{output.path}/{name}")
    missing = [bucket for bucket, name in enumerate(parts) if name not in there]
    if context.recipe.pair.language_check and missing:
        logger.info("identifying the languages of the responses")
    if missing and number == 1:
        scores = context.input("judgements").read_table(["response_id", "score"])
        _pair_bucket(
            responses.read_table(RESPONSE_COLUMNS),
            scores,
            context.recipe,
            context.iteration,
            output,
            parts[0],
            context.progressed,
            _left_out(context),
        )
    elif missing:
        _pair_on_ray(context, parts, missing)
    counts = _counts(output)
    if counts.responses != rows:
        raise RuntimeError(f"{counts.responses} of {rows} responses were looked at: report this as a bug")
    pairs = counts.pairs.total()
    if not pairs:
        for name in parts:
            output.filesystem.delete_file(f"{output.path}/{name}")
        raise InputError(
            f"not one pair from {counts.prompts} prompts ({dict(counts.no_pair)}): look at the judgements in "
            f"{context.input('judgements').path}, or raise generate.num_generations or generate.temperature"
        )
    return Outcome(
        pairs,
        {
            "pairs": dict(sorted(counts.pairs.items())),
            "no_pair": dict(sorted(counts.no_pair.items())),
            "wrong_language": dict(sorted(counts.wrong_language.items())),
            "unknown_language": dict(sorted(counts.unknown_language.items())),
        },
    )


def _rows_and_buckets(responses: StageFolder) -> tuple[int, int]:
    """How many responses and buckets there are: by the responses alone, so a resumed stage finds its parts."""

    def size(path: str) -> tuple[int, int]:
        with responses.open_parquet(path) as file:
            groups = (file.metadata.row_group(group) for group in range(file.num_row_groups))
            return file.metadata.num_rows, sum(group.total_byte_size for group in groups)

    paths = responses.files(".parquet")
    if not paths:
        raise RunDirectoryError(f"no Parquet file in {responses.path}")
    rows, bytes_ = (sum(sizes) for sizes in zip(*each(size, paths), strict=True))
    return rows, max(1, -(-rows // _ROWS_PER_BUCKET), -(-bytes_ // _BYTES_PER_BUCKET))


def _bucket_of(prompt_ids: pa.ChunkedArray, number: int) -> NDArray[np.int32]:
    """The bucket (N,) of each prompt: equal ranges of the ids, which are hashes, in their order."""
    first = keys_of(prompt_ids).view(np.uint8).reshape(-1, 16)[:, :4].copy().view(">u4")[:, 0]
    return ((first.astype(np.uint64) * number) >> np.uint64(32)).astype(np.int32)


def _pair_on_ray(context: Context, parts: Sequence[str], missing: Sequence[int]) -> None:
    """Writes the parts of these buckets. Raises RuntimeError where a bucket did not come whole."""
    import ray

    number, wanted = len(parts), np.array(missing, np.int32)
    recipe, iteration, output = context.recipe, context.iteration, context.output
    left_out = _left_out(context)

    folders = {name: context.input(name) for name in _READ}

    def read(files: dict[str, NDArray[Any]]) -> Iterator[pa.Table]:
        for name, path in zip(files["folder"], files["path"], strict=True):
            yield _moved(folders[name].read_parquet(str(path), _READ[name]), number, wanted)

    def pair(rows: pa.Table) -> pa.Table:
        buckets = pc.unique(rows["bucket"])
        for bucket in buckets.to_pylist():
            of_bucket = rows.filter(pc.equal(rows["bucket"], bucket))
            is_response = of_bucket["prompt"].is_valid()
            scores = of_bucket.filter(pc.invert(is_response))
            _pair_bucket(
                of_bucket.filter(is_response), scores, recipe, iteration, output, parts[bucket], left_out=left_out
            )
        return pa.table({"bucket": buckets})

    files = [{"folder": name, "path": path} for name in _READ for path in folders[name].files(".parquet")]
    rows = ray.data.from_items(
        files, override_num_blocks=min(len(files), _PLACES_PER_BUCKET * number)
    ).map_batches(read, batch_format="numpy", batch_size=None)
    rows.context.use_disk_based_hash_shuffle = number > _BY_DISK
    rows.context.shuffle_input_batch_bytes = _BYTES_PER_BUCKET  # for a task, which holds it several times
    paired = rows.repartition(_PLACES_PER_BUCKET * number, keys=["bucket"]).map_batches(
        pair, batch_format="pyarrow", batch_size=None
    )
    done = []
    for row in paired.iter_rows():
        done.append(row["bucket"])
        context.progressed()
    if len(set(done)) != len(done):
        raise RuntimeError(f"a bucket went to several tasks ({sorted(done)}): report this as a bug")
    for bucket in set(missing) - set(done):  # no prompt lies in it
        nothing = RESPONSES.empty_table(), JUDGEMENTS.empty_table()
        _pair_bucket(*nothing, recipe, iteration, output, parts[bucket])


def _moved(rows: pa.Table, number: int, wanted: NDArray[np.int32]) -> pa.Table:
    """Rows of responses or judgements with their bucket of so many (_MOVED), of the buckets that are wanted."""
    buckets = _bucket_of(rows["prompt_id"], number)
    columns = {**{name: rows[name] for name in rows.column_names}, "bucket": pa.array(buckets)}
    table = pa.table([columns.get(f.name, pa.nulls(len(rows), f.type)) for f in _MOVED], schema=_MOVED)
    return table.filter(pa.array(np.isin(buckets, wanted)))


def _pair_bucket(
    responses: pa.Table,
    scores: pa.Table,
    recipe: Recipe,
    iteration: int,
    output: Folder,
    name: str,
    progressed: Callable[[], None] = lambda: None,
    left_out: Collection[str] = (),
) -> None:
    """Writes the pairs of these responses as one part, with what became of the prompts in its metadata."""
    table, counts = pair_responses(
        responses, scores, recipe.pair, recipe.prompts.languages, iteration, progressed, left_out
    )
    schema = PAIRS.with_metadata({_COUNTS: counts.to_json()})
    with (
        output.output_stream(name) as sink,
        pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=1024)


def _counts(output: Folder) -> Counts:
    """The sum of what the parts say of their buckets."""

    def of_part(path: str) -> Counts:
        with output.open_parquet(path) as file:
            return Counts.from_json(file.schema_arrow.metadata[_COUNTS])

    total = Counts()
    for counts in each(of_part, output.files(".parquet")):
        total.add(counts)
    return total


def _left_out(context: Context) -> frozenset[str]:
    """Languages whose judges disagree, where the recipe leaves these out."""
    judge, manifest = context.recipe.judge, context.input("judgements").manifest()
    if judge.disagreement != "leave_out" or manifest is None:
        return frozenset()
    return frozenset(disagreeing(manifest.counters.get("agreement", {}), judge.min_agreement))


def _settings(recipe: Recipe, iteration: int) -> Any:
    return [
        recipe.pair.model_dump(mode="json"),
        recipe.prompts.languages if recipe.pair.language_check else [],
        *disagreement_settings(recipe.judge, "leave_out"),
    ]


STAGE = Stage(
    name="pair",
    folder="pairs",
    summary="Pair the best with the worst response of every prompt",
    example="pair.min_margin=0.5",
    inputs=lambda iteration: [("responses", iteration), ("judgements", iteration)],
    settings=_settings,
    run=run,
    demand=lambda recipe, profile: tasks_demand("pair", rows_of(recipe).training, profile),
    schema=lambda recipe: PAIRS,
    estimate=ESTIMATE,
    step=Step("pairs", "pairs", "of prompts", rows_by_language, "prompts"),
)
