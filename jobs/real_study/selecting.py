"""What each strategy keeps of pairs whose labels are partly wrong, without training: many draws of plantings."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from congrad_ray.rundir.directory import Folder
from congrad_ray.runtime.progress import Progress
from congrad_ray.stages.select.directions import Float64Array
from congrad_ray.stages.select.keep import keep_pairs
from congrad_ray.stages.select.scores import needed_columns
from congrad_ray.stages.select.selection import Selection, select_pairs
from congrad_ray.stages.sketch.audit import rank_correlation
from real_study.protocol import ALL, DATASETS, DatasetName, KeepRule, Oracle, Protocol, Strategy
from real_study.sketches import (
    Draw,
    Sketched,
    coordinates_of,
    draw,
    read_sketched,
    replaced,
    with_coordinates,
    with_embedding,
)
from real_study.sketching import read_exact_gram, subset
from study.results import Results
from study.strategies import area_under_curve

Row = dict[str, Any]

logger = logging.getLogger("congrad_ray.real_study")

_TEXTS = ("prompt", "chosen", "rejected", "part", "place")
# Strategies whose scores are cosines or products, of which 0 is the border between agreement and conflict.
_AGREEMENT = ("congrad", "no_surgery", "own_language")
_RANDOM_ORDER = 0.5  # below the 1 between right and wrong labels
_DIGITS = 4  # of what is written


@dataclass(frozen=True)
class Choice:
    """A strategy's scores of N pairs, and its selection with the direction behind them; None of an oracle."""

    strategy: Strategy | Oracle
    scores: Float64Array
    selection: Selection | None = None

    def kept(self, pairs: pa.Table, rule: KeepRule, fraction: float) -> NDArray[np.bool_]:
        """What a keep rule keeps by these scores, (N,)."""
        settings = Strategy() if isinstance(self.strategy, str) else self.strategy
        return keep_pairs(settings.model_copy(update={"keep_rule": rule, "keep": fraction}), self.scores, pairs)


def own_rule(strategy: Strategy | Oracle) -> KeepRule:
    """The keep rule of a strategy's own settings, which training goes by."""
    if isinstance(strategy, str):
        return "overall" if strategy == "oracle_overall" else "per_language"
    assert strategy.keep_rule != "token_budget"  # the protocol refuses it
    return strategy.keep_rule


def rules_of(strategy: Strategy | Oracle, rules: Sequence[KeepRule]) -> list[KeepRule]:
    """The keep rules that make sense: all that keep everything are one, and a threshold is one of agreement."""
    if isinstance(strategy, str):
        return [own_rule(strategy)]
    if strategy.strategy == ALL:
        return ["per_language"]
    by_agreement = strategy.strategy in _AGREEMENT and strategy.band == "highest"
    return [rule for rule in rules if rule != "threshold" or by_agreement]


def is_studied(strategy: Strategy | Oracle, data: Sketched) -> bool:
    """Whether `select` is about the strategy: one that differs by its keep rule alone is for training."""
    return can_select(strategy, data) and (isinstance(strategy, str) or own_rule(strategy) == "per_language")


def can_select(strategy: Strategy | Oracle, data: Sketched) -> bool:
    """Whether the pairs have what the strategy goes by: not all were rated."""
    return isinstance(strategy, str) or set(needed_columns(strategy)) <= set(data.pairs.column_names)


def choose(strategy: Strategy | Oracle, drawn: Draw, seed: int) -> Choice:
    """The strategy's scores of a draw's pairs; `seed` is that of random orders.

    An oracle knows which labels were flipped; among pairs of the same label it has a random order.
    """
    data = drawn.data
    if isinstance(strategy, str):
        order = np.random.default_rng([seed, 1]).random(len(drawn.flipped))
        return Choice(strategy, np.where(drawn.flipped, 0.0, 1.0) + _RANDOM_ORDER * order)
    if strategy.blocks:
        data = data.of_blocks(strategy.blocks)
    # Which pairs are kept is asked of `kept`; this rule always keeps some.
    settings = strategy.model_copy(update={"seed": seed, "keep_rule": "per_language"})
    selection = select_pairs(settings, normalised(strategy, data.pairs), data.sketch)
    return Choice(strategy, selection.scores["score"].to_numpy(), selection)


