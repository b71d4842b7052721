"""A selection of preference pairs from their sketches, one for a table in memory and for a cluster's files.

import pyarrow.parquet as pq
from congrad_ray import Select, select_pairs

table = pq.read_table(files_of_the_sketch_stage)
selection = select_pairs(Select(direction="mgda", keep=0.25), table)
best = selection.scores.filter(selection.kept)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from congrad_ray.config.names import JUDGED, LEAST_MARGIN
from congrad_ray.config.recipe import Select, Sketch
from congrad_ray.data.records import InputError
from congrad_ray.stages.select.advice import Evidence, advice, language_noise
from congrad_ray.stages.select.gram import Float64Array
from congrad_ray.stages.select.keep import keep_pairs
from congrad_ray.stages.select.schema import SCORES
from congrad_ray.stages.select.scores import (
    Agreement,
    Direction,
    Surgery,
    cosine_matrix,
    cosines_of_directions,
    cosines_with_direction,
    make_direction,
    needed_columns,
    other_orders,
    projected_cosine_matrix,
    score_of,
)
from congrad_ray.stages.select.shares import pair_shares
from congrad_ray.stages.select.sums import PRODUCT_COLUMNS, Layout, Sketches, TableSketches, gram_matrices
from congrad_ray.stages.sketch.audit import expected_overlap
from congrad_ray.stages.sketch.schema import dtype_of

# Pairs times other orders whose kept pairs are compared, at most, but always one order: each costs a ranking.
_MOST_COMPARED = 1_000_000


class SelectionError(InputError):
    """There is nothing to select, or a setting asks for what is not there; the text says what to do."""


@dataclass(frozen=True)
class LanguageSummary:
    """One language in a selection."""

    language: str
    pairs: int
    kept: int
    mean_cosine: float
    """Of its pairs with the direction."""
    conflicting: float
    """Share of its pairs with a negative cosine."""
    gradient_norm: float
    cosine_with_direction: float
    in_direction: bool
    """Whether it had enough pairs (`min_pairs`) to take part in the direction."""


@dataclass(frozen=True)
class OrderSpread:
    """How much a selection depends on the order of PCGrad's or GradVac's projections, by those of other draws."""

    directions: int
    """Of other draws, which the direction is held against."""
    mean_cosine: float
    """Of their directions with this one."""
    least_cosine: float
    selections: int
    """Of them, so many had their kept pairs compared, fewer where there are many pairs; 0 for a score that does
    not go by the direction."""
    mean_kept: float | None
    """Share of the kept pairs that they keep too."""
    least_kept: float | None

    @property
    def negligible(self) -> bool:
        """Whether other orders make the same direction, to the digits that are shown."""
        return self.least_cosine > 0.9995

    def __str__(self) -> str:
        if self.negligible:
            return f"the order of projection changes nothing ({self.directions} others tried)"
        said = (
            f"with other orders of projection the direction has a cosine of {self.mean_cosine:.3f} with this one "
            f"(least {self.least_cosine:.3f} of {self.directions})"
        )
        if self.mean_kept is None:
            return said
        return f"{said}, and {self.mean_kept:.1%} of the kept pairs are kept (least {self.least_kept:.1%})"


@dataclass(frozen=True)
class Selection:
    """What was kept of N pairs in L languages, and by which direction. Sketches have B blocks of width / B."""

    settings: Select
    scores: pa.Table
    """One row per pair, sorted by pair_id, with the columns of `schema.SCORES`."""
    languages: tuple[LanguageSummary, ...]
    """Sorted by language: the order of all that is (L, ...)."""
    gradients: NDArray[np.float32]
    """The languages' gradients, (L, B, width / B)."""
    weights: Float64Array
    """(L, B, L): row l makes the direction that the pairs of language l are scored against."""
    cosine_before: Float64Array
    """(L, L) between the languages' gradients."""
    cosine_after: Float64Array
    """(L, L) between them as the surgery leaves them."""
    advice: tuple[str, ...]
    """Sentences for a person about the cases that are there; see `advice.py`."""
    order_spread: OrderSpread | None
    """None where no order is drawn, or pairs are not kept by what they have to do with the direction."""

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Mask (N,) of the pairs that were kept, in the order of `scores`."""
        return np.asarray(self.scores["kept"].to_numpy())

    @property
    def cosine(self) -> Float64Array:
        """Cosine (N,) of every pair with the direction, in the order of `scores`."""
        return np.asarray(self.scores["cosine"].to_numpy())

    @property
    def direction(self) -> NDArray[np.float32]:
        """The direction for each language's pairs, (L, B, width / B); the same for all unless one is left out."""
        return np.einsum("lbk,kbi->lbi", self.weights, self.gradients).astype(np.float32)

    @property
    def conflicting(self) -> float:
        """Share of the pairs that have a negative cosine with the direction."""
        return float((self.cosine < 0).mean())

    def summary(self) -> dict[str, Any]:
        """All but the tables, as summary.json has it."""
        by_language = {row.language: asdict(row) for row in self.languages}
        for row in by_language.values():
            del row["language"]
        return {
            "languages": list(by_language),
            "settings": self.settings.model_dump(mode="json"),
            "width": int(np.prod(self.gradients.shape[1:])),
            "per_language": by_language,
            "cosine_before": self.cosine_before.tolist(),
            "cosine_after": self.cosine_after.tolist(),
            "advice": list(self.advice),
            "order_spread": asdict(self.order_spread) if self.order_spread else None,
        }


