"""What a selection did to the pairs: scores by language, why pairs were dropped, what those have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from congrad_ray.config.names import JUDGED
from congrad_ray.config.recipe import Select
from congrad_ray.rundir.directory import Folder
from congrad_ray.stages.evaluate.statistics import EVERY_LANGUAGE
from congrad_ray.stages.report.intervals import Separation, separation
from congrad_ray.stages.select.compare import Overlap, overlaps
from congrad_ray.stages.select.keep import TOKENS, keep_pairs
from congrad_ray.stages.select.scores import Agreement, needed_columns, score_of

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

FATES = ("kept", "quota", "conflict")
"""Kept; dropped with a score of 0 or more, to a quota; dropped with a score below 0, as it conflicts."""

_BINS = 24
_SCORES_OF_AGREEMENT = ("congrad", "all", "no_surgery", "own_language")
# Strategies whose selection of the same pairs is known without their sketches.
_BASELINES = ("own_language", "reward_gap", "length_balanced", "length_gap", "random")


@dataclass(frozen=True)
class LanguageScores:
    """One language's pairs, or all ('*'), by what became of them."""

    language: str
    pairs: int
    kept: int
    quota: int
    conflict: int
    kept_in_conflict: int
    """Kept though their score is below 0."""
    opposing: int | None
    """Pairs with a negative cosine with at least one language's gradient; None where it is not known."""
    threshold: float | None
    """The lowest score that was kept; None where none was."""
    mean: float
    """Of the scores."""
    bins: Mapping[str, list[int]]
    """By fate the counts between the `edges` of the selection."""


@dataclass(frozen=True)
class Trait:
    """How a measure of the dropped pairs compares with that of the kept ones."""

    measure: str
    mean: Mapping[str, float | None]
    """By fate."""
    found: Separation


@dataclass(frozen=True)
class Scored:
    """The pairs of a selection, all arrays (N,) sorted by pair_id."""

    table: pa.Table
    """scores.parquet, with JUDGED and TOKENS where they are known."""
    settings: Select
    name: str
    """What `score` is: 'cosine', 'dot', ..., or a strategy."""

    @cached_property
    def languages(self) -> NDArray[np.str_]:
        return np.asarray(self.table["language"].to_pylist(), dtype=np.str_)

    @cached_property
    def score(self) -> Floats:
        return self.column("score" if "score" in self.table.column_names else "cosine")

    @cached_property
    def agreement(self) -> Floats:
        """What is below 0 where a pair conflicts: the score, or the cosine where scores are of something else."""
        return self.score if self.settings.strategy in _SCORES_OF_AGREEMENT else self.column("cosine")

    @cached_property
    def kept(self) -> Bools:
        return np.asarray(self.table["kept"].to_numpy(zero_copy_only=False), dtype=np.bool_)

    @cached_property
    def fate(self) -> NDArray[np.str_]:
        """What became of each pair: one of FATES."""
        return np.where(self.kept, "kept", np.where(self.agreement < 0, "conflict", "quota"))

    def column(self, name: str) -> Floats:
        return np.asarray(self.table[name].to_numpy(zero_copy_only=False), dtype=np.float64)

    def has(self, *names: str) -> bool:
        return all(name in self.table.column_names for name in names)


@dataclass(frozen=True)
class SelectionFacts:
    """A selection, with what scores.parquet and the summaries know of it."""

    summary: Mapping[str, Any]
    score: str
    edges: list[float]
    """Of the bins of scores, the same for all languages."""
    languages: list[LanguageScores]
    """Sorted; then all of them, '*'."""
    traits: list[Trait]
    agreement: list[tuple[str, Overlap]]
    """This selection against those that other strategies make of the same pairs, over all languages."""
    audit: Mapping[str, Any] | None
    """Of the sketches: error, largest_error, rank_correlation of cosines, and `pairs`."""

    @property
    def all(self) -> LanguageScores:
        return self.languages[-1]

    @property
    def surgery_changed(self) -> bool:
        """Whether the cosines between languages are others after the surgery, to two digits."""
        before, after = (np.asarray(self.summary[f"cosine_{when}"]) for when in ("before", "after"))
        return bool((np.abs(before - after) > 0.005).any())


def read_scored(selection: Folder, pairs: Folder, sketches: Folder) -> Scored | None:
    """The scores in a selection's folder with the judge's scores and tokens of each pair; None without scores."""
    if not selection.exists("scores.parquet"):
        return None
    table = selection.read_table(name="scores.parquet").sort_by("pair_id").combine_chunks()
    for folder, names in ((pairs, JUDGED), (sketches, TOKENS)):
        table = _with_columns(table, folder, names)
    summary = selection.read_json("summary.json") or {}
    # Another version may have had other settings.
    found = {name: value for name, value in summary.get("settings", {}).items() if name in Select.model_fields}
    settings = Select.model_validate(found)
    named = {"congrad": settings.score, "all": settings.score, "no_surgery": "cosine"}
    return Scored(table, settings, named.get(settings.strategy, settings.strategy))


