"""How far a pair agrees with the languages' common direction, from inner products alone.

All inner products and norms are of *sketches*. Inner products of sketches estimate those of the gradients;
dividing them by the exact norms |u| would mix two geometries, and the ratio could leave [-1, 1]. With the
sketches' own norms every cosine is the true cosine between two sketch vectors.

A sketch may have B parts, one for each block of layers. Surgery then works on each block's own L x L Gram matrix
or on their sum; a cosine is always that of the whole vectors: dot products and squared norms are added up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from congrad_ray.config.names import JUDGED, LEAST_MARGIN, DirectionMethod, LeaveOut
from congrad_ray.stages.select.directions import direction_weights, projected_coefficients
from congrad_ray.stages.select.gram import Float64Array, check_gram
from congrad_ray.stages.select.keep import TOKENS

if TYPE_CHECKING:
    import pyarrow as pa

    from congrad_ray.config.recipe import Select

# Squared length of a direction, relative to the parts that it is the sum of, below which only rounding is
# left.
_CANCELLED = 1e-12
# Other draws of the order of projections that a direction is held against, and how many projections they may take:
# some ten seconds. More languages than that get fewer draws, but always one.
_OTHER_ORDERS = 16
_MOST_PROJECTIONS = 20_000_000

# Columns of a pair that strategies without a direction go by.
LENGTHS = ("chosen_tokens", "rejected_tokens")
LOGPS = ("chosen_logps", "rejected_logps")


@dataclass(frozen=True)
class PairProducts:
    """What the scores of N pairs are computed from; s_n is the sketch of pair n, g_l the gradient of language l.

    A language's gradient is g_l = sum over its pairs of shares[n] * coefficients[n] * s_n.
    """

    dots: Float64Array  # (N, B, L): <s_n, g_l> in each block
    squared_norms: Float64Array  # (N, B): |s_n|^2 in each block
    languages: NDArray[np.int64]  # (N,): the language of each pair, as a row of the Gram matrix
    shares: Float64Array  # (N,)
    coefficients: Float64Array  # (N,): c > 0 of the loss

    def check(self, gram: Float64Array) -> None:
        """Raises ValueError where the shapes do not fit each other and `gram` (B, L, L)."""
        pairs, (blocks, languages) = len(self.dots), gram.shape[:2]
        wanted = {
            "dots": (pairs, blocks, languages),
            "squared_norms": (pairs, blocks),
            **{name: (pairs,) for name in ("languages", "shares", "coefficients")},
        }
        for name, shape in wanted.items():
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(f"{name} has shape {found}; with {languages} languages it must be {shape}")


@dataclass(frozen=True)
class Surgery:
    """How one direction is made of the languages' gradients."""

    method: DirectionMethod = "pcgrad"
    seed: int = 0  # of the order of projections
    orders: int = 1  # orders to average over
    per_block: bool = False  # a surgery for each block of layers, not one for the whole vector
    leave_out: LeaveOut = "nothing"  # what is taken out of the direction that a pair is scored against


@dataclass(frozen=True)
class Direction:
    """The direction sum_l weights[l] * g_l in every block, and what it is made of."""

    gram: Float64Array  # (B, L, L): <g_k, g_l> in each block
    weights: Float64Array  # (L, B, L): row l is the direction for the pairs of language l
    included: NDArray[np.bool_]  # (L,): whether a language takes part

    @property
    def whole_gram(self) -> Float64Array:
        """<g_k, g_l> over all blocks, (L, L)."""
        total: Float64Array = self.gram.sum(axis=0)
        return total


@dataclass(frozen=True)
class Agreement:
    """Scores of N pairs, (N,) each."""

    cosine: Float64Array  # with the direction
    dot: Float64Array  # with the direction
    worst_cosine: Float64Array  # lowest of the cosines with the languages' gradients that take part
    own_cosine: Float64Array  # with the gradient of the pair's own language


