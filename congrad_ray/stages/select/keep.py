"""Rules that turn scores into a selection."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from congrad_ray.config.names import Band
from congrad_ray.stages.select.gram import Float64Array

if TYPE_CHECKING:
    import pyarrow as pa

    from congrad_ray.config.recipe import Select

# A pair's tokens: its prompt once, and both responses.
TOKENS = ("prompt_tokens", "chosen_tokens", "rejected_tokens")


def keep_pairs(settings: Select, scores: Float64Array, pairs: pa.Table) -> NDArray[np.bool_]:
    """What the keep rule of the settings keeps of `pairs`; a mask (N,).

    `pairs` has pair_id, language and, for a budget of tokens, TOKENS. Raises ValueError as `keep_top_fraction`.
    """
    if settings.strategy == "all":
        return np.ones(len(pairs), dtype=np.bool_)
    ids = pairs["pair_id"].to_pylist()
    groups = pairs["language"].to_pylist() if settings.keep_rule == "per_language" else None
    scores = in_band(scores, ids, settings.band, groups)
    match settings.keep_rule:
        case "threshold":
            return keep_above(scores, ids, settings.threshold)
        case "token_budget":
            assert settings.token_budget is not None  # the recipe requires it
            tokens = sum(pairs[name].to_numpy().astype(np.int64) for name in TOKENS)
            return keep_within_tokens(scores, ids, tokens, settings.token_budget)
        case "overall" | "per_language":
            return keep_top_fraction(scores, ids, settings.keep, groups)


def in_band(
    scores: Float64Array, ids: Sequence[str], band: Band, groups: Sequence[str] | None = None
) -> Float64Array:
    """What the keep rules go by, (N,), so that their highest pairs are those of the `band` of `scores`.

    The scores for "highest" and what is left of 0 for "lowest". For "middle", less the distance of a pair's rank
    to the middle one in its group (language) or among all: pairs of medium influence, as TIF keeps them (arXiv
    2510.13212). Raises ValueError as `keep_top_fraction`.
    """
    if band == "highest":
        return scores
    order = _ranked(scores, ids)
    if band == "lowest":
        return -np.asarray(scores, dtype=np.float64)
    distances = np.empty(len(ids))
    for ranked in _by_group(order, groups):
        distances[ranked] = np.abs(np.arange(len(ranked)) - (len(ranked) - 1) / 2)
    return -distances


def keep_top_fraction(
    scores: Float64Array, ids: Sequence[str], fraction: float, groups: Sequence[str] | None = None
) -> NDArray[np.bool_]:
    """Keep the ceil(fraction * n) pairs with the highest scores, of each group (language) or of all together.

    Returns a mask (N,) in the order of the arguments. Equal scores go by id in ascending order, so the
    selection does not depend on the order of the rows. Raises ValueError for a fraction outside (0, 1],
    lengths that differ, an id that occurs twice, and scores that are not finite (naming the ids).
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"the fraction to keep is {fraction}; it must be above 0 and no more than 1")
    order = _ranked(scores, ids)
    kept = np.zeros(len(ids), dtype=np.bool_)
    for ranked in _by_group(order, groups):
        # 0.07 * 100 is 7.000000000000001 in floating point; that must not make it 8.
        kept[ranked[: math.ceil(fraction * len(ranked) - 1e-9)]] = True
    return kept


def keep_above(scores: Float64Array, ids: Sequence[str], threshold: float) -> NDArray[np.bool_]:
    """Keep the pairs whose score is above `threshold`; a mask (N,). Raises ValueError as `keep_top_fraction`."""
    _ranked(scores, ids)
    return np.asarray(np.asarray(scores) > threshold, dtype=np.bool_)


def keep_within_tokens(
    scores: Float64Array, ids: Sequence[str], tokens: Sequence[int], budget: int
) -> NDArray[np.bool_]:
    """Keep the pairs with the highest scores as long as their `tokens` together are at most `budget`; a mask (N,).

    The first pair that would exceed the budget ends the selection, even if a later pair would fit.
    Raises ValueError as `keep_top_fraction`.
    """
    order = _ranked(scores, ids)
    if len(tokens) != len(ids):
        raise ValueError(f"{len(tokens)} numbers of tokens but {len(ids)} ids; give one of each per pair")
    kept = np.zeros(len(ids), dtype=np.bool_)
    kept[order[np.cumsum(np.asarray(tokens, dtype=np.int64)[order]) <= budget]] = True
    return kept


def _by_group(order: NDArray[np.int64], groups: Sequence[str] | None) -> list[NDArray[np.int64]]:
    """The rows in `order` (N,), one group (language) after the other; all together without groups."""
    if groups is None:
        return [order]
    names, members = np.unique(np.asarray(groups), return_inverse=True)
    if len(members) != len(order):
        raise ValueError(f"{len(members)} groups but {len(order)} ids; give one of each per pair")
    return [order[members[order] == group] for group in range(len(names))]


def _ranked(scores: Float64Array, ids: Sequence[str]) -> NDArray[np.int64]:
    """The rows by score from the highest, equal scores by id."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(ids),):
        raise ValueError(f"scores of shape {scores.shape} but {len(ids)} ids; give one of each per pair")
    names = np.asarray(ids, dtype=np.str_)
    if len(np.unique(names)) != len(names):
        repeated, _ = Counter(ids).most_common(1)[0]
        raise ValueError(f"id {repeated!r} occurs more than once; each pair needs an id of its own")
    bad = np.flatnonzero(~np.isfinite(scores)).tolist()
    if bad:
        named = ", ".join(f"{ids[row]} ({scores[row]})" for row in bad[:10])
        raise ValueError(
            f"{len(bad)} scores are not finite: {named}; look for NaN in the sketches or scores of these pairs"
        )
    return np.lexsort((names, -scores))