def _with_columns(table: pa.Table, folder: Folder, names: tuple[str, ...]) -> pa.Table:
    files = folder.files(".parquet")
    if not files or any(
        name not in pq.read_schema(files[0], filesystem=folder.filesystem).names for name in names
    ):
        return table
    found = folder.read_table(["pair_id", *names]).combine_chunks()
    row = pc.index_in(table["pair_id"], value_set=found["pair_id"].combine_chunks())
    for name in names:
        table = table.append_column(name, found[name].take(row))
    return table


def selection_facts(scored: Scored, summary: Mapping[str, Any], audit: Mapping[str, Any] | None) -> SelectionFacts:
    """All that the report says of a selection; `audit` is of its sketches."""
    edges = bin_edges(scored.score)
    languages = scored.languages
    groups = {str(language): languages == language for language in np.unique(languages)}
    groups[EVERY_LANGUAGE] = np.ones(len(languages), dtype=np.bool_)
    return SelectionFacts(
        summary,
        scored.name,
        edges.tolist(),
        [_of_language(scored, language, members, edges) for language, members in groups.items()],
        _traits(scored),
        _agreement(scored),
        audit,
    )


def bin_edges(values: Floats) -> Floats:
    """Edges (B + 1,) of equal bins that cover the values; they are round numbers, and 0 is one of them."""
    low, high = min(0.0, float(values.min(initial=0.0))), max(0.0, float(values.max(initial=0.0)))
    if high - low < 1e-9:
        return np.array([-0.05, 0.0, 0.05])
    raw = (high - low) / _BINS
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if raw <= magnitude * factor * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return np.arange(first, last + 1, dtype=np.float64) * np.float64(step)


def _of_language(scored: Scored, language: str, members: Bools, edges: Floats) -> LanguageScores:
    score, kept, fate = scored.score[members], scored.kept[members], scored.fate[members]
    # What lies on the last edge by rounding is in the last bin.
    within = np.clip(score, edges[0], edges[-1])
    return LanguageScores(
        language,
        len(score),
        int(kept.sum()),
        int((fate == "quota").sum()),
        int((fate == "conflict").sum()),
        int((kept & (scored.agreement[members] < 0)).sum()),
        int((scored.column("worst_cosine")[members] < 0).sum()) if scored.has("worst_cosine") else None,
        float(score[kept].min()) if kept.any() else None,
        float(score.mean()),
        {name: np.histogram(within[fate == name], bins=edges)[0].tolist() for name in FATES},
    )


def _measures(scored: Scored) -> dict[str, Floats]:
    found: dict[str, Floats] = {}
    if scored.has(*TOKENS):
        prompt, chosen, rejected = (scored.column(name) for name in TOKENS)
        found["prompt tokens"] = prompt
        found["chosen tokens"] = chosen
        found["rejected tokens"] = rejected
        found["chosen longer by, tokens"] = chosen - rejected
    if scored.has(*JUDGED):
        chosen, rejected = (scored.column(name) for name in JUDGED)
        found["judge's score of chosen"] = chosen
        found["judge's score of rejected"] = rejected
        found["judge's margin"] = chosen - rejected
    found["cosine with its own language"] = scored.column("own_cosine")
    return found


def _traits(scored: Scored) -> list[Trait]:
    """None where nothing was dropped; pairs are compared with pairs of their own language."""
    kept, fate, languages = scored.kept, scored.fate, scored.languages
    traits = []
    for measure, values in _measures(scored).items():
        known = np.isfinite(values)
        found = separation(values[known], ~kept[known], languages[known])
        if found is not None:
            means = {name: _mean(values[known & (fate == name)]) for name in FATES}
            traits.append(Trait(measure, means, found))
    return traits


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if len(values) else None


def _agreement(scored: Scored) -> list[tuple[str, Overlap]]:
    settings = scored.settings
    if settings.strategy == "all" or settings.keep_rule == "threshold":
        return []  # others keep all, or go by scores of another scale
    own = scored.column("own_cosine")
    worst = scored.column("worst_cosine") if scored.has("worst_cosine") else own
    agreement = Agreement(scored.column("cosine"), scored.column("dot"), worst, own)
    found = []
    for strategy in _BASELINES:
        other = settings.model_copy(update={"strategy": strategy})
        if strategy == settings.strategy or not scored.has(*needed_columns(other)):
            continue
        scores = score_of(other, scored.table, agreement)
        if not np.isfinite(scores).all():
            continue
        kept = keep_pairs(other, scores, scored.table)
        overlap = overlaps(scored.languages.tolist(), (scored.kept, kept), (scored.score, scores))[0]
        found.append((strategy, overlap))
    return found