def normalised(strategy: Strategy, pairs: pa.Table) -> pa.Table:
    """The pairs with the coefficients by which their gradients enter those of the languages.

    'tokens' divides by the tokens of a response, as losses over means do; exactly so only where both have as many,
    else by their mean. 'norm' divides by the length of u.
    """
    if strategy.normalise == "nothing":
        return pairs
    coefficients = pairs["coefficient"].to_numpy()
    if strategy.normalise == "norm":
        coefficients = coefficients / pairs["norm"].to_numpy()
    else:
        tokens = pairs["chosen_tokens"].to_numpy() + pairs["rejected_tokens"].to_numpy()
        coefficients = 2 * coefficients / tokens
    return replaced(pairs, "coefficient", pa.array(coefficients))


def facts(drawn: Draw, choice: Choice, rules: Sequence[KeepRule], fraction: float) -> Row:
    """What can be said of one strategy in one draw.

    auc: the probability that a pair with the right label has a higher score than one with a flipped label;
    auc_planted: among the pairs of the planted languages; auc_within: within a language, mean over those that
    have both; auc_se: standard error of auc over pairs (DeLong); auc_rating: the same of pairs rated 2 over 0
    against 2 over 1, where people rated. conflicting: the share with a negative cosine with the direction.
    healthy_cosine: mean cosine between gradients of languages that are not planted; planted_cosine: of those with
    the planted ones; least_cosine: the least of all. By keep rule: the share of flipped ones among the kept, or
    where none is flipped that of those kept and dropped that agree with the direction (cosine of 0 or more); of a
    threshold the share kept. None where there is nothing to say.
    """
    pairs, flipped, scores = drawn.data.pairs, drawn.flipped, choice.scores
    languages = drawn.data.languages
    ranked = isinstance(choice.strategy, str) or choice.strategy.strategy != ALL
    selection = choice.selection if ranked else None

    def auc(members: NDArray[np.bool_]) -> float | None:
        if not ranked:
            return None
        return area_under_curve(scores[members & ~flipped], scores[members & flipped])

    everyone = np.ones(len(flipped), dtype=np.bool_)
    within = [found for name in np.unique(languages) if (found := auc(languages == name)) is not None]
    row: Row = {
        "auc": auc(everyone),
        "auc_planted": auc(np.isin(languages, drawn.planted)),
        "auc_within": fmean(within) if within else None,
        "auc_se": delong_error(scores[~flipped], scores[flipped]) if ranked else None,
        "auc_rating": None,
        "conflicting": None if selection is None else float((selection.cosine < 0).mean()),
        **(_language_cosines(selection, drawn) if selection is not None and drawn.planted else {}),
    }
    if ranked and "chosen_score" in pairs.column_names:
        margin = pairs["chosen_score"].to_numpy() - pairs["rejected_score"].to_numpy()
        row["auc_rating"] = area_under_curve(scores[margin > 1], scores[margin <= 1])
    for rule in rules:
        kept = choice.kept(pairs, rule, fraction)
        if rule == "threshold":
            row["threshold_kept"] = float(kept.mean())
        if flipped.any():
            row[f"{rule}_flipped"] = float(flipped[kept].mean()) if kept.any() else None
        elif selection is not None:
            for name, members in (("kept", kept), ("dropped", ~kept)):
                agree = float((selection.cosine[members] >= 0).mean()) if members.any() else None
                row[f"{rule}_{name}_agreeing"] = agree
    return row


def _language_cosines(selection: Selection, drawn: Draw) -> Row:
    matrix = selection.cosine_before
    planted = np.isin(sorted(set(drawn.data.languages.tolist())), drawn.planted)
    other = ~np.eye(len(planted), dtype=np.bool_)

    def mean(members: NDArray[np.bool_]) -> float | None:
        return float(matrix[members].mean()) if members.any() else None

    return {
        "healthy_cosine": mean(other & ~planted & ~planted[:, None]),
        "planted_cosine": mean(other & (planted ^ planted[:, None])),
        "least_cosine": float(matrix[other].min()),
    }


def delong_error(higher: Float64Array, lower: Float64Array) -> float | None:
    """Standard error of `area_under_curve` over samples of pairs; None with fewer than two of either.

    sqrt(var(V) / m + var(W) / n), V being of each of the m of `higher` the share of `lower` below it, W of each of
    the n of `lower` the share of `higher` above it, ties counting half (DeLong, DeLong, Clarke-Pearson 1988).
    """
    if min(len(higher), len(lower)) < 2:
        return None
    above = (higher[:, None] > lower).astype(np.float64) + 0.5 * (higher[:, None] == lower)
    parts = [above.mean(axis=axis).var(ddof=1) / above.shape[1 - axis] for axis in (1, 0)]
    return float(math.sqrt(sum(parts)))