def select_pairs(settings: Select, table: pa.Table, sketch: Sketch | None = None) -> Selection:
    """Selects among the pairs in `table`, in this process.

    Args:
        settings: how to select: the recipe's section `select`.
        table: one row per pair, as the sketch stage writes them (`sketch.schema.sketches_schema`), in any order.
            The columns pair_id, language, sketch, sketch_scale, coefficient and norm are always needed;
            chosen_tokens and rejected_tokens by the strategies 'length_balanced' and 'length_gap'; they,
            chosen_logps and rejected_logps by 'logp_gap'; they and prompt_tokens by the keep rule 'token_budget';
            chosen_score and rejected_score, which the pairs table has, by 'reward_gap' and, with rejected_tokens,
            'rip'; least_margin, the least of several judges' margins, by 'judge_agreement'.
        sketch: how the sketches were made: the recipe's section `sketch`. Needed for `per_block`, for method
            'exact', and for a table whose schema no longer says which dtype the sketches have.

    The numbers are those of the select stage, but for rounding: it adds up in another order. Raises SelectionError
    for a table or a setting that does not fit, and where nothing is kept.
    """
    _check_table(settings, table)
    table = table.sort_by("pair_id").combine_chunks()
    layout = _layout_of(settings, table, sketch)
    shares = pair_shares(settings, layout.rows_of(table))
    return select_from(settings, table, TableSketches(table, layout, shares))


