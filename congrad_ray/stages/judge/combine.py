"""From judgements to one score for each response, and how far several judges agree. Pure; nothing here asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from congrad_ray.config.judging import Judge
from congrad_ray.stages.judge.scores import MAXIMUM

COLUMNS = ("response_id", "prompt_id", "language", "judge", "compared_with", "score")
# Of a language's gradient, where its judges do not agree at all.
LEAST_WEIGHT = 0.05


@dataclass(frozen=True)
class Scores:
    """What J judges make of R responses. A response that no judge could read is NaN everywhere."""

    judges: tuple[str, ...]
    response_ids: list[str]
    """R, sorted."""
    prompt_ids: list[str]
    languages: list[str]
    values: NDArray[np.float64]
    """(R, J): mean of the judge's readable judgements, in its units; NaN where there is none."""
    readable: NDArray[np.int64]
    """(R,): judgements of all judges that could be read."""
    asked: NDArray[np.int64]
    """(R,)"""

    def combined(self) -> NDArray[np.float64]:
        """One score for each response (R,), NaN where nothing could be read.

        That of the only judge as it is; of several the mean of their standardised scores (less the judge's mean
        over all responses, by its standard deviation), over those judges that could be read. A judge that gives
        every response the same adds 0.
        """
        values = self.values if len(self.judges) == 1 else self.standardised()
        known = ~np.isnan(values)
        counts = known.sum(axis=1)
        sums = np.where(known, values, 0.0).sum(axis=1)
        return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)

    def standardised(self) -> NDArray[np.float64]:
        """The values (R, J) less each judge's mean over all responses, by its standard deviation."""
        return np.column_stack([_standardised(column) for column in self.values.T])

    def agreement(self) -> dict[str, dict[str, Any]]:
        """By language the mean Kendall's tau-b over prompts, as CREAM (2410.12735) takes for consistency.

        Of a prompt: between two judges' scores of its responses, those that both could read; with more judges the
        mean over pairs of them. A prompt without a tau (fewer than two such responses, or ties everywhere with
        one of the judges) is `left_out`. {"tau": float or None, "prompts": int, "left_out": int}
        """
        places: dict[tuple[str, str], list[int]] = {}
        for place, key in enumerate(zip(self.languages, self.prompt_ids, strict=True)):
            places.setdefault(key, []).append(place)
        found: dict[str, list[float | None]] = {}
        for (language, _), rows in places.items():
            found.setdefault(language, []).append(agreement_of(self.values[rows]))
        result: dict[str, dict[str, Any]] = {}
        for language, taus in sorted(found.items()):
            known = [tau for tau in taus if tau is not None]
            mean = round(float(np.mean(known)), 4) if known else None
            result[language] = {"tau": mean, "prompts": len(known), "left_out": len(taus) - len(known)}
        return result


def scores_of(samples: pa.Table, judges: Sequence[str]) -> Scores:
    """The scores of JUDGEMENT_SAMPLES (COLUMNS). A comparison counts for both: the other has what is left of 5."""
    both = samples.filter(samples["compared_with"].is_valid())
    other = both.set_column(
        both.column_names.index("response_id"), "response_id", both["compared_with"]
    ).set_column(both.column_names.index("score"), "score", pc.subtract(float(MAXIMUM), both["score"]))
    names = [name for name in COLUMNS if name != "compared_with"]
    own = samples.select(names)
    rows = pa.concat_tables([own, other.select(names).cast(own.schema)])
    grouped = rows.group_by(["response_id", "prompt_id", "language", "judge"]).aggregate(
        [("score", "mean"), ("score", "count"), ([], "count_all")]
    )
    grouped = grouped.sort_by([("response_id", "ascending"), ("judge", "ascending")])
    ids = grouped["response_id"].to_numpy()
    response_ids, first, place = np.unique(ids, return_index=True, return_inverse=True)
    values = np.full((len(response_ids), len(judges)), np.nan)
    columns = np.array([judges.index(name) for name in grouped["judge"].to_pylist()], dtype=np.int64)
    values[place, columns] = pc.fill_null(grouped["score_mean"], float("nan")).to_numpy()
    of_first = grouped.take(pa.array(first))
    return Scores(
        tuple(judges),
        response_ids.tolist(),
        of_first["prompt_id"].to_pylist(),
        of_first["language"].to_pylist(),
        values,
        np.bincount(place, grouped["score_count"].to_numpy(), len(response_ids)).astype(np.int64),
        np.bincount(place, grouped["count_all"].to_numpy(), len(response_ids)).astype(np.int64),
    )


def agreement_of(values: NDArray[np.float64]) -> float | None:
    """Mean tau-b of all pairs of judges on the responses (n, J) of one prompt; None where no pair has one."""
    from scipy.stats import kendalltau

    taus = []
    for first, second in combinations(values.T, 2):
        known = ~(np.isnan(first) | np.isnan(second))
        one, two = first[known], second[known]
        if len(one) > 1 and np.ptp(one) > 0 and np.ptp(two) > 0:
            taus.append(float(kendalltau(one, two, variant="b").statistic))
    return float(np.mean(taus)) if taus else None


def disagreeing(agreement: dict[str, dict[str, Any]], min_agreement: float | None) -> dict[str, float | None]:
    """The languages whose judges agree less than that, with tau; None where no prompt has one."""
    if min_agreement is None:
        return {}
    return {
        language: row["tau"]
        for language, row in agreement.items()
        if row["tau"] is None or row["tau"] < min_agreement
    }


def agreement_weights(agreement: dict[str, dict[str, Any]], min_agreement: float | None) -> dict[str, float]:
    """Factors on the gradients of languages whose judges agree less than that: tau, and LEAST_WEIGHT at least."""
    return {
        language: max(tau or 0.0, LEAST_WEIGHT) for language, tau in disagreeing(agreement, min_agreement).items()
    }


def disagreement_settings(judge: Judge, what: Literal["weight", "leave_out"]) -> list[dict[str, Any]]:
    """What decides the result of the stage that does `what` with such languages; nothing where it is not asked."""
    if judge.disagreement != what:
        return []
    return [{"judge.disagreement": what, "judge.min_agreement": judge.min_agreement}]


def _standardised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    known = values[~np.isnan(values)]
    if not len(known):
        return values
    spread = known.std()
    centred: NDArray[np.float64] = values - known.mean()
    return centred / spread if spread > 0 else centred * 0.0