def over_draws(
    draws: Sequence[Draw], strategy: Strategy | Oracle, rules: Sequence[KeepRule], fraction: float
) -> Row:
    """Of every fact its values in all draws; None for a fact without a value in any."""
    rows = [facts(of, choose(strategy, of, seed), rules, fraction) for seed, of in enumerate(draws)]
    found: Row = {}
    for name in rows[0]:
        values = [_rounded(row[name]) for row in rows]
        found[name] = None if all(value is None for value in values) else values
    return found


def run_selection(
    protocol: Protocol, run: Folder, results: Results, datasets: Sequence[DatasetName] = DATASETS
) -> None:
    """Every result of the selection study of some datasets that is not there yet."""
    study = protocol.selection
    for dataset in datasets:
        data = slim(read_sketched(run, dataset, protocol.sketch.groups))
        for kind, describe in (("labels", label_facts), ("cosines", cosine_facts)):
            about = {"kind": kind, "dataset": dataset}
            if not results.has(about):
                results.add({**about, **describe(data)})
        some = {name: protocol.strategies[name] for name in study.block_strategies}
        parts: list[tuple[str, Sketched, dict[str, Strategy | Oracle]]] = [
            ("", data, {name: of for name, of in protocol.strategies.items() if is_studied(of, data)}),
            *((f"@{'+'.join(map(str, blocks))}", data.of_blocks(blocks), some) for blocks in study.blocks),
        ]
        plantings = [name for name, planting in protocol.plantings.items() if dataset in planting.datasets]
        logger.info(f"{dataset}: {len(plantings)} plantings")
        wanted = [
            (planting, *part)
            for planting in plantings
            for part in parts
            if not part[0] or planting in study.block_plantings
        ]
        progress = Progress(sum(len(strategies) for *_, strategies in wanted))
        for planting, suffix, part, strategies in wanted:
            draws: list[Draw] = []
            for name, strategy in strategies.items():
                about = {"kind": "selection", "dataset": dataset, "planting": planting}
                about["strategy"] = f"{name}{suffix}"
                if not results.has(about):
                    if not draws:
                        settings = protocol.plantings[planting]
                        draws = [draw(part, settings, study.share, seed) for seed in range(study.draws)]
                    # Of some blocks of layers the scores are wanted, not what is kept by them.
                    rules = [] if suffix else rules_of(strategy, study.rules)
                    results.add({**about, **over_draws(draws, strategy, rules, study.keep)})
                progress.add(1)
    if "alpaca" in datasets:
        run_subset(protocol, run, results)


def run_subset(protocol: Protocol, run: Folder, results: Results) -> None:
    """Sketched against exact gradients, and those with the embedding's part, on alpaca's subset."""
    gram = read_exact_gram(run)
    if gram is None:
        logger.info("no exact gradients yet: run `sketch` to the end")
        return
    whole = slim(read_sketched(run, "alpaca", protocol.sketch.groups))
    sketched = Sketched(subset(whole.pairs, protocol.selection.subset_per_language), whole.sketch)
    exact = with_coordinates(sketched.pairs, coordinates_of(gram[None]))
    embedded, share = with_embedding(run, sketched, gram)
    for against, other in (("sketched", sketched), ("with the embedding", embedded)):
        for name in protocol.selection.subset_strategies:
            strategy, about = protocol.strategies[name], {"kind": "against", "against": against, "strategy": name}
            if not isinstance(strategy, str) and not results.has(about):
                row = compared(protocol, strategy, exact, other)
                if other is embedded:
                    row["embedding_share"] = round(share, 4)
                results.add({**about, **row})