def select_from(settings: Select, pairs: pa.Table, sketches: Sketches) -> Selection:
    """Selects among `pairs`, whose sketches may be anywhere: the one implementation of a selection.

    `pairs` is sorted by pair_id and has what `select_pairs` needs but the sketches. Raises SelectionError for a
    setting that does not fit the pairs, and where nothing is kept.
    """
    layout = sketches.layout
    languages, index = layout.languages, layout.rows_of(pairs)
    if not len(pairs):
        raise SelectionError("there are no pairs to select from")
    _check_columns(settings, needed_columns(settings), pairs)
    taking_part = _taking_part(settings, languages, index)
    weights = _language_weights(settings, languages)
    surgery = surgery_of(settings)
    gradients = sketches.language_gradients()
    gram = gram_matrices(gradients)
    direction = make_direction(gram, surgery, weights, taking_part)
    others = other_orders(gram, surgery, weights, taking_part) if settings.strategy == "congrad" else []
    compared = others[: max(1, _MOST_COMPARED // len(pairs))] if settings.score != "worst_cosine" else []
    found, *of_others = sketches.agreement(gradients, [direction, *compared], surgery.leave_out)
    score = score_of(settings, pairs, found)
    kept = keep_pairs(settings, score, pairs)
    if not kept.any():
        raise SelectionError(
            f"no pair is kept: select.{settings.keep_rule} left none of {len(pairs)}, whose scores go from "
            f"{score.min():.4g} to {score.max():.4g}; lower select.threshold or raise select.token_budget"
        )
    with_direction = cosines_with_direction(direction)
    before = cosine_matrix(direction.whole_gram)
    left_out = surgery.leave_out == "pair"
    evidence = Evidence(
        languages,
        taking_part,
        before,
        language_noise(index, pair_shares(settings, index), found.cosine, found.own_cosine, left_out),
        0.0 if layout.exact else 1.0 / float(np.prod(gradients.shape[1:])),
        score,
        kept,
    )
    columns = [pairs["pair_id"], pairs["language"], pa.array(score)]
    columns += [pa.array(getattr(found, name)) for name in ("cosine", "dot", "worst_cosine", "own_cosine")]
    return Selection(
        settings=settings,
        scores=pa.Table.from_arrays([*columns, pa.array(kept)], schema=SCORES),
        languages=tuple(
            LanguageSummary(
                language=language,
                pairs=int((index == i).sum()),
                kept=int(kept[index == i].sum()),
                mean_cosine=float(found.cosine[index == i].mean()),
                conflicting=float((found.cosine[index == i] < 0).mean()),
                gradient_norm=float(np.sqrt(direction.whole_gram[i, i])),
                cosine_with_direction=float(with_direction[i]),
                in_direction=bool(taking_part[i]),
            )
            for i, language in enumerate(languages)
        ),
        gradients=gradients,
        weights=direction.weights,
        cosine_before=before,
        cosine_after=projected_cosine_matrix(direction, surgery),
        advice=advice(settings, evidence),
        order_spread=_order_spread(settings, pairs, kept, direction, others, of_others) if others else None,
    )


def _order_spread(
    settings: Select,
    pairs: pa.Table,
    kept: NDArray[np.bool_],
    direction: Direction,
    others: list[Direction],
    of_others: list[Agreement],
) -> OrderSpread:
    cosines = np.stack([cosines_of_directions(direction, other) for other in others])
    shares = [
        float(keep_pairs(settings, score_of(settings, pairs, found), pairs)[kept].mean()) for found in of_others
    ]
    return OrderSpread(
        len(others),
        float(cosines.mean()),
        float(cosines.min()),
        len(shares),
        float(np.mean(shares)) if shares else None,
        min(shares, default=None),
    )


def languages_of(pairs: pa.Table) -> tuple[str, ...]:
    """The languages of the pairs, sorted: surgeries draw their order from a seed, so theirs must not vary."""
    return tuple(sorted(pc.unique(pairs["language"]).to_pylist()))


def surgery_of(settings: Select) -> Surgery:
    """The surgery that the settings ask for; without surgery it is the plain mean."""
    method = "mean" if settings.strategy == "no_surgery" else settings.direction
    return Surgery(method, settings.seed, settings.orders, settings.per_block, settings.leave_out)


def overlap_with_exact(selection: Selection, error: float) -> tuple[float, float] | None:
    """Share of the kept pairs that exact gradients would keep, by estimate, and the spread of the cosines.

    `error` is the root mean square error of the sketched cosines, against which their spread (within the languages
    where the keep rule is) is held. None where pairs are not kept by the fraction of highest cosines.
    """
    settings = selection.settings
    by_cosine = settings.strategy in ("congrad", "no_surgery") and settings.score == "cosine"
    by_cosine = by_cosine and settings.band == "highest"
    if not by_cosine or settings.keep_rule not in ("per_language", "overall"):
        return None
    cosines = selection.cosine
    groups = np.zeros(len(cosines), dtype=np.int64)
    if settings.keep_rule == "per_language":
        groups = np.unique(selection.scores["language"].to_pylist(), return_inverse=True)[1]
    means = np.bincount(groups, cosines) / np.bincount(groups)
    spread = float((cosines - means[groups]).std())
    return expected_overlap(error, spread, settings.keep), spread


def _taking_part(settings: Select, languages: tuple[str, ...], index: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each language (L,) has enough pairs to take part in the direction."""
    counts = np.bincount(index, minlength=len(languages))
    enough = counts >= settings.min_pairs
    if not enough.any():
        found = ", ".join(f"{language} ({count})" for language, count in zip(languages, counts, strict=True))
        raise SelectionError(
            f"no language has select.min_pairs ({settings.min_pairs}) pairs: {found}. Lower it, or add prompts."
        )
    return np.asarray(enough)


def _language_weights(settings: Select, languages: tuple[str, ...]) -> Float64Array:
    unknown = sorted(set(settings.language_weights) - set(languages))
    if unknown:
        raise SelectionError(
            f"select.language_weights names {', '.join(unknown)}; the pairs are in {', '.join(languages)}"
        )
    return np.array([settings.language_weights.get(language, 1.0) for language in languages])


def _check_columns(settings: Select, names: tuple[str, ...], pairs: pa.Table) -> None:
    missing = [name for name in dict.fromkeys(names) if name not in pairs.column_names]
    if set(missing) & set(JUDGED):
        raise SelectionError(
            f"select.strategy '{settings.strategy}' needs pairs with a judge's scores ({', '.join(JUDGED)})"
        )
    if LEAST_MARGIN in missing:
        raise SelectionError(
            f"select.strategy 'judge_agreement' needs several judges' scores: a run with judge.also, or a column "
            f"{LEAST_MARGIN}, the least of the judges' margins"
        )
    if missing:
        raise SelectionError(
            f"the table of sketches has no column {', '.join(missing)}; it has {', '.join(pairs.column_names)}"
        )


def _check_table(settings: Select, table: pa.Table) -> None:
    _check_columns(settings, (*PRODUCT_COLUMNS, *needed_columns(settings)), table)
    for name in ("pair_id", "language"):
        if table[name].null_count:
            raise SelectionError(f"{table[name].null_count} pairs have no {name}; every row needs one")
    kind = table.schema.field("sketch").type
    if not pa.types.is_fixed_size_binary(kind):
        raise SelectionError(f"column sketch is {kind}; it should be binary of a fixed size, as pyarrow reads it")


def _layout_of(settings: Select, table: pa.Table, sketch: Sketch | None) -> Layout:
    languages, size = languages_of(table), table.schema.field("sketch").type.byte_width
    if sketch is None:
        dtype = dtype_of(table.schema)
        if settings.per_block or dtype is None:
            what = "select.per_block" if settings.per_block else "a table whose schema does not name a dtype"
            raise SelectionError(f"{what} needs `sketch`: the recipe's section that the sketches were made with")
        return Layout(languages, 1, dtype, exact=False)
    layout = Layout.of(sketch, languages)
    expected = sketch.width * np.dtype(layout.dtype).itemsize
    if size != expected and not layout.exact:  # exact tables are as wide as there are languages
        raise SelectionError(
            f"a sketch in the table has {size} bytes, but {sketch.width} {layout.dtype} numbers have {expected}: "
            "give the section `sketch` that the sketches were made with"
        )
    return layout
