"""select: the multilingual direction from the sketches, every pair's agreement with it, and what is kept."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from congrad_ray.config.names import JUDGED, LEAST_MARGIN
from congrad_ray.config.recipe import Recipe, Select
from congrad_ray.planning.volume import rows_of
from congrad_ray.rundir.directory import Folder, RunDirectoryError
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.resources import tasks_demand
from congrad_ray.stages.base import Stage
from congrad_ray.stages.judge.combine import COLUMNS, agreement_weights, disagreement_settings, scores_of
from congrad_ray.stages.select.estimate import ESTIMATE
from congrad_ray.stages.select.figures import STEP, figures
from congrad_ray.stages.select.gram import Float64Array
from congrad_ray.stages.select.schema import SCORES, SELECTED, TOKENS
from congrad_ray.stages.select.scores import needed_columns
from congrad_ray.stages.select.selection import Selection, languages_of, overlap_with_exact, select_from
from congrad_ray.stages.select.shares import pair_shares
from congrad_ray.stages.select.streaming import StreamedSketches
from congrad_ray.stages.select.sums import Layout

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 4096


def run(context: Context) -> Outcome:
    """Selects from the sketches where they lie; here there are only a few numbers per pair.

    Raises SelectionError where nothing could be kept or a setting asks for what is not there, and
    RunDirectoryError where there are no sketches.
    """
    folder = context.input("sketches")
    pairs = _pairs(context)
    settings = _weighted(context, set(pc.unique(pairs["language"]).to_pylist()))
    layout = Layout.of(context.recipe.sketch, languages_of(pairs))
    shares = pair_shares(settings, layout.rows_of(pairs))
    selection = select_from(settings, pairs, StreamedSketches(folder, layout, pairs, shares, context.progressed))
    overlap = _overlap(context, selection)
    context.output.write_table("scores.parquet", selection.scores)
    scored = pairs.append_column("congrad_score", selection.scores["score"])
    _write_selected(context, scored.filter(pa.array(selection.kept)))
    _write_direction(context.output, selection)
    context.output.write_json("summary.json", {"expected_overlap": overlap, **selection.summary()})
    _report(context, selection)
    return Outcome(
        len(pairs),
        {
            "kept": int(selection.kept.sum()),
            "expected_overlap": overlap,
            "kept_by_language": {row.language: row.kept for row in selection.languages},
            "conflicting_share": round(selection.conflicting, 4),
        },
    )


def _weighted(context: Context, languages: set[str]) -> Select:
    """The settings, with less weight for the gradients of languages whose judges disagree, where it is asked."""
    select, judge = context.recipe.select, context.recipe.judge
    if judge.disagreement != "weight":
        return select
    manifest = context.input("judgements").manifest()
    agreement = manifest.counters.get("agreement", {}) if manifest else {}
    weights = dict(select.language_weights)
    for language, weight in agreement_weights(agreement, judge.min_agreement).items():
        if language in languages:
            weights[language] = weights.get(language, 1.0) * weight
            logger.info(f"{language}: the judges disagree, so its gradient counts {weights[language]:.2f}")
    return select.model_copy(update={"language_weights": weights})


def read_scores(selection: Folder) -> pa.Table:
    """The scores in the folder of a selection or of `congrad filter`. Raises RunDirectoryError without them."""
    if not selection.exists("scores.parquet"):
        raise RunDirectoryError(
            f"no scores.parquet in {selection.path}: give a selection's folder, such as RUN/iteration-0/selection"
        )
    return selection.read_table(["pair_id", "language", "score", "kept"], "scores.parquet")


def _pairs(context: Context) -> pa.Table:
    """What a selection needs to know of every pair but its sketch, sorted by pair_id."""
    sketches = context.input("sketches")
    if not sketches.files(".parquet"):
        raise RunDirectoryError(f"no sketches in {sketches.path}: run the sketch stage first")
    names = ("prompt_tokens", "chosen_tokens", "rejected_tokens", "chosen_logps", "rejected_logps")
    pairs = sketches.read_table(["pair_id", "language", *names]).sort_by("pair_id").combine_chunks()
    if context.recipe.select.strategy == "judge_agreement":
        pairs = pairs.append_column(LEAST_MARGIN, pa.array(_least_margins(context, pairs)))
    if set(JUDGED) & set(needed_columns(context.recipe.select)):
        source = context.input("pairs")
        schema = pq.read_schema(source.files(".parquet")[0], filesystem=source.filesystem)
        judged = source.read_table(["pair_id", *(name for name in JUDGED if name in schema.names)])
        row = pc.index_in(pairs["pair_id"], value_set=judged["pair_id"].combine_chunks())
        for name in judged.column_names[1:]:
            pairs = pairs.append_column(name, judged[name].take(row))
    return pairs


def _least_margins(context: Context, pairs: pa.Table) -> Float64Array:
    """Of the judges' standardised margins of each pair the least, (N,); 0 for one that could not read both."""
    source, judgements = context.input("pairs"), context.input("judgements")
    samples = Folder(judgements.filesystem, f"{judgements.path}/samples")
    scores = scores_of(samples.read_table([*COLUMNS]), list(context.recipe.judge.judges))
    known = pa.array(scores.response_ids, pa.string())
    names = ("chosen_response_id", "rejected_response_id")
    ids = source.read_table(["pair_id", *names]).combine_chunks()
    ids = ids.take(pc.index_in(pairs["pair_id"], value_set=ids["pair_id"].combine_chunks()))
    values = scores.standardised()
    chosen, rejected = (values[pc.index_in(ids[name], value_set=known).to_numpy()] for name in names)
    return np.nan_to_num(chosen - rejected, nan=0.0).min(axis=1)