def make_direction(
    gram: Float64Array,
    surgery: Surgery,
    language_weights: Float64Array | None = None,
    included: NDArray[np.bool_] | None = None,
) -> Direction:
    """The direction of `surgery` from the Gram matrices `gram` (B, L, L) of the languages' gradients.

    `language_weights` (L,) > 0 multiply the gradients before the surgery; for RACO, which weighs them itself, they
    are its preference. Languages that are not `included` (L,) take no part. With `leave_out` "language" the
    direction for a language's pairs is made of the others alone.
    Raises ValueError for a matrix that is not one, and where no language takes part.
    """
    gram = np.stack([check_gram(block) for block in gram])
    blocks, languages = gram.shape[:2]
    scale = np.ones(languages) if language_weights is None else np.asarray(language_weights, dtype=np.float64)
    if scale.shape != (languages,) or not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"the languages' weights are {scale.tolist()}; give one above 0 for each of {languages}")
    part = np.ones(languages, dtype=np.bool_) if included is None else np.asarray(included, dtype=np.bool_)
    if part.shape != (languages,) or not part.any():
        raise ValueError("no language takes part in the direction; lower the minimum number of pairs per language")
    preference, scale = (scale, np.ones(languages)) if surgery.method == "raco" else (None, scale)
    scaled = gram * np.outer(scale, scale)
    used = scaled if surgery.per_block else scaled.sum(axis=0, keepdims=True)

    def weights_of(members: NDArray[np.bool_]) -> Float64Array:
        weights = np.zeros((blocks, languages))
        rows = np.flatnonzero(members)
        if rows.size:
            for block, matrix in enumerate(used):
                found = direction_weights(
                    matrix[np.ix_(rows, rows)],
                    surgery.method,
                    surgery.seed,
                    surgery.orders,
                    None if preference is None else preference[rows],
                )
                weights[block if surgery.per_block else slice(None), rows] = found * scale[rows]
        return weights

    whole = weights_of(part)
    weights = np.broadcast_to(whole, (languages, blocks, languages)).copy()
    if surgery.leave_out == "language":
        for language in np.flatnonzero(part):
            weights[language] = weights_of(part & (np.arange(languages) != language))
    return Direction(gram, weights, part)


