"""select: the multilingual direction from the sketches, every pair's agreement with it, and what is kept."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from congrad_ray.config.recipe import Select
from congrad_ray.planning.volume import rows_of
from congrad_ray.rundir.directory import Folder, RunDirectoryError
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.resources import tasks_demand
from congrad_ray.stages.base import Stage
from congrad_ray.stages.select.directions import Float64Array
from congrad_ray.stages.select.estimate import ESTIMATE
from congrad_ray.stages.select.figures import STEP, figures
from congrad_ray.stages.select.keep import keep_above, keep_top_fraction, keep_within_tokens
from congrad_ray.stages.select.reducer import Layout, Rows, Shares, gram_matrices, language_gradients, score_pairs
from congrad_ray.stages.select.schema import SCORES, SELECTED
from congrad_ray.stages.select.scores import (
    Agreement,
    Direction,
    Surgery,
    cosine_matrix,
    cosines_with_direction,
    make_direction,
    projected_cosine_matrix,
)
from congrad_ray.stages.select.shares import mean_shares, moving_average_shares
from congrad_ray.stages.sketch.audit import expected_overlap

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 4096


def run(context: Context) -> Outcome:
    """Two passes over the sketches; here there are only the languages' gradients and a few numbers per pair.

    Raises RunDirectoryError where nothing could be kept, or a setting asks for what is not there.
    """
    settings, sketches = context.recipe.select, context.input("sketches")
    pairs = _pairs(sketches)
    languages = tuple(sorted(pc.unique(pairs["language"]).to_pylist()))
    layout = Layout.of(context.recipe.sketch, languages)
    index = layout.rows_of(pairs)
    counts = np.bincount(index)
    taking_part = included(settings, languages, index)
    shares = _shares(pairs, layout, index, settings)
    gradients = language_gradients(sketches, layout, shares, context.progressed)
    surgery = surgery_of(settings)
    weights = language_weights(settings, languages)
    direction = make_direction(gram_matrices(gradients), surgery, weights, taking_part)
    ids, found = score_pairs(sketches, layout, gradients, direction, surgery.leave_out, shares, context.progressed)
    if not ids.equals(pairs["pair_id"].combine_chunks()):
        raise RunDirectoryError(f"the sketches in {sketches.path} changed while they were read: run select again")
    score = score_of(settings, pairs, found, _reward_gap(context, pairs))
    kept = keep(settings, score, pairs)
    if not kept.any():
        raise RunDirectoryError(
            f"no pair is kept: select.{settings.keep_rule} left none of {len(pairs)}, whose scores go from "
            f"{score.min():.4g} to {score.max():.4g}; lower select.threshold or raise select.token_budget"
        )
    columns = [ids, pairs["language"], pa.array(score), *_agreement_columns(found), pa.array(kept)]
    context.output.write_table("scores.parquet", pa.Table.from_arrays(columns, schema=SCORES))
    _write_selected(context, pairs.append_column("congrad_score", pa.array(score)).filter(pa.array(kept)))
    _write_direction(context.output, languages, gradients, direction)
    per_language = {
        language: {
            "pairs": int(counts[i]),
            "kept": int(kept[index == i].sum()),
            "mean_cosine": float(found.cosine[index == i].mean()),
            "conflicting": float((found.cosine[index == i] < 0).mean()),
            "gradient_norm": float(np.sqrt(direction.whole_gram[i, i])),
            "cosine_with_direction": float(cosine),
            "in_direction": bool(taking_part[i]),
        }
        for i, (language, cosine) in enumerate(zip(languages, cosines_with_direction(direction), strict=True))
    }
    for language, row in per_language.items():
        context.meter.set("congrad_pairs", row["pairs"], language=language)
        context.meter.set("congrad_conflicting_share", row["conflicting"], language=language)
        context.meter.set("congrad_kept_share", row["kept"] / row["pairs"], language=language)
    overlap = _expected_overlap(context, found.cosine, index)
    context.output.write_json(
        "summary.json",
        {
            "expected_overlap": overlap,
            "languages": languages,
            "settings": settings.model_dump(mode="json"),
            "width": int(np.prod(gradients.shape[1:])),
            "per_language": per_language,
            "cosine_before": cosine_matrix(direction.whole_gram).tolist(),
            "cosine_after": projected_cosine_matrix(direction, surgery).tolist(),
        },
    )
    return Outcome(
        len(pairs),
        {
            "kept": int(kept.sum()),
            "expected_overlap": overlap,
            "kept_by_language": {language: row["kept"] for language, row in per_language.items()},
            "conflicting_share": round(float((found.cosine < 0).mean()), 4),
        },
    )


def _expected_overlap(context: Context, cosines: Float64Array, index: NDArray[np.int64]) -> float | None:
    """How far the kept pairs are those that exact gradients would keep, told on the log; None if not known.

    By the error that the sketch stage's audit found, against the spread of the cosines within the languages.
    """
    settings = context.recipe.select
    by_cosine = settings.strategy in ("congrad", "no_surgery") and settings.score == "cosine"
    audit = (context.input("sketches").read_json("summary.json") or {}).get("audit")
    if audit is None or not by_cosine or settings.keep_rule not in ("per_language", "overall"):
        return None
    of_language = index if settings.keep_rule == "per_language" else np.zeros_like(index)
    means = np.bincount(of_language, cosines) / np.maximum(1, np.bincount(of_language))
    spread = float((cosines - means[of_language]).std())
    overlap = round(expected_overlap(audit["error"], spread, settings.keep), 4)
    logger.info(
        f"about {overlap:.0%} of the kept pairs are those that exact gradients would keep: cosines are off by "
        f"{audit['error']:.4f} (audit of the sketches) and spread by {spread:.4f}; a larger sketch.width brings "
        "them nearer"
    )
    return overlap


def surgery_of(settings: Select) -> Surgery:
    """The surgery that the settings ask for; without surgery it is the plain mean."""
    method = "mean" if settings.strategy == "no_surgery" else settings.direction
    return Surgery(method, settings.seed, settings.orders, settings.per_block, settings.leave_out)


def keep(settings: Select, scores: Float64Array, pairs: pa.Table) -> NDArray[np.bool_]:
    """What the keep rule keeps of `pairs` (pair_id, language and the numbers of tokens); a mask (N,)."""
    if settings.strategy == "all":
        return np.ones(len(pairs), dtype=np.bool_)
    ids = pairs["pair_id"].to_pylist()
    match settings.keep_rule:
        case "threshold":
            return keep_above(scores, ids, settings.threshold)
        case "token_budget":
            assert settings.token_budget is not None  # the recipe sees to it
            names = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
            tokens = sum(pairs[name].to_numpy().astype(np.int64) for name in names)
            return keep_within_tokens(scores, ids, tokens, settings.token_budget)
        case "overall":
            return keep_top_fraction(scores, ids, settings.keep)
        case "per_language":
            return keep_top_fraction(scores, ids, settings.keep, pairs["language"].to_pylist())


def read_scores(selection: Folder) -> pa.Table:
    """The scores in the folder of a selection or of `congrad filter`. Raises RunDirectoryError without them."""
    if not selection.exists("scores.parquet"):
        raise RunDirectoryError(
            f"no scores.parquet in {selection.path}: give a selection's folder, such as RUN/iteration-0/selection"
        )
    return selection.read_table(["pair_id", "language", "score", "kept"], "scores.parquet")


def _pairs(sketches: Folder) -> pa.Table:
    """What is known of every pair but its sketch, by id."""
    if not sketches.files(".parquet"):
        raise RunDirectoryError(f"no sketches in {sketches.path}: run the sketch stage first")
    names = ("prompt_tokens", "chosen_tokens", "rejected_tokens", "chosen_logps", "rejected_logps")
    return sketches.read_table(["pair_id", "language", *names]).sort_by("pair_id").combine_chunks()


def included(settings: Select, languages: tuple[str, ...], index: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each language (L,) has pairs enough to take part in the direction; `index` as in `pair_shares`.

    Raises RunDirectoryError where none has.
    """
    counts, least = np.bincount(index, minlength=len(languages)), settings.min_pairs
    enough = counts >= least
    few = ", ".join(f"{languages[i]} ({counts[i]})" for i in np.flatnonzero(~enough))
    if not enough.any():
        raise RunDirectoryError(
            f"no language has select.min_pairs ({least}) pairs: {few}. Lower it, or give more prompts."
        )
    if few:
        logger.info(f"not in the direction, with fewer than select.min_pairs ({least}) pairs: {few}; still scored")
    return enough