def _overlap(context: Context, selection: Selection) -> float | None:
    """How far the kept pairs are those that exact gradients would keep, by the audit of the sketches.

    It is reported on the log; None where it is not known.
    """
    audit = (context.input("sketches").read_json("summary.json") or {}).get("audit")
    if audit is None:
        return None
    error = audit["error"]
    found = overlap_with_exact(selection, error)
    if found is None:
        return None
    overlap, spread = round(found[0], 4), found[1]
    logger.info(
        f"about {overlap:.0%} of the kept pairs are those that exact gradients would keep: cosines are off by "
        f"{error:.4f} (audit of the sketches) and spread by {spread:.4f}; a larger sketch.width brings them closer"
    )
    return overlap


def _report(context: Context, selection: Selection) -> None:
    """Languages that take no part and the spread over orders, on the log, and every language's metrics."""
    few = ", ".join(f"{row.language} ({row.pairs})" for row in selection.languages if not row.in_direction)
    if few:
        minimum = selection.settings.min_pairs
        logger.info(
            f"languages with fewer than select.min_pairs ({minimum}) pairs take no part in the direction; their "
            f"pairs are scored: {few}"
        )
    if selection.order_spread is not None:
        way_out = "" if selection.order_spread.negligible else "; select.orders averages over more of them"
        logger.info(f"{selection.order_spread}{way_out}")
    for row in selection.languages:
        context.meter.set("congrad_pairs", row.pairs, language=row.language)
        context.meter.set("congrad_conflicting_share", row.conflicting, language=row.language)
        context.meter.set("congrad_kept_share", row.kept / row.pairs, language=row.language)


def _write_selected(context: Context, kept: pa.Table) -> None:
    """The kept pairs with their texts, in the order of the pairs table, a piece of it at a time."""
    source = context.input("pairs")
    texts = pq.read_schema(source.files(".parquet")[0], filesystem=source.filesystem)
    own = ("pair_id", "language", "prompt", "chosen", "rejected", *JUDGED)
    names = [name for name in own if name in texts.names]
    types = {name: texts.field(name).type for name in names}
    schema = pa.schema([f.with_type(types.get(f.name, f.type)) for f in SELECTED])
    unknown = {name: SELECTED.field(name).type for name in JUDGED if name not in names}
    kept_ids = kept["pair_id"].combine_chunks()
    with (
        context.output.output_stream("selected.parquet") as sink,
        pq.ParquetWriter(sink, schema, compression="zstd") as writer,
    ):
        for path in source.files(".parquet"):
            with source.filesystem.open_input_file(path) as file:
                for batch in pq.ParquetFile(file).iter_batches(_ROWS_AT_A_TIME, columns=names):
                    row = pc.index_in(batch["pair_id"], value_set=kept_ids)
                    here = pa.Table.from_batches([batch]).filter(row.is_valid())
                    of_pair = kept.take(row.drop_null())
                    columns = {
                        **{name: here[name] for name in names},
                        "ref_chosen_logps": of_pair["chosen_logps"],
                        "ref_rejected_logps": of_pair["rejected_logps"],
                        "congrad_score": of_pair["congrad_score"],
                        **{name: of_pair[name] for name in TOKENS},
                    }
                    columns.update((n, pa.nulls(len(here), unknown[n])) for n in unknown)
                    writer.write_table(pa.Table.from_arrays([columns[n] for n in schema.names], schema=schema))


def _write_direction(folder: Folder, selection: Selection) -> None:
    from safetensors.numpy import save

    tensors: dict[str, NDArray[Any]] = {
        "direction": selection.direction,
        "language_gradients": selection.gradients,
        "weights": selection.weights,
    }
    languages = ",".join(row.language for row in selection.languages)
    folder.write_bytes("direction.safetensors", save(tensors, metadata={"languages": languages}))


def _settings(recipe: Recipe, iteration: int) -> Any:
    select = recipe.select.model_dump(mode="json")
    more = disagreement_settings(recipe.judge, "weight")
    return [select, *more] if more else select


STAGE = Stage(
    name="select",
    folder="selection",
    summary="Keep the pairs that agree with the languages' common direction",
    example="select.direction=mean",
    inputs=lambda iteration: [("pairs", iteration), ("sketches", iteration)],
    settings=_settings,
    run=run,
    demand=lambda recipe, profile: tasks_demand("select", rows_of(recipe).training, profile),
    schema=lambda recipe: SCORES,
    estimate=ESTIMATE,
    figures=figures,
    step=STEP,
)
