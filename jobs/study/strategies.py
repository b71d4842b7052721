"""What every strategy of the study keeps of one prepared set of pairs, and how good that is by the truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from congrad_ray.config.recipe import Recipe, Select
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.select.gram import Float64Array
from congrad_ray.stages.select.keep import keep_pairs
from congrad_ray.stages.select.selection import Selection, select_pairs
from congrad_ray.stages.sketch.audit import rank_correlation
from congrad_ray.world.score import true_score
from study.protocol import Oracle


@dataclass(frozen=True)
class Prepared:
    """The pairs of one seed and variant with their sketches, by id, and the true scores of their responses."""

    pairs: pa.Table  # PAIRS and the columns of the sketches table
    chosen: Float64Array  # (N,) true score in 0..1
    rejected: Float64Array  # (N,)


@dataclass(frozen=True)
class Choice:
    """A strategy's scores and what it keeps, (N,) each in the order of `Prepared`."""

    scores: Float64Array
    kept: NDArray[np.bool_]
    selection: Selection | None = None
    """None of an oracle, which has no direction."""


def prepared(run: RunDirectory, max_pairs: Mapping[str, int]) -> Prepared:
    """The pairs and sketches in a run directory; of a language in `max_pairs` only its first pairs by id."""
    sketches = run.stage("sketches", 0).read_table().sort_by("pair_id").combine_chunks()
    rank: dict[str, int] = {}
    wanted = []
    for language in sketches["language"].to_pylist():
        rank[language] = rank.get(language, 0) + 1
        wanted.append(rank[language] <= max_pairs.get(language, len(sketches)))
    sketches = sketches.filter(pa.array(wanted))
    texts = run.stage("pairs", 0).read_table().combine_chunks()
    texts = texts.take(pc.index_in(sketches["pair_id"], value_set=texts["pair_id"].combine_chunks()))
    for name in sketches.schema.names:
        if name not in texts.schema.names:
            texts = texts.append_column(sketches.schema.field(name), sketches[name])
    prompts = run.stage("prompts", None).read_table(["prompt_id", "task"])
    tasks = dict(zip(prompts["prompt_id"].to_pylist(), prompts["task"].to_pylist(), strict=True))
    scores = {
        side: np.array(
            [
                true_score(tasks[row["prompt_id"]], row["language"], row[side][0]["content"])
                for row in texts.select(["prompt_id", "language", side]).to_pylist()
            ]
        )
        for side in ("chosen", "rejected")
    }
    return Prepared(texts.combine_chunks(), scores["chosen"], scores["rejected"])


def select(data: Prepared, recipe: Recipe, strategy: Select | Oracle, keep_fraction: float) -> Choice:
    """What `strategy` keeps; the oracle goes by the true margin."""
    if isinstance(strategy, str):
        scores = data.chosen - data.rejected
        rule: Literal["overall", "per_language"] = "overall" if strategy == "oracle_overall" else "per_language"
        return Choice(scores, keep_pairs(Select(keep=keep_fraction, keep_rule=rule), scores, data.pairs))
    settings = strategy.model_copy(update={"keep": keep_fraction})
    selection = select_pairs(settings, data.pairs, recipe.sketch)
    return Choice(selection.scores["score"].to_numpy(), selection.kept, selection)


def against_exact(sketched: Choice, exact: Choice) -> dict[str, float]:
    """A strategy's selection from sketches against its selection from exact gradients of the same pairs."""
    assert sketched.selection is not None and exact.selection is not None
    common = (sketched.kept & exact.kept).sum() / max(1, exact.kept.sum())
    return {
        "rank_correlation": rank_correlation(sketched.scores, exact.scores),
        "kept_in_common": float(common),
        "error": float(np.sqrt(np.mean((sketched.selection.cosine - exact.selection.cosine) ** 2))),
    }


def facts(data: Prepared, choice: Choice, biased: frozenset[str], ranked: bool) -> dict[str, Any]:
    """What can be said of a selection without training; languages of a biased judge are counted apart.

    A pair is truly better where the chosen response has the higher true score. `auc` is the probability that a
    truly better pair has a higher score than one that is truly worse, ties counting half; None unless the strategy
    has `ranked` the pairs and there are both.
    """
    margin, selection = data.chosen - data.rejected, choice.selection
    is_biased = np.isin(np.array(data.pairs["language"].to_pylist()), sorted(biased))
    everyone = np.ones(len(margin), dtype=np.bool_)
    groups = {"auc": everyone, "auc_biased": is_biased, "auc_healthy": ~is_biased if biased else ~everyone}
    found: dict[str, Any] = {
        "pairs": len(margin),
        "kept": int(choice.kept.sum()),
        "better_all": float((margin > 0).mean()),
        "better_kept": float((margin[choice.kept] > 0).mean()) if choice.kept.any() else None,
        **{
            name: area_under_curve(choice.scores[group & (margin > 0)], choice.scores[group & (margin < 0)])
            if ranked
            else None
            for name, group in groups.items()
        },
        "conflicting_pairs": None if selection is None else selection.conflicting,
    }
    matrices = (None, None) if selection is None else (selection.cosine_before, selection.cosine_after)
    for name, matrix in zip(("before", "after"), matrices, strict=True):
        between = matrix[np.triu_indices(len(matrix), 1)] if matrix is not None and len(matrix) > 1 else None
        found[f"cosine_{name}"] = None if between is None else float(between.mean())
        found[f"negative_{name}"] = None if between is None else float((between < 0).mean())
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in found.items()}


def area_under_curve(higher: Float64Array, lower: Float64Array) -> float | None:
    """The probability that a number of `higher` exceeds one of `lower`, ties counting half; None without both.

    It is the Mann-Whitney statistic of the two, as a share of all pairs of numbers.
    """
    if not len(higher) or not len(lower):
        return None
    from scipy.stats import mannwhitneyu

    statistic = mannwhitneyu(higher, lower, method="asymptotic").statistic
    return float(statistic / (len(higher) * len(lower)))