def language_weights(settings: Select, languages: tuple[str, ...]) -> Float64Array:
    """The weight (L,) of each language. Raises RunDirectoryError for a weight of a language that has no pairs."""
    unknown = sorted(set(settings.language_weights) - set(languages))
    if unknown:
        raise RunDirectoryError(
            f"select.language_weights names {', '.join(unknown)}; the pairs are in {', '.join(languages)}"
        )
    return np.array([settings.language_weights.get(language, 1.0) for language in languages])


def pair_shares(index: NDArray[np.int64], settings: Select) -> Float64Array:
    """Each pair's share in its language's gradient, (N,); `index` (N,) is the language of each pair, by id."""
    shares = np.empty(len(index))
    for language, count in enumerate(np.bincount(index).tolist()):
        shares[index == language] = (
            mean_shares(count)
            if settings.language_gradient == "mean"
            else moving_average_shares(count, settings.ema_decay, settings.ema_batch_size, settings.seed)
        )
    return shares


def _shares(pairs: pa.Table, layout: Layout, index: NDArray[np.int64], settings: Select) -> Shares:
    """How a task finds the shares of the pairs that it reads."""
    shares = pair_shares(index, settings)
    if settings.language_gradient == "mean":  # the same for all pairs of a language: no need to look for each
        by_language = np.zeros(len(layout.languages))
        by_language[index] = shares
        return lambda batch: by_language[layout.rows_of(batch)]
    import ray

    known = ray.put((pairs["pair_id"].combine_chunks(), shares))

    def look_up(batch: Rows) -> Float64Array:
        ids, values = ray.get(known)
        return np.asarray(values[pc.index_in(batch["pair_id"], value_set=ids).to_numpy()])

    return look_up


