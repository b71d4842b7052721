"""What a selection's own numbers say about how to select: a few sentences for a person, and none in most cases.

Two cases are looked for: languages that contradict the others, and pairs that were dropped though they agree. All
texts are here, so that the screen, the report and Python say the same. Their evidence is docs/results/study.md and
docs/results/real-model.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from congrad_ray.stages.select.gram import Float64Array

if TYPE_CHECKING:
    from congrad_ray.config.recipe import Select

# A cosine counts from this many standard errors on: with the choice among groups of languages two would cry wolf.
_ERRORS = 3.0
# And from this size on: below it a projection would take less than a twentieth off a gradient.
_SMALLEST = 0.05
# Of the dropped pairs, from which share on "nearly all".
_NEARLY_ALL = 0.9
_WITH_DIRECTION = ("congrad", "no_surgery")
_PAGE = "docs/explanation/selection.md"
_LOOK = "Look at the judgements and translations of"


@dataclass(frozen=True)
class Evidence:
    """What is known of a selection of N pairs in L languages."""

    languages: Sequence[str]
    included: NDArray[np.bool_]
    """(L,): whether a language takes part in the direction."""
    cosines: Float64Array
    """(L, L) between the languages' gradients, before the surgery."""
    noise: Float64Array
    """(L,): what a language's few pairs add to the variance of its cosines with others; see `language_noise`."""
    sketch_noise: float
    """What sketching adds to the variance of every cosine: 1 / width, and 0 for exact gradients."""
    scores: Float64Array
    """(N,): what the keep rule went by."""
    kept: NDArray[np.bool_]
    """(N,)"""


@dataclass(frozen=True)
class _Mean:
    """A mean of cosines between languages and its standard error."""

    value: float
    error: float

    @property
    def clearly_negative(self) -> bool:
        return self.value < -max(_SMALLEST, _ERRORS * self.error)

    @property
    def clearly_positive(self) -> bool:
        return self.value > max(_SMALLEST, _ERRORS * self.error)


def advice(settings: Select, evidence: Evidence) -> tuple[str, ...]:
    """Sentences about how to select, for the cases that are there; none for baselines that go by no direction."""
    if settings.strategy not in _WITH_DIRECTION:
        return ()
    return (*_of_languages(settings, evidence), *_of_quota(settings, evidence))


def language_noise(
    index: NDArray[np.int64],
    shares: Float64Array,
    cosine: Float64Array,
    own_cosine: Float64Array,
    own_left_out: bool = False,
) -> Float64Array:
    """The variance (L,) of a language's cosine with another gradient over draws of its pairs; infinite if unknown.

    `index` (N,) has the language of each pair, `shares` (N,) its share in that language's gradient, `cosine` and
    `own_cosine` (N,) its cosines with the direction and with that gradient, which is made without the pair itself
    where it is `own_left_out`.

    A language's gradient g is the sum of a_n x_n. With another gradient h held fixed, the variance of <g, h> is
    sum a_n^2 Var <x, h>; divided by |g|^2 |h|^2 and with all |x| alike, it is sum a_n^2 Var cos(x, h) / R^2, where
    R = |g| / |x| is the mean of the pairs' cosines with g. Var cos(x, h) is taken from the pairs' cosines with the
    direction: of the language's own pairs or of all languages', whichever is larger, since few pairs may look
    alike by chance. So a language that is nothing but noise has R^2 near sum a_n^2, and the whole spread of single
    pairs as the noise of its cosine, however many pairs it has. Norms that differ and a direction made of the same
    pairs make it an approximation; the tests say how often it cries wolf.
    """
    counts = np.bincount(index)
    means, own = (np.bincount(index, values) / counts for values in (cosine, own_cosine))
    squares = np.bincount(index, (cosine - means[index]) ** 2)
    degrees = counts - 1
    if not degrees.any():
        return np.full(len(counts), np.inf)
    spread = np.maximum(squares / np.maximum(degrees, 1), squares.sum() / degrees.sum())
    concentration = np.bincount(index, shares**2)
    # |g|^2 is |x| times the pairs' own cosines; without the pair itself these lack its part, concentration |x|^2.
    length = (own + np.sqrt(own**2 + 4 * concentration)) / 2 if own_left_out else own
    known = length > 0
    return np.divide(concentration * spread, length**2, out=np.full(len(counts), np.inf), where=known)