def other_orders(
    gram: Float64Array,
    surgery: Surgery,
    language_weights: Float64Array | None = None,
    included: NDArray[np.bool_] | None = None,
) -> list[Direction]:
    """The directions of `make_direction` for 16 other draws of the order of projections, each of as many orders.

    None where the surgery draws no order; fewer draws where they would take long, as for a hundred languages with
    leave_out "language" in many blocks. No sketch is looked at.
    """
    if surgery.method not in ("pcgrad", "gradvac"):
        return []
    blocks, languages = gram.shape[:2]
    projections = languages**2 * surgery.orders * (blocks if surgery.per_block else 1)
    projections *= languages if surgery.leave_out == "language" else 1
    draws = max(1, min(_OTHER_ORDERS, _MOST_PROJECTIONS // projections))
    seeds = [surgery.seed + surgery.orders * draw for draw in range(1, draws + 1)]
    return [make_direction(gram, replace(surgery, seed=seed), language_weights, included) for seed in seeds]


def cosines_of_directions(direction: Direction, other: Direction) -> Float64Array:
    """Cosine (L,) of two directions of the same gradients, for the pairs of each language; 0 where one is zero."""
    dots = np.einsum("kbl,blm,kbm->k", direction.weights, direction.gram, other.weights)
    norms = []
    for weights in (direction.weights, other.weights):
        squared, parts = _squared_lengths(direction.gram, weights)
        norms.append(np.sqrt(np.where(squared > _CANCELLED * parts, squared, 0.0)))
    return np.clip(_cosine(dots, *norms), -1.0, 1.0)


def agreement(products: PairProducts, direction: Direction, leave_out: LeaveOut = "nothing") -> Agreement:
    """The scores of pairs against `direction`, which `make_direction` made with the same `leave_out`.

    "pair" takes each pair's own gradient out of its language's gradient, which becomes the mean of the other
    pairs, (g_l - a c s) / (1 - a) for a pair of share a, while the surgery's weights stay; of a language with one
    pair nothing is left. "language" leaves the pair's language out of the languages that `worst_cosine` looks at.
    A pair or a direction of norm zero has cosine 0.

    Raises ValueError for shapes that do not fit and norms of another space than the dot products.
    """
    gram = direction.gram
    products.check(gram)
    rows, own = np.arange(len(products.dots)), products.languages
    norms = np.sqrt(products.squared_norms.sum(axis=1))
    weights = direction.weights[own]  # (N, B, L)
    dots = np.einsum("nbl,nbl->n", products.dots, weights)
    squared, parts = _squared_lengths(gram, direction.weights)
    squared, parts = squared[own], parts[own]
    own_dots = products.dots[rows, :, own]  # (N, B)
    # Cosines with every language's gradient.
    language_dots = products.dots.sum(axis=1)
    whole = direction.whole_gram
    language_squares = np.broadcast_to(np.diag(whole), language_dots.shape).copy()
    if leave_out == "pair":
        # g_own becomes g_own + p g_own - q s.
        alone = products.shares >= 1.0
        rest = np.where(alone, 1.0, 1.0 - products.shares)
        p = np.where(alone, -1.0, products.shares / rest)[:, None]
        q = np.where(alone, 0.0, products.shares * products.coefficients / rest)[:, None]
        own_gram = gram[:, own, own].T  # (N, B)
        squares = products.squared_norms
        w = weights[rows, :, own]  # (N, B)
        with_own = np.einsum("nbl,bln->nb", weights, gram[:, :, own])  # <d, g_own> in each block
        with_pair = np.einsum("nbl,nbl->nb", products.dots, weights)  # <d, s>
        moved = p * p * own_gram + q * q * squares - 2 * p * q * own_dots  # |p g_own - q s|^2
        dots = dots + (w * (p * own_dots - q * squares)).sum(axis=1)
        squared = squared + (2 * w * (p * with_own - q * with_pair) + w * w * moved).sum(axis=1)
        parts = parts + (w * w * (p * p * own_gram + q * q * squares)).sum(axis=1)
        language_dots[rows, own] += (p * own_dots - q * squares).sum(axis=1)
        language_squares[rows, own] += (2 * (p * own_gram - q * own_dots) + moved).sum(axis=1)
    direction_norms = np.sqrt(np.where(squared > _CANCELLED * parts, squared, 0.0))
    language_norms = np.sqrt(np.maximum(language_squares, 0.0))
    cosines = _cosine(language_dots, norms[:, None], language_norms)
    counted = direction.included & (language_norms > 0.0)
    if leave_out == "language":
        counted[rows, own] = False
    worst = np.where(counted, cosines, np.inf).min(axis=1, initial=np.inf)
    return Agreement(
        _cosine(dots, norms, direction_norms),
        dots,
        np.where(np.isfinite(worst), worst, 0.0),
        cosines[rows, own],
    )


def _squared_lengths(gram: Float64Array, weights: Float64Array) -> tuple[Float64Array, Float64Array]:
    """|sum_l w_l g_l|^2 over all blocks for weights (K, B, L), and the same without cancellation, (K,) each."""
    squared = np.einsum("kbl,blm,kbm->k", weights, gram, weights)
    parts = np.einsum("kbl,blm,kbm->k", np.abs(weights), np.abs(gram), np.abs(weights))
    return squared, parts


def _cosine(dots: Float64Array, norms: Float64Array, other_norms: Float64Array) -> Float64Array:
    scale = norms * other_norms
    cosine = np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0.0)
    if np.abs(cosine).max(initial=0.0) > 1.01:
        row = int(np.unravel_index(np.argmax(np.abs(cosine)), cosine.shape)[0])
        raise ValueError(f"row {row} has a cosine above 1; norms must be those of the sketches, not |u|")
    return cosine


def cosine_matrix(gram: Float64Array) -> Float64Array:
    """Cosines (L, L) between vectors of Gram matrix `gram`; a vector of norm zero has cosine 0 with all."""
    gram = check_gram(gram)
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    return _cosine(gram, norms[:, None], norms)


def projected_cosine_matrix(direction: Direction, surgery: Surgery) -> Float64Array:
    """Cosines (L, L) between the gradients as the surgery leaves them; those of languages that take no part too.

    Only surgeries that turn each language's gradient (PCGrad, GradVac) change them; see `projected_coefficients`.
    """
    rows = np.flatnonzero(direction.included)
    gram = direction.gram if surgery.per_block else direction.whole_gram[None]
    projected = np.zeros(gram.shape[1:])
    parts = np.zeros(len(projected))
    for matrix in gram:
        coefficients = np.eye(len(matrix))
        coefficients[np.ix_(rows, rows)] = projected_coefficients(
            matrix[np.ix_(rows, rows)], surgery.method, surgery.seed
        )
        projected += coefficients @ matrix @ coefficients.T
        parts += np.einsum("ik,kl,il->i", np.abs(coefficients), np.abs(matrix), np.abs(coefficients))
    # A gradient projected away entirely leaves rounding, whose cosines would be noise.
    gone = np.diag(projected) <= _CANCELLED * parts
    projected[gone, :] = 0.0
    projected[:, gone] = 0.0
    return cosine_matrix((projected + projected.T) / 2)


def cosines_with_direction(direction: Direction) -> Float64Array:
    """Cosine (L,) of each language's gradient with the direction that its pairs are scored against."""
    languages = np.arange(direction.gram.shape[1])
    dots = np.einsum("lbk,bkl->l", direction.weights, direction.gram)
    squared, parts = _squared_lengths(direction.gram, direction.weights)
    norms = np.sqrt(np.where(squared > _CANCELLED * parts, squared, 0.0))
    own = np.sqrt(np.maximum(direction.whole_gram[languages, languages], 0.0))
    return _cosine(dots, norms, own)


def needed_columns(settings: Select) -> tuple[str, ...]:
    """What the settings' strategy and keep rule need of every pair besides its sketch."""
    by_strategy = {
        "length_balanced": LENGTHS,
        "length_gap": LENGTHS,
        "logp_gap": (*LENGTHS, *LOGPS),
        "reward_gap": JUDGED,
        "rip": (*JUDGED, "rejected_tokens"),
        "judge_agreement": (LEAST_MARGIN,),
    }.get(settings.strategy, ())
    return (*by_strategy, *(TOKENS if settings.keep_rule == "token_budget" else ()))


def score_of(settings: Select, pairs: pa.Table, found: Agreement) -> Float64Array:
    """The numbers (N,) that the keep rule goes by, higher is better; of `pairs` it needs `needed_columns`.

    length_gap: |chosen| - |rejected| in tokens, the control for a length bias.
    logp_gap: log p(chosen) / |chosen| - log p(rejected) / |rejected| of the policy: a margin by token, without a
    reference. The implicit margin of DPO would be 0 for all pairs at the start of an iteration, where the policy
    is the reference. Difficulty-based selection keeps the lowest margins (arXiv 2508.04149), BeeS the highest
    (arXiv 2502.14560): `band` says which.
    rip: RIP keeps prompts whose rejected response has a high score and many tokens and whose gap of scores is
    small, each beyond a quantile (arXiv 2501.18578). As one score that is the least of the three percentile ranks,
    each rank among what the keep rule ranks: a pair is above q just where all three are.
    judge_agreement: the least of several judges' standardised margins, so that a pair counts as much as the judge
    says who is least sure of it; of each pair, where SCIR (arXiv 2502.08922) and CREAM (arXiv 2410.12735) ask how
    far two rewards agree.
    """
    match settings.strategy:
        case "random":
            return np.random.default_rng(settings.seed).random(len(pairs))
        case "own_language":
            return found.own_cosine
        case "length_balanced":
            chosen, rejected = _floats(pairs, LENGTHS)
            return -np.abs(chosen - rejected) / (chosen + rejected)
        case "length_gap":
            chosen, rejected = _floats(pairs, LENGTHS)
            return chosen - rejected
        case "logp_gap":
            chosen, rejected, chosen_tokens, rejected_tokens = _floats(pairs, (*LOGPS, *LENGTHS))
            return chosen / chosen_tokens - rejected / rejected_tokens
        case "reward_gap":
            chosen, rejected = (pairs[name].to_numpy() for name in JUDGED)
            return (chosen - rejected).astype(np.float64)
        case "rip":
            chosen, rejected, tokens = _floats(pairs, (*JUDGED, "rejected_tokens"))
            groups = np.zeros(len(pairs), dtype=np.int64)
            if settings.keep_rule == "per_language":
                groups = np.unique(pairs["language"].to_pylist(), return_inverse=True)[1]
            ranks = [percentile_ranks(values, groups) for values in (rejected, tokens, rejected - chosen)]
            return np.min(ranks, axis=0)
        case "judge_agreement":
            return _floats(pairs, (LEAST_MARGIN,))[0]
        case "no_surgery":
            return found.cosine
    return np.asarray(getattr(found, settings.score))


def percentile_ranks(values: Float64Array, groups: NDArray[np.int64]) -> Float64Array:
    """The share (N,) of each value's group that is not above it, ties by half; NaN stays NaN and has no share."""
    from scipy.stats import rankdata

    found = np.empty(len(values))
    for group in np.unique(groups):
        members = groups == group
        ranks = rankdata(values[members], nan_policy="omit")
        found[members] = ranks / max(1, int((~np.isnan(ranks)).sum()))
    return found


def _floats(pairs: pa.Table, names: tuple[str, ...]) -> list[Float64Array]:
    return [pairs[name].to_numpy().astype(np.float64) for name in names]