def score_of(settings: Select, pairs: pa.Table, found: Agreement, gap: Float64Array | None) -> Float64Array:
    """The numbers (N,) that the keep rule goes by, higher is better; `pairs` as in `keep`.

    Raises RunDirectoryError where the strategy needs the judge's scores and there are none.
    """
    match settings.strategy:
        case "random":
            return np.random.default_rng(settings.seed).random(len(pairs))
        case "own_language":
            return found.own_cosine
        case "length_balanced":
            lengths = [pairs[name].to_numpy().astype(np.float64) for name in ("chosen_tokens", "rejected_tokens")]
            return -np.abs(lengths[0] - lengths[1]) / (lengths[0] + lengths[1])
        case "reward_gap":
            if gap is None:
                raise RunDirectoryError("select.strategy 'reward_gap' needs pairs with a judge's scores")
            return gap
        case "no_surgery":
            return found.cosine
    return np.asarray(getattr(found, settings.score))


def _reward_gap(context: Context, pairs: pa.Table) -> Float64Array | None:
    """The difference of the judge's scores (N,), where the strategy needs it and the pairs have them."""
    source = context.input("pairs")
    names = ("chosen_score", "rejected_score")
    schema = pq.read_schema(source.files(".parquet")[0], filesystem=source.filesystem)
    if context.recipe.select.strategy != "reward_gap" or not set(names) <= set(schema.names):
        return None
    table = source.read_table(["pair_id", *names])
    return reward_gap(table.take(pc.index_in(pairs["pair_id"], value_set=table["pair_id"].combine_chunks())))


def reward_gap(pairs: pa.Table) -> Float64Array:
    """The difference of the judge's scores, (N,)."""
    return (pairs["chosen_score"].to_numpy() - pairs["rejected_score"].to_numpy()).astype(np.float64)


def _agreement_columns(found: Agreement) -> list[pa.Array]:
    return [pa.array(getattr(found, name)) for name in ("cosine", "dot", "worst_cosine", "own_cosine")]


def _write_selected(context: Context, kept: pa.Table) -> None:
    """The kept pairs with their texts, in the order of the pairs table, a piece of it at a time."""
    source = context.input("pairs")
    texts = pq.read_schema(source.files(".parquet")[0], filesystem=source.filesystem)
    names = ["pair_id", "language", "prompt", "chosen", "rejected"]
    types = {name: texts.field(name).type for name in names}
    schema = pa.schema([f.with_type(types.get(f.name, f.type)) for f in SELECTED])
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
                    }
                    writer.write_table(pa.Table.from_arrays([columns[n] for n in schema.names], schema=schema))


def _write_direction(
    folder: Folder, languages: tuple[str, ...], gradients: NDArray[np.float32], direction: Direction
) -> None:
    from safetensors.numpy import save

    tensors = {
        "direction": np.einsum("lbk,kbi->lbi", direction.weights, gradients).astype(np.float32),
        "language_gradients": gradients,
        "weights": direction.weights,
    }
    folder.write_bytes("direction.safetensors", save(tensors, metadata={"languages": ",".join(languages)}))


STAGE = Stage(
    name="select",
    folder="selection",
    summary="Keep the pairs that agree with the languages' common direction",
    example="select.direction=mean",
    inputs=lambda iteration: [("pairs", iteration), ("sketches", iteration)],
    settings=lambda recipe, iteration: recipe.select.model_dump(mode="json"),
    run=run,
    demand=lambda recipe, profile: tasks_demand("select", rows_of(recipe).training, profile),
    schema=lambda recipe: SCORES,
    estimate=ESTIMATE,
    figures=figures,
    step=STEP,
)