def _of_languages(settings: Select, evidence: Evidence) -> list[str]:
    """One sentence where some languages' gradients clearly point against the others'."""
    names = evidence.languages
    fewer, more = _sides(evidence)
    clear = [_between(evidence, fewer[i : i + 1], more).clearly_negative for i in range(len(fewer))]
    against = fewer[clear]
    if not len(against):
        return []
    between, within = _between(evidence, against, more), _within(evidence, more)
    everybody = len(against) + len(more) == len(names)
    text = (
        f"{_named(names, against)} {'disagrees' if len(against) == 1 else 'disagree'} with "
        f"{'the others' if everybody and len(names) > 2 else _named(names, more)} (mean cosine {between.value:.2f}"
    )
    if len(names) == 2:
        return [f"{text}): of two languages nobody can say which is wrong. {_LOOK} both: {_PAGE}"]
    if len(more) <= len(fewer) or not within.clearly_positive:
        return [
            f"{text}), and no majority clearly agrees, so nobody can say which are wrong. {_LOOK} all: {_PAGE}"
        ]
    text += f", against {within.value:.2f} among the rest): find out why first"
    if settings.strategy != "congrad" or settings.direction == "consensus":
        return [f"{text}: {_PAGE}"]
    change = "select.direction=consensus"
    if settings.keep_rule == "per_language":
        change += " with select.keep_rule=overall"
    return [f"{text}. {change} did better than pcgrad in such a case, in a toy world: {_PAGE}"]


def _sides(evidence: Evidence) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The languages on two sides, the one with fewer of them, perhaps none, first.

    The sides are the signs of the leading eigenvector of the cosines: as much agreement as possible is within a
    side, and as much contradiction between them. A language without gradient or with unknown noise is on neither.
    """
    there = np.flatnonzero(evidence.included & np.isfinite(evidence.noise) & (np.diag(evidence.cosines) > 0))
    if not len(there):
        return there, there
    vector = np.linalg.eigh(evidence.cosines[np.ix_(there, there)])[1][:, -1]
    one, other = there[vector >= 0], there[vector < 0]
    return (one, other) if len(one) < len(other) else (other, one)


def _between(evidence: Evidence, some: NDArray[np.int64], others: NDArray[np.int64]) -> _Mean:
    """The mean cosine of some languages with others, as if all of one side's noise went the same way for all."""
    noise = evidence.noise[some].mean() / len(some) + evidence.noise[others].mean() / len(others)
    value = evidence.cosines[np.ix_(some, others)].mean()
    return _Mean(float(value), float(np.sqrt(noise + evidence.sketch_noise)))


def _within(evidence: Evidence, some: NDArray[np.int64]) -> _Mean:
    """The mean cosine of languages with each other; unknown for one language."""
    count = len(some)
    if count < 2:
        return _Mean(0.0, np.inf)
    square = evidence.cosines[np.ix_(some, some)]
    value = (square.sum() - np.trace(square)) / (count * (count - 1))
    # Every language is in 2 of count of the mean's pairs.
    noise = 4 * evidence.noise[some].mean() / count
    return _Mean(float(value), float(np.sqrt(noise + evidence.sketch_noise)))


def _of_quota(settings: Select, evidence: Evidence) -> list[str]:
    """One sentence where nearly all dropped pairs agree with the direction."""
    dropped = int((~evidence.kept).sum())
    agreeing = int((~evidence.kept & (evidence.scores >= 0)).sum())
    by_quota = settings.keep_rule != "threshold" and settings.band == "highest"
    if not by_quota or not dropped or agreeing < _NEARLY_ALL * dropped:
        return []
    conflicting = int((evidence.scores < 0).sum())
    score = settings.score if settings.strategy == "congrad" else "cosine"
    quota = "token_budget" if settings.keep_rule == "token_budget" else "keep"
    own_part = ""
    if settings.strategy == "congrad" and settings.leave_out == "nothing":
        own_part = "; with select.leave_out=pair more do, since a pair agrees with a direction that it is part of"
    return [
        f"{agreeing:,} of {dropped:,} dropped pairs have a {score.replace('_', ' ')} of 0 or more: they fell to "
        f"select.{quota}, not to conflict. select.keep_rule=threshold drops only what conflicts, "
        f"{conflicting:,} of {len(evidence.scores):,} pairs{own_part}: {_PAGE}"
    ]


def _named(languages: Sequence[str], which: NDArray[np.int64]) -> str:
    """`de`, `de and fr`, `de, fr and hi`."""
    *first, last = (languages[i] for i in which)
    return f"{', '.join(first)} and {last}" if first else last
