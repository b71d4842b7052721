"""select: the multilingual direction from the sketches, every pair's agreement with it, and what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from congrad_ray.rundir import Folder, RunDirectoryError
from congrad_ray.stages.base import Context, Outcome, Stage
from congrad_ray.surgery.directions import pcgrad
from congrad_ray.surgery.keep import keep_top_fraction
from congrad_ray.surgery.scores import (
    cosine_matrix,
    own_language_cosine,
    pair_scores,
    projected_cosine_matrix,
)
from congrad_ray.tables import SCORES, SELECTED, sketch_numbers, table_of

_ROWS_AT_A_TIME = 1024

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Block:
    """Some rows of the sketches table."""

    pair_ids: list[str]
    languages: list[str]
    sketches: Float64Array  # (rows, width)
    norms: Float64Array  # (rows,), those of the pairs' gradients as cosines need them
    coefficients: Float64Array  # (rows,)


def run(context: Context) -> Outcome:
    """Two passes over the sketches: sums per language, then one dot product per pair and language."""
    settings = context.recipe.select
    sketches = context.input("sketches")
    exact = context.recipe.sketch.method == "exact"
    dtype = context.recipe.sketch.stored_dtype
    languages, gradients = language_gradients(sketches, dtype)
    gram = gradients @ gradients.T
    weights = pcgrad(gram, settings.seed)
    position = {language: index for index, language in enumerate(languages)}
    ids: list[str] = []
    of_language: list[str] = []
    dots, norms = [], []
    for block in blocks(sketches, dtype, exact):
        ids += block.pair_ids
        of_language += block.languages
        dots.append(block.sketches @ gradients.T)
        norms.append(block.norms)
    all_dots, all_norms = np.concatenate(dots), np.concatenate(norms)
    index = np.array([position[language] for language in of_language])
    cosine, dot = pair_scores(all_dots, all_norms, gram, weights)
    own = own_language_cosine(all_dots, all_norms, gram, index)
    kept = keep_top_fraction(cosine, of_language, ids, settings.keep)
    order = sorted(range(len(ids)), key=lambda row: ids[row])
    scores = pa.table(
        [
            pa.array([ids[row] for row in order]),
            pa.array([of_language[row] for row in order]),
            pa.array(cosine[order]),
            pa.array(dot[order]),
            pa.array(own[order]),
            pa.array(kept[order]),
        ],
        schema=SCORES,
    )
    context.output.write_table("scores.parquet", scores)
    _write_selected(context, scores)
    _write_direction(context.output, languages, gradients, weights)
    per_language = {
        language: {
            "pairs": int((index == i).sum()),
            "kept": int(kept[index == i].sum()),
            "mean_cosine": float(cosine[index == i].mean()),
            "conflicting": float((cosine[index == i] < 0).mean()),
            "gradient_norm": float(np.sqrt(gram[i, i])),
            "weight": float(weights[i]),
        }
        for i, language in enumerate(languages)
    }
    context.output.write_json(
        "summary.json",
        {
            "languages": languages,
            "keep": settings.keep,
            "seed": settings.seed,
            "width": int(gradients.shape[1]),
            "per_language": per_language,
            "cosine_before": cosine_matrix(gram).tolist(),
            "cosine_after": projected_cosine_matrix(gram, settings.seed).tolist(),
        },
    )
    return Outcome(
        len(ids),
        {
            "kept": int(kept.sum()),
            "kept_by_language": {language: row["kept"] for language, row in per_language.items()},
            "conflicting_share": round(float((cosine < 0).mean()), 4),
        },
    )


def blocks(sketches: Folder, dtype: str, exact: bool = False) -> Iterator[Block]:
    """The sketches table block by block, so that memory does not grow with the number of pairs.

    Norms are those of the sketches, in whose geometry inner products are taken; of `exact` coordinates, which hold
    only the part of a gradient that lies among the languages' gradients, they are the gradients' own.
    """
    for path in sketches.files(".parquet"):
        with sketches.filesystem.open_input_file(path) as file:
            columns = ["pair_id", "language", "sketch", "sketch_scale", "norm", "coefficient"]
            for batch in pq.ParquetFile(file).iter_batches(_ROWS_AT_A_TIME, columns=columns):
                numbers = sketch_numbers(batch, dtype).astype(np.float64)
                yield Block(
                    batch.column("pair_id").to_pylist(),
                    batch.column("language").to_pylist(),
                    numbers,
                    batch.column("norm").to_numpy() if exact else np.linalg.norm(numbers, axis=1),
                    batch.column("coefficient").to_numpy(),
                )


def language_gradients(sketches: Folder, dtype: str) -> tuple[list[str], Float64Array]:
    """The languages, sorted, and the mean of c * sketch(u) over each one's pairs, (languages, width).

    u points where the loss goes down, so these are descent directions; sketches are linear, so the mean of
    sketches is the sketch of the mean. Raises RunDirectoryError when there is no sketch.
    """
    sums: dict[str, Float64Array] = {}
    counts: dict[str, int] = {}
    for block in blocks(sketches, dtype):
        weighted = block.coefficients[:, None] * block.sketches
        languages = np.array(block.languages)
        for language in sorted(set(block.languages)):
            members = languages == language
            sums[language] = sums.get(language, 0.0) + weighted[members].sum(axis=0)
            counts[language] = counts.get(language, 0) + int(members.sum())
    if not sums:
        raise RunDirectoryError(f"no sketches in {sketches.path}: run the sketch stage first")
    names = sorted(sums)
    return names, np.stack([sums[name] / counts[name] for name in names])


def _write_selected(context: Context, scores: pa.Table) -> None:
    score = dict(zip(scores["pair_id"].to_pylist(), scores["cosine"].to_pylist(), strict=True))
    kept = set(scores.filter(scores["kept"])["pair_id"].to_pylist())
    logps = {
        row["pair_id"]: row
        for row in context.input("sketches").read_table(["pair_id", "chosen_logps", "rejected_logps"]).to_pylist()
        if row["pair_id"] in kept
    }
    pairs = context.input("pairs").read_table(["pair_id", "language", "prompt", "chosen", "rejected"])
    rows: list[dict[str, Any]] = [
        {
            **row,
            "ref_chosen_logps": logps[row["pair_id"]]["chosen_logps"],
            "ref_rejected_logps": logps[row["pair_id"]]["rejected_logps"],
            "congrad_score": score[row["pair_id"]],
        }
        for row in pairs.to_pylist()
        if row["pair_id"] in kept
    ]
    rows.sort(key=lambda row: str(row["pair_id"]))
    types = {name: pairs.schema.field(name).type for name in ("prompt", "chosen", "rejected")}
    schema = pa.schema([f.with_type(types.get(f.name, f.type)) for f in SELECTED])
    context.output.write_table("selected.parquet", table_of(rows, schema))


def _write_direction(folder: Folder, languages: list[str], gradients: Float64Array, weights: Float64Array) -> None:
    from safetensors.numpy import save

    tensors = {"direction": weights @ gradients, "language_gradients": gradients, "weights": weights}
    folder.write_bytes("direction.safetensors", save(tensors, metadata={"languages": ",".join(languages)}))


STAGE = Stage(
    name="select",
    folder="selection",
    summary="the de-conflicted direction, every pair's cosine with it, the top fraction per language",
    inputs=lambda iteration: [("pairs", iteration), ("sketches", iteration)],
    settings=lambda recipe, iteration: recipe.select.model_dump(mode="json"),
    run=run,
    uses_ray=False,
)