def compared(protocol: Protocol, strategy: Strategy, one: Sketched, other: Sketched) -> Row:
    """A strategy's selection from `one` and `other`, which are different gradients of the same pairs.

    Of all pairs: rank correlation of the cosines between pairs, of the scores with and without the pair itself in
    the direction, and the share of the kept half in common. Of the detailed planting's draws: both AUCs.
    """
    everything = (
        Draw(one, np.zeros(len(one.pairs), np.bool_), ()),
        Draw(other, np.zeros(len(one.pairs), np.bool_), ()),
    )
    upper = np.triu_indices(len(one.pairs), 1)
    cosines = [_pair_cosines(of.data)[upper] for of in everything]
    row: Row = {
        "pairs": len(one.pairs),
        "cosines_rank_correlation": rank_correlation(*cosines),
        "cosines_error": float(np.sqrt(np.mean((cosines[0] - cosines[1]) ** 2))),
    }
    languages = [choose(strategy, of, 0).selection for of in everything]
    assert languages[0] is not None and languages[1] is not None  # no oracle
    row["languages_error"] = float(np.abs(languages[0].cosine_before - languages[1].cosine_before).max())
    for name, settings in (("", strategy), ("_without_pair", strategy.model_copy(update={"leave_out": "pair"}))):
        choices = [choose(settings, of, 0) for of in everything]
        kept = [
            choice.kept(of.data.pairs, "per_language", 0.5) for choice, of in zip(choices, everything, strict=True)
        ]
        row[f"rank_correlation{name}"] = rank_correlation(choices[0].scores, choices[1].scores)
        row[f"kept_in_common{name}"] = float((kept[0] & kept[1]).sum() / kept[0].sum())
    planting = protocol.plantings[protocol.selection.detailed]
    aucs: list[tuple[float | None, float | None]] = []
    for seed in range(protocol.selection.draws):
        drawn = [draw(data, planting, 1.0, seed) for data in (one, other)]
        first, second = (facts(of, choose(strategy, of, seed), [], 0.5)["auc"] for of in drawn)
        aucs.append((first, second))
    row["auc"], row["auc_other"] = ([_rounded(pair[side]) for pair in aucs] for side in (0, 1))
    return {name: _rounded(value) for name, value in row.items()}


def label_facts(data: Sketched) -> Row:
    """What the lengths and log-probabilities alone say of the labels, of all pairs and by language.

    longer: the probability that chosen is the longer response in tokens, ties counting half: the AUC of length as
    a predictor of the label. likelier: the same of log p, likelier_per_token: of log p / tokens.
    """
    columns = {
        name: data.pairs[name].to_numpy()
        for name in data.pairs.column_names
        if name.startswith(("chosen_", "rejected_"))
    }
    lengths = [columns[f"{side}_tokens"].astype(np.float64) for side in ("chosen", "rejected")]
    logps = [columns[f"{side}_logps"] for side in ("chosen", "rejected")]
    means = [logp / length for logp, length in zip(logps, lengths, strict=True)]

    def higher(values: Sequence[Float64Array], members: NDArray[np.bool_]) -> float:
        first, second = (side[members] for side in values)
        return round(float((first > second).mean() + 0.5 * (first == second).mean()), 4)

    groups = {"*": np.ones(len(data.pairs), np.bool_)} | {
        str(name): data.languages == name for name in np.unique(data.languages)
    }
    return {
        "pairs": {name: int(members.sum()) for name, members in groups.items()},
        **{
            what: {name: higher(values, members) for name, members in groups.items()}
            for what, values in (("longer", lengths), ("likelier", logps), ("likelier_per_token", means))
        },
    }


def cosine_facts(data: Sketched) -> Row:
    """The cosines between the languages' gradients, of all layers and of each block; the norms of the pairs' u."""

    def matrix(of: Sketched) -> list[list[float]]:
        found = choose(Strategy(), Draw(of, np.zeros(len(of.pairs), np.bool_), ()), 0).selection
        assert found is not None
        return [[round(float(value), 4) for value in row] for row in found.cosine_before]

    coordinates = data.coordinates().astype(np.float64)
    squares = (coordinates**2).sum(axis=2)
    norms = np.sqrt(squares.sum(axis=1))
    upper = np.triu_indices(len(norms), 1)
    cosines = _pair_cosines(data)
    same = (data.languages[:, None] == data.languages)[upper]
    return {
        "languages": sorted(set(data.languages.tolist())),
        "matrix": matrix(data),
        "blocks": [matrix(data.of_blocks([block])) for block in range(data.blocks)],
        "block_shares": [
            round(float(share), 4) for share in (squares / squares.sum(axis=1)[:, None]).mean(axis=0)
        ],
        "norms": [round(float(value), 3) for value in np.quantile(norms, [0.05, 0.5, 0.95])],
        "pair_cosine_same_language": round(float(cosines[upper][same].mean()), 4),
        "pair_cosine_other_language": round(float(cosines[upper][~same].mean()), 4),
    }


def slim(data: Sketched) -> Sketched:
    """Without the texts, which no selection looks at."""
    return Sketched(data.pairs.drop_columns([n for n in _TEXTS if n in data.pairs.column_names]), data.sketch)


def _pair_cosines(data: Sketched) -> Float64Array:
    """Cosines (N, N) between the pairs' gradients."""
    flat = data.coordinates().reshape(len(data.pairs), -1).astype(np.float64)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    return flat @ flat.T


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS) if math.isfinite(value) else None
    return value
