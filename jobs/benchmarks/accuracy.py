"""How near sketches come to exact gradients.

    python jobs/benchmarks/accuracy.py PREFERENCES --model FOLDER --out FILE

Takes the model in FOLDER, or with --small-llama FOLDER trains a small Llama a little on the preferences (once;
kept there). One pass finds the languages' exact gradients and from them the exact de-conflicted direction; the
next finds every pair's exact cosine with it and sketches every pair in many ways: count-sketches of several
widths, folds and seeds, and, where asked, Gaussian projections layer by layer: two-sided, the way of LoGra and
bergson, or one-sided, the way of Flora and of ConGrad's paper. Sketches are linear, so those of the languages'
gradients are made of the exact ones, and of the pairs' sketches only their inner products are kept.

With --ema-decay the languages' gradients are moving averages over mini-batches too, as the paper has them: for
the one-sided ways, and for the exact gradients to tell what of it is the average's doing. What they are held
against is still the exact selection by the means.

Results are for every number of pairs in --pairs, drawn evenly by language, the smaller ones being part of the
larger. For each way: the bytes of a pair, the error of the cosine with the direction (root mean square), its rank
correlation and the overlap of the kept half, as the mean and range over seeds; what theory says of error and
overlap; and the rank correlation that a run's audit reports, which compares pairs of a micro-batch with the mean
of the others. Last, the sketches of `sketch_pairs` itself with the model in float32 and in bfloat16, the cosine of
each pair's two, and its speed against the floor. Everything else is float32, without TF32.

PREFERENCES is JSONL with language and either the texts prompt, chosen and rejected, or their token ids:
prompt_ids, chosen_ids and rejected_ids.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from congrad_ray.config.recipe import Select
from congrad_ray.modeling.batching import token_budget_batches
from congrad_ray.modeling.packing import PairTokens
from congrad_ray.modeling.shared_prompts import attention_over, completion_sums
from congrad_ray.modeling.tokenization import TokenizedPair, load_tokenizer, tokenize_pair
from congrad_ray.stages.select.keep import keep_top_fraction
from congrad_ray.stages.select.scores import PairProducts, Surgery, make_direction
from congrad_ray.stages.select.scores import agreement as agreement_with
from congrad_ray.stages.select.shares import pair_shares
from congrad_ray.stages.sketch.audit import cosines_with_others, rank_correlation
from congrad_ray.stages.sketch.capture import GradientCapture, pair_segments
from congrad_ray.stages.sketch.countsketch import CountSketch, FoldRule
from congrad_ray.stages.sketch.exact import LayerVectors, add_weighted_sums_
from congrad_ray.stages.sketch.sketcher import sketch_pairs
from congrad_ray.stages.sketch.storage import to_storage

Float64Array = NDArray[np.float64]
FOLDS = {"auto256": FoldRule(min_side=256), "auto512": FoldRule(min_side=512)}  # and plain numbers
AUDITED = 8  # pairs that an audit compares with each other
DRAWS = 200  # of pairs, for the spread of rank correlations of a few
MOST_PAIRS = 32  # of a micro-batch: their gradients of one layer exist together


@dataclass(frozen=True)
class Way:
    """A way of sketching: a count-sketch of a fold and width, two-sided projections to `side` x `side`, or
    one-sided ones to `rank`."""

    fold: str = ""
    width: int = 0
    side: int = 0
    rank: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        if self.rank:
            return f"one-sided {self.rank}"
        return f"two-sided {self.side} x {self.side}" if self.side else f"count-sketch fold {self.fold}"


class _TwoSided:
    """Two-sided projections of every layer, one after the other."""

    def __init__(self, side: int, layers: Sequence[str]) -> None:
        self.side = side
        self._place = {name: index for index, name in enumerate(layers)}
        self._matrices: dict[tuple[str, str], Tensor] = {}
        self.width = side * side * len(layers)

    def _matrix(self, name: str, which: str, features: int, device: torch.device) -> Tensor:
        if (name, which) not in self._matrices:
            generator = torch.Generator().manual_seed(self._place[name] * 2 + (which == "outputs"))
            matrix = torch.randn((features, self.side), generator=generator) / self.side**0.5
            self._matrices[name, which] = matrix.to(device)
        return self._matrices[name, which]

    def add_(self, table: Tensor, name: str, layer: Tensor) -> None:
        """Adds the projections of (B, out, in) to the rows (B, width) of the table."""
        start = self._place[name] * self.side**2
        left = self._matrix(name, "outputs", layer.shape[1], layer.device)
        right = self._matrix(name, "inputs", layer.shape[2], layer.device)
        table[:, start : start + self.side**2] = (left.T @ layer @ right).flatten(1)


class _OneSided:
    """A projection of every layer on one side, one after the other: G A / sqrt(rank) with A (in, rank), or
    A^T G / sqrt(rank) with A (out, rank), A of standard normal numbers (Hao et al. 2024, Flora, arXiv 2402.03293).

    It is the longer side that is projected, so that a layer has min(out, in) * rank numbers; inner products are
    those of the gradients on average.
    """

    def __init__(self, rank: int, seed: int, layers: Mapping[str, tuple[int, int]]) -> None:
        self._rank, self._seed = rank, seed
        self._place = {name: index for index, name in enumerate(layers)}
        sizes = [min(shape) * rank for shape in layers.values()]
        self._starts = np.cumsum([0, *sizes]).tolist()
        self._matrices: dict[str, Tensor] = {}
        self.width = sum(sizes)

    def _matrix(self, name: str, features: int, device: torch.device) -> Tensor:
        if name not in self._matrices:
            generator = torch.Generator().manual_seed(self._seed * len(self._place) + self._place[name])
            matrix = torch.randn((features, self._rank), generator=generator) / self._rank**0.5
            self._matrices[name] = matrix.to(device)
        return self._matrices[name]

    def add_(self, table: Tensor, name: str, layer: Tensor) -> None:
        """Adds the projections of (B, out, in) to the rows (B, width) of the table."""
        outputs, inputs = layer.shape[1:]
        matrix = self._matrix(name, max(outputs, inputs), layer.device)
        projected = layer @ matrix if inputs >= outputs else matrix.T @ layer
        place = self._place[name]
        table[:, self._starts[place] : self._starts[place + 1]] = projected.flatten(1)


class Sketchers:
    """All ways at once. Ways of one fold and seed share the folded gradients."""

    def __init__(self, ways: Sequence[Way], layers: Mapping[str, tuple[int, int]]) -> None:
        self._counts = {way: CountSketch(way.width, way.seed, _fold_rule(way.fold)) for way in ways if way.fold}
        self._projections: dict[Way, _TwoSided | _OneSided] = {
            way: _OneSided(way.rank, way.seed, layers) if way.rank else _TwoSided(way.side, list(layers))
            for way in ways
            if way.rank or way.side
        }
        self._shared: dict[tuple[str, int], list[Way]] = {}
        for way in self._counts:
            self._shared.setdefault((way.fold, way.seed), []).append(way)

    def tables(self, vectors: int, device: torch.device) -> dict[Way, Tensor]:
        """Empty tables for this many vectors."""
        return {
            **{way: sketch.table(vectors, device) for way, sketch in self._counts.items()},
            **{
                way: torch.zeros(vectors, projection.width, device=device)
                for way, projection in self._projections.items()
            },
        }

    def add_(self, tables: dict[Way, Tensor], name: str, layer: Tensor) -> None:
        """Adds one layer (B, out, in) of every vector."""
        for ways in self._shared.values():
            folding = self._counts[ways[0]]  # folds do not depend on the width
            folded = folding.fold_inputs(name, layer)
            folded = folding.fold_outputs(name, folded.transpose(1, 2)).transpose(1, 2).contiguous()
            for way in ways:
                self._counts[way].add_(tables[way], name, folded)
        for way, projection in self._projections.items():
            projection.add_(tables[way], name, layer)

    def sketches(self, tables: dict[Way, Tensor]) -> Iterator[tuple[Way, Tensor]]:
        """The finished sketches (B, width) of every way, one after the other."""
        for way, table in tables.items():
            yield way, self._counts[way].sketches(table) if way.fold else table


def _fold_rule(fold: str) -> FoldRule:
    return FOLDS[fold] if fold in FOLDS else FoldRule(int(fold))


@dataclass(frozen=True)
class Products:
    """Inner products of N pairs with V vectors, and of the vectors with each other."""

    dots: Float64Array  # (N, V)
    norms: Float64Array  # (N,)
    gram: Float64Array  # (V, V)

    def cosines(self, members: NDArray[np.int64], vectors: slice) -> Float64Array:
        """Cosines of some pairs with PCGrad's direction of some of the vectors."""
        return cosines_with_pcgrad(self.dots[members, vectors], self.norms[members], self.gram[vectors, vectors])


@dataclass
class Found:
    """What the second pass finds."""

    exact: Products
    sketched: dict[tuple[Way, str], Products]  # by way and dtype
    audited: list[Float64Array]  # exact cosines with the others of a group of eight
    audited_sketched: dict[Way, list[Float64Array]]
    fold_variances: dict[str, Float64Array]  # by fold: of <u, direction> / (|u| |direction|), for the first pairs


class _Exact:
    """A visitor that forms the gradients of each layer and hands all of them on."""

    def __init__(self, use: Callable[[str, Tensor], None]) -> None:
        self._use = use

    def keep(self, name: str, inputs: Tensor) -> Tensor:
        return inputs

    def visit(self, name: str, kept: Tensor, gradients: Tensor, starts: Sequence[int]) -> None:
        layer = kept.new_empty(len(starts) - 1, gradients.shape[1], kept.shape[1])
        for pair, part in pair_segments(starts):
            torch.mm(gradients[part].T, kept[part], out=layer[pair])
        self._use(name, layer)


def language_gradients(
    capture: GradientCapture,
    pairs: list[TokenizedPair],
    max_tokens: int,
    subsets: list[NDArray[np.int64]],
    index: NDArray[np.int64],
    averages: list[Select],
) -> LayerVectors:
    """The exact gradients of the languages of every subset, subset by subset, by the first of the `averages`; then
    by the next."""
    languages = int(index.max()) + 1
    vectors: LayerVectors = {}
    shares = np.zeros((len(averages) * len(subsets) * languages, len(pairs)), dtype=np.float32)
    for number, (average, members) in enumerate(itertools.product(averages, subsets)):
        shares[number * languages + index[members], members] = pair_shares(average, index[members])
    for rows, batch in _batches(capture, pairs, max_tokens, "exact language gradients"):
        add_weighted_sums_(vectors, torch.from_numpy(shares[:, rows]), capture, batch)
    return vectors


def sketch_and_compare(
    capture: GradientCapture,
    pairs: list[TokenizedPair],
    max_tokens: int,
    vectors: LayerVectors,
    ways: list[Way],
    direction: Float64Array,
    theory_pairs: int,
) -> Found:
    """The second pass. `direction` (V,) is the first subset's, made of the vectors; theory is for it."""
    device = capture.model.device
    count = len(direction)
    sketchers = Sketchers(ways, {name: _shape(layer) for name, layer in vectors.items()})
    tables = sketchers.tables(count, device)
    exact_gram = torch.zeros((count, count), dtype=torch.float64, device=device)
    for name, layer in vectors.items():
        exact_gram += _gram(layer)
        sketchers.add_(tables, name, layer)
    of_vectors = dict(sketchers.sketches(tables))
    found = {
        key: (np.zeros((len(pairs), count)), np.zeros(len(pairs)))
        for key in ((way, dtype) for way in ways for dtype in ("float32", "int8"))
    }
    exact_dots, exact_squares = np.zeros((len(pairs), count)), np.zeros(len(pairs))
    audited: list[Float64Array] = []
    audited_sketched: dict[Way, list[Float64Array]] = {way: [] for way in ways}
    folds = sorted({way.fold for way in ways if way.fold})
    variances = {fold: np.zeros(theory_pairs) for fold in folds}
    lengths = torch.tensor(direction, device=device, dtype=torch.float32)
    total = float(direction @ exact_gram.cpu().numpy() @ direction)
    for members, batch in _batches(capture, pairs, max_tokens, "exact cosines and sketches"):
        tables = sketchers.tables(len(members), device)
        dots = torch.zeros((len(members), count), dtype=torch.float64, device=device)
        gram = torch.zeros((len(members), len(members)), dtype=torch.float64, device=device)
        with_theory = [row for row, member in enumerate(members) if member < theory_pairs]
        numerators = {fold: torch.zeros(len(members), dtype=torch.float64, device=device) for fold in folds}

        def use(
            name: str,
            layer: Tensor,
            tables: dict[Way, Tensor] = tables,
            dots: Tensor = dots,
            gram: Tensor = gram,
            with_theory: list[int] = with_theory,
            numerators: dict[str, Tensor] = numerators,
        ) -> None:
            flat = layer.flatten(1)
            dots.add_((flat @ vectors[name].flatten(1).T).double())
            gram.add_(_gram(layer))
            sketchers.add_(tables, name, layer)
            if with_theory:
                towards = torch.tensordot(lengths, vectors[name], dims=1)
                for row in with_theory:
                    parts = _fold_parts(layer[row], towards)
                    for fold in folds:
                        numerators[fold][row] += _fold_variance(parts, _fold_rule(fold), *towards.shape)

        capture.run(batch, _Exact(use))
        exact_dots[members] = dots.cpu().numpy()
        exact_squares[members] = gram.diagonal().cpu().numpy()
        for row in with_theory:
            scale = exact_squares[members[row]] * total
            for fold in folds:
                variances[fold][members[row]] = float(numerators[fold][row]) / scale
        groups = [slice(start, start + AUDITED) for start in range(0, len(members) - AUDITED + 1, AUDITED)]
        whole = gram.cpu().numpy()
        audited += [cosines_with_others(whole[group, group]) for group in groups]
        for way, sketches in sketchers.sketches(tables):
            for dtype in ("float32", "int8"):
                values = sketches if dtype == "float32" else _int8(sketches)
                found[way, dtype][0][members] = (values @ of_vectors[way].T).double().cpu().numpy()
                found[way, dtype][1][members] = torch.linalg.vector_norm(values, dim=1).double().cpu().numpy()
            if groups:
                whole = _gram(sketches).cpu().numpy()
                audited_sketched[way] += [cosines_with_others(whole[group, group]) for group in groups]
    grams = {way: _gram(values).cpu().numpy() for way, values in of_vectors.items()}
    return Found(
        Products(exact_dots, np.sqrt(exact_squares), exact_gram.cpu().numpy()),
        {key: Products(*values, grams[key[0]]) for key, values in found.items()},
        audited,
        audited_sketched,
        variances,
    )


def _gram(vectors: Tensor) -> Tensor:
    """Inner products (B, B) float64 of vectors (B, ...)."""
    flat = vectors.flatten(1)
    products = (flat @ flat.T).double()
    return (products + products.T) / 2  # equal up to rounding


def _int8(sketches: Tensor) -> Tensor:
    """What is left of sketches stored as int8, as `to_storage` does, on their device."""
    scale = sketches.abs().amax(dim=1, keepdim=True) / 127.0
    return (sketches / torch.where(scale > 0, scale, 1.0)).round() * scale


def _fold_parts(x: Tensor, y: Tensor) -> list[float]:
    """What the variance of <fold(x), fold(y)> is made of, for matrices x and y (out, in)."""
    outputs, inputs = x @ y.T, x.T @ y
    symmetric = [
        float((matrix + matrix.T).square().sum() - 4 * matrix.diagonal().square().sum()) / 2
        for matrix in (outputs, inputs)
    ]
    rest = x.square().sum() * y.square().sum() + (x * y).sum() ** 2
    return [*symmetric, float(rest + outputs.square().sum() + inputs.square().sum())]


def _fold_variance(parts: list[float], rule: FoldRule, outputs: int, inputs: int) -> float:
    """The variance of the inner product of two folded matrices x and y over the random folds.

    Two different features of a side of n share a place with probability p = (fold - 1) / n, with a random sign.
    So with p for outputs, q for inputs and all sums over different features,

        p |xy^T + yx^T|^2 / 2 + q |x^T y + y^T x|^2 / 2 + p q (|x|^2 |y|^2 + <x, y>^2 + |xy^T|^2 + |x^T y|^2).

    For x = y of rank one this is what `stages.sketch.countsketch` names.
    """
    p, q = (rule(outputs) - 1) / outputs, (rule(inputs) - 1) / inputs
    return p * parts[0] + q * parts[1] + p * q * parts[2]


def cosines_with_pcgrad(dots: Float64Array, norms: Float64Array, gram: Float64Array) -> Float64Array:
    """Cosines (N,) of vectors with PCGrad's direction, from their products (N, L) with the languages' own."""
    nobody = np.zeros(len(dots))
    products = PairProducts(dots[:, None], norms[:, None] ** 2, nobody.astype(np.int64), nobody, nobody)
    return agreement_with(products, make_direction(gram[None], Surgery())).cosine


def agreement(cosines: Float64Array, exact: Float64Array, index: NDArray[np.int64]) -> dict[str, float]:
    """Of sketched cosines (N,) against the exact ones of pairs of the languages `index` (N,).

    `scatter` is the error without what all pairs of a language have in common, which changes no ranking within it;
    `predicted_overlap` the overlap of upper halves of two jointly normal scores of the same correlation within
    languages, 1 - arccos(rho) / pi.
    """
    ids = [f"{number:08}" for number in range(len(exact))]
    groups = [str(language) for language in index]
    kept = [keep_top_fraction(values, ids, 0.5, groups) for values in (exact, cosines)]
    counts = np.maximum(1, np.bincount(index))

    def within(values: Float64Array) -> Float64Array:
        centred: Float64Array = values - (np.bincount(index, values) / counts)[index]
        return centred

    one, other = within(exact), within(cosines)
    scale = float(np.linalg.norm(one) * np.linalg.norm(other))
    correlation = float(np.clip(one @ other / scale, -1, 1)) if scale else float("nan")
    return {
        "error": float(np.sqrt(np.mean((cosines - exact) ** 2))),
        "scatter": float(within(cosines - exact).std()),
        "rank_correlation": rank_correlation(exact, cosines),
        "correlation_within": correlation,
        "overlap": float((kept[0] & kept[1]).sum() / kept[0].sum()),
        "predicted_overlap": 1 - math.acos(correlation) / math.pi,
    }


def summarise(
    found: Found, ways: list[Way], subsets: list[NDArray[np.int64]], index: NDArray[np.int64], theory_pairs: int
) -> list[dict[str, Any]]:
    """One row for every number of pairs, way and dtype: means over seeds, and their ranges.

    Where the vectors have moving averages behind the means, one-sided ways have rows by them too, and so do the
    exact gradients.
    """
    languages = int(index.max()) + 1
    rows = []
    behind = len(subsets) * languages
    for number, members in enumerate(subsets):
        vectors = slice(number * languages, (number + 1) * languages)
        moving = slice(vectors.start + behind, vectors.stop + behind)
        exact = found.exact.cosines(members, vectors)
        if len(found.exact.gram) > behind:
            by_averages = [found.exact.cosines(members, moving)]
            rows.append(_row(Way(), "exact, EMA", "float32", exact, by_averages, index[members]))
        for first in [way for way in ways if way.seed == 0]:
            same = [way for way in ways if replace(way, seed=0) == first]
            for dtype in ("float32", "int8"):
                cosines = [found.sketched[way, dtype].cosines(members, vectors) for way in same]
                row = _row(first, first.name, dtype, exact, cosines, index[members])
                if first.fold and number == 0 and theory_pairs:
                    row |= _theory(found, first, exact[:theory_pairs], [each[:theory_pairs] for each in cosines])
                rows.append(row)
                if first.rank and len(found.exact.gram) > behind:
                    cosines = [found.sketched[way, dtype].cosines(members, moving) for way in same]
                    rows.append(_row(first, f"{first.name}, EMA", dtype, exact, cosines, index[members]))
    return rows


def _row(
    way: Way, name: str, dtype: str, exact: Float64Array, cosines: list[Float64Array], index: NDArray[np.int64]
) -> dict[str, Any]:
    """The agreement of some seeds' cosines with the exact ones."""
    results = [agreement(values, exact, index) for values in cosines]
    row: dict[str, Any] = {
        "pairs": len(exact),
        "way": name,
        "fold": way.fold,
        "side": way.side,
        "rank": way.rank,
        "width": way.width,
        "dtype": dtype,
        "bytes": way.width * (4 if dtype == "float32" else 1),
        "seeds": len(cosines),
        "spread_of_exact": float(exact.std()),
        "mean_of_exact": float(exact.mean()),
    }
    for key in results[0]:
        values = [result[key] for result in results]
        row[key] = statistics.fmean(values)
        row[f"{key}_range"] = [min(values), max(values)]
    return row


def _theory(found: Found, way: Way, exact: Float64Array, cosines: list[Float64Array]) -> dict[str, float]:
    """The predicted and the measured error of the first pairs, and the part of it that more width does not lower.

    A cosine r that is found from sketches of width w varies by (1 - r^2)^2 / w, and by what the folds add.
    """
    folds = found.fold_variances[way.fold]
    width = np.mean((1 - exact**2) ** 2) / way.width
    return {
        "theory_pairs": len(exact),
        "theory_error": float(np.sqrt(width + folds.mean())),
        "theory_fold_error": float(np.sqrt(folds.mean())),
        "measured_error": float(np.sqrt(np.mean([(each - exact) ** 2 for each in cosines]))),
    }


def audits(found: Found, ways: list[Way], subset: NDArray[np.int64], vectors: slice) -> list[dict[str, Any]]:
    """What a run's audit would report for every fold and width, beside the same of cosines with the direction.

    An audit looks at a few pairs; for 24 of them (three groups of eight) and 24 drawn from all: mean and 5th and
    95th percentile of the rank correlation.
    """
    if not found.audited:
        return []
    random = np.random.default_rng(0)
    groups = random.integers(len(found.audited), size=(DRAWS, 3))
    singles = random.integers(len(subset), size=(DRAWS, 3 * AUDITED))
    exact = found.exact.cosines(subset, vectors)
    others = np.concatenate(found.audited)
    rows = []
    for way in ways:
        if way.seed:
            continue
        sketched = found.audited_sketched[way]
        direction = found.sketched[way, "float32"].cosines(subset, vectors)
        of_groups = [
            rank_correlation(
                np.concatenate([found.audited[group] for group in draw]),
                np.concatenate([sketched[group] for group in draw]),
            )
            for draw in groups
        ]
        of_singles = [rank_correlation(exact[draw], direction[draw]) for draw in singles]
        rows.append(
            {
                "way": way.name,
                "fold": way.fold,
                "width": way.width,
                "pairs": len(others),
                "with_others": rank_correlation(others, np.concatenate(sketched)),
                "with_others_error": float(np.sqrt(np.mean((np.concatenate(sketched) - others) ** 2))),
                "spread_with_others": float(others.std()),
                "with_direction": rank_correlation(exact, direction),
                "spread_with_direction": float(exact.std()),
                "with_others_of_24": _spread(of_groups),
                "with_direction_of_24": _spread(of_singles),
            }
        )
    return rows


def _spread(values: list[float]) -> dict[str, float]:
    low, high = np.nanpercentile(values, [5, 95])
    return {"mean": float(np.nanmean(values)), "p5": float(low), "p95": float(high)}


def enough(rows: list[dict[str, Any]], wanted: float = 0.98) -> list[dict[str, Any]]:
    """For every number of pairs and fold the smallest width that keeps `wanted` of the half in common, as int8."""
    found = []
    chosen = [row for row in rows if row["fold"] and row["dtype"] == "int8"]
    for pairs, fold in sorted({(row["pairs"], row["fold"]) for row in chosen}):
        same = [row for row in chosen if (row["pairs"], row["fold"]) == (pairs, fold)]
        good = [row for row in same if row["overlap"] >= wanted]
        widest = max(same, key=lambda row: row["width"])
        # Unfolded, scatter falls as 1 / sqrt(width); the correlation must reach cos(pi (1 - wanted)).
        # There is none within languages of one pair each.
        noise = widest["correlation_within"] ** -2 - 1
        by_theory = widest["width"] * noise / math.tan(math.pi * (1 - wanted)) ** 2
        found.append(
            {
                "pairs": pairs,
                "fold": fold,
                "width": min((row["width"] for row in good), default=None),
                "best_overlap": max(row["overlap"] for row in same),
                "width_by_theory_if_unfolded": round(by_theory) if math.isfinite(by_theory) else None,
            }
        )
    return found


def by_sketch_pairs(
    model: PreTrainedModel,
    pairs: list[TokenizedPair],
    index: NDArray[np.int64],
    exact: Float64Array,
    first: Float64Array | None,
) -> tuple[dict[str, Any], Float64Array]:
    """The default sketches of the library, int8, against the exact cosines, and the sketches, (N, width).

    With `first`, the sketches of another dtype: quantiles (0, .05, .25, .5) of each pair's cosine between the two.
    """
    whole = torch.zeros(len(pairs), 32768)
    with GradientCapture(model) as capture:
        sketch = CountSketch(32768, 0)
        for members, batch in _batches(capture, pairs, 8192, f"sketch_pairs in {model.dtype}"):
            whole[members] = sketch_pairs(capture, sketch, batch).sketches.cpu()
    stored, scales = to_storage(whole, "int8")
    numbers: Float64Array = stored.astype(np.float64) * scales[:, None]
    gradients = np.stack([numbers[index == number].mean(axis=0) for number in range(int(index.max()) + 1)])
    products = Products(numbers @ gradients.T, np.linalg.norm(numbers, axis=1), gradients @ gradients.T)
    cosines = products.cosines(np.arange(len(pairs)), slice(None))
    row = {"model": str(model.dtype), "pairs": len(pairs), **agreement(cosines, exact, index)}
    if first is not None:
        norms = np.linalg.norm(first, axis=1) * np.linalg.norm(numbers, axis=1)
        with_first = (first * numbers).sum(axis=1) / norms
        row["with_first"] = np.quantile(with_first, [0, 0.05, 0.25, 0.5]).tolist()
    return row, numbers


def speed(model: PreTrainedModel, pairs: list[TokenizedPair], ways: list[Way]) -> list[dict[str, Any]]:
    """Seconds of `sketch_pairs` over those of the forward and the backward to the inputs alone; medians."""

    def floor(capture: GradientCapture, batch: PairTokens) -> None:
        with torch.enable_grad(), attention_over(capture.model, batch) as arguments:
            completion_sums(capture.model, batch, arguments).sum().backward()

    with GradientCapture(model) as capture:
        members = token_budget_batches([pair.padded_tokens for pair in pairs], 8192)
        places = np.linspace(0, len(members) - 1, 5).round().astype(int)[1:]
        batches = [capture.layout([pairs[index] for index in members[place]]) for place in places]
        methods: dict[str, Callable[[PairTokens], object]] = {"floor": partial(floor, capture)}
        widest = max(way.width for way in ways)
        for way in ways:
            if way.fold and way.seed == 0 and way.width in (32768, widest):
                sketch = CountSketch(way.width, 0, _fold_rule(way.fold))
                methods[f"fold {way.fold}, width {way.width}"] = partial(sketch_pairs, capture, sketch)
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for number, batch in enumerate([batches[-1], *batches]):
            for name, method in methods.items():
                start = _now(model.device)
                method(batch)
                if number:
                    seconds[name].append(_now(model.device) - start)
    return [
        {
            "model": str(model.dtype),
            "method": name,
            "over_floor": statistics.median(np.array(values) / np.array(seconds["floor"])),
            "positions_per_second": sum(batch.positions for batch in batches) / sum(values),
        }
        for name, values in seconds.items()
    ]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _batches(
    capture: GradientCapture, pairs: list[TokenizedPair], max_tokens: int, what: str
) -> Iterator[tuple[list[int], PairTokens]]:
    groups = token_budget_batches([pair.padded_tokens for pair in pairs], max_tokens)
    batches = [group[start : start + MOST_PAIRS] for group in groups for start in range(0, len(group), MOST_PAIRS)]
    start = time.monotonic()
    for number, members in enumerate(batches):
        yield members, capture.layout([pairs[member] for member in members])
        if number % 20 == 0 or number == len(batches) - 1:
            print(
                f"{what}: {number + 1}/{len(batches)} micro-batches, {time.monotonic() - start:.0f} s", flush=True
            )


def read_pairs(arguments: argparse.Namespace) -> tuple[list[TokenizedPair], list[str]]:
    """The pairs of the file that are not too long, and their languages."""
    rows = [json.loads(line) for line in arguments.preferences.read_text(encoding="utf-8").splitlines()]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    if names[0] in rows[0]:
        pairs = [TokenizedPair(*(row[name] for name in names)) for row in rows]
        fitting = [pair.longest_row <= arguments.max_length for pair in pairs]
        languages = [row["language"] for row, fits in zip(rows, fitting, strict=True) if fits]
        return [pair for pair, fits in zip(pairs, fitting, strict=True) if fits], languages
    template = arguments.chat_template.read_text(encoding="utf-8") if arguments.chat_template else None
    tokenizer = load_tokenizer(str(arguments.model), template)
    chat = arguments.chat or template is not None
    pairs, languages = [], []
    for row in rows:
        texts: list[Any] = [row["prompt"], row["chosen"], row["rejected"]]
        if chat:
            texts = [
                [{"role": role, "content": text}]
                for role, text in zip(("user", "assistant", "assistant"), texts, strict=True)
            ]
        try:
            pairs.append(tokenize_pair(tokenizer, texts[0], texts[1], texts[2], arguments.max_length))
        except ValueError:
            continue
        languages.append(row["language"])
    return pairs, languages


def evenly(languages: list[str], seed: int) -> NDArray[np.int64]:
    """All pairs in an order whose every beginning holds the languages as evenly as can be."""
    random = np.random.default_rng(seed)
    turns = np.zeros(len(languages))
    values = np.asarray(languages)
    for language in np.unique(values):
        members = random.permutation(np.flatnonzero(values == language))
        turns[members] = np.arange(len(members))
    return np.lexsort((values, turns))


def main() -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preferences", type=Path, help="JSONL; see above")
    parser.add_argument("--model", type=Path, help="folder of a model; with texts, of its tokenizer too")
    parser.add_argument("--small-llama", type=Path, metavar="FOLDER", help="train one, and keep it here")
    parser.add_argument("--out", type=Path, required=True, help="JSON; the tables go beside it as .md")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--chat", action="store_true", help="texts through the tokenizer's chat template")
    parser.add_argument("--chat-template", type=Path, help="texts through this Jinja template")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a row; longer pairs are left out")
    parser.add_argument("--pairs", default="200", help="numbers of pairs, as 200,1000,all")
    parser.add_argument("--draw-seed", type=int, default=0)
    parser.add_argument("--folds", default="auto256,auto512,1,2,4", help="auto512 leaves sides of 512")
    parser.add_argument("--widths", default="8192,16384,32768,65536,131072,262144,524288")
    parser.add_argument("--sides", default="", help="of two-sided projections, as 8,16")
    parser.add_argument("--ranks", default="", help="of one-sided projections, as 1,2,4")
    parser.add_argument(
        "--ema-decay", type=float, help="of moving averages as the languages' gradients; see above"
    )
    parser.add_argument("--ema-batch-size", type=int, default=32, help="pairs of a language in a mini-batch of it")
    parser.add_argument("--seeds", type=int, default=3, help="of sketches")
    parser.add_argument("--theory-pairs", type=int, default=200, help="pairs whose error theory foretells")
    parser.add_argument("--max-tokens", type=int, default=8192, help="padded tokens of a micro-batch")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a little slower")
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--hidden-size", type=int, default=128, help="of the small Llama")
    parser.add_argument("--layers", type=int, default=4, help="of the small Llama")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.small_llama is None):
        parser.error("give either --model or --small-llama")
    torch.set_num_threads(arguments.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Everything, with the results written after each part."""
    if arguments.small_llama is not None:
        folder, pairs, languages = _small_llama(arguments)
    else:
        folder = arguments.model
        pairs, languages = read_pairs(arguments)
    order = evenly(languages, arguments.draw_seed)
    numbers = [len(pairs) if text == "all" else int(text) for text in arguments.pairs.split(",")]
    numbers = sorted({min(number, len(pairs)) for number in numbers})
    order = order[: numbers[-1]]
    pairs, languages = [pairs[place] for place in order], [languages[place] for place in order]
    names = sorted(set(languages))
    index = np.array([names.index(language) for language in languages])
    subsets = [np.arange(number) for number in numbers]
    theory_pairs = min(arguments.theory_pairs, numbers[0])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(arguments.device)
    averages = [Select()]
    if arguments.ema_decay is not None:
        decay, size = arguments.ema_decay, arguments.ema_batch_size
        averages.append(Select(language_gradient="ema", ema_decay=decay, ema_batch_size=size))
    results: dict[str, Any] = {
        "model": folder.name,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "languages": dict(zip(names, np.bincount(index).tolist(), strict=True)),
        "tokens": sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs),
    }
    start = time.monotonic()
    with GradientCapture(model, gradient_checkpointing=arguments.gradient_checkpointing) as capture:
        vectors = language_gradients(capture, pairs, arguments.max_tokens, subsets, index, averages)
        ways = _ways(arguments, [_shape(layer) for layer in vectors.values()])
        results["weights"] = sum(layer[0].numel() for layer in vectors.values())
        direction = np.zeros(len(averages) * len(subsets) * len(names))
        first = sum(_gram(layer[: len(names)]).cpu().numpy() for layer in vectors.values())
        direction[: len(names)] = make_direction(np.asarray(first)[None], Surgery()).weights[0, 0]
        found = sketch_and_compare(capture, pairs, arguments.max_tokens, vectors, ways, direction, theory_pairs)
    results["rows"] = summarise(found, ways, subsets, index, theory_pairs)
    results["enough"] = enough(results["rows"])
    results["audits"] = audits(
        found, ways, subsets[-1], slice((len(subsets) - 1) * len(names), len(subsets) * len(names))
    )
    results["seconds"] = time.monotonic() - start
    exact = found.exact.cosines(subsets[0], slice(0, len(names)))
    del vectors, found
    _write(arguments.out, results)
    results["sketch_pairs"], results["speed"] = [], []
    in_float32: Float64Array | None = None
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        members = subsets[0]
        chosen = [pairs[place] for place in members]
        row, sketched = by_sketch_pairs(model, chosen, index[members], exact, in_float32)
        in_float32 = sketched if in_float32 is None else in_float32
        results["sketch_pairs"].append(row)
        if not arguments.skip_speed:
            results["speed"] += speed(model, pairs, ways)
        _write(arguments.out, results)
    print(tables(results))


def _small_llama(arguments: argparse.Namespace) -> tuple[Path, list[TokenizedPair], list[str]]:
    from small_llama import Shape, load_pairs, prepare

    heads = arguments.hidden_size // 64
    shape = Shape(
        hidden_size=arguments.hidden_size,
        layers=arguments.layers,
        intermediate_size=arguments.hidden_size * 11 // 4,
        heads=heads,
        key_value_heads=max(1, heads // 2),
    )
    folder = prepare(arguments.small_llama, arguments.preferences, shape)
    pairs, languages = load_pairs(folder)
    return folder / "model", pairs, languages


def _ways(arguments: argparse.Namespace, shapes: list[tuple[int, int]]) -> list[Way]:
    widths = [int(width) for width in arguments.widths.split(",")]
    folds = [fold for fold in arguments.folds.split(",") if fold]
    ways = [Way(fold, width, seed=seed) for fold in folds for seed in range(arguments.seeds) for width in widths]
    sides = [int(side) for side in arguments.sides.split(",") if side]
    ways += [Way(width=side * side * len(shapes), side=side) for side in sides]
    shorter = sum(min(shape) for shape in shapes)
    ranks = [int(rank) for rank in arguments.ranks.split(",") if rank]
    return ways + [
        Way(width=shorter * rank, rank=rank, seed=seed) for seed in range(arguments.seeds) for rank in ranks
    ]


def _shape(layer: Tensor) -> tuple[int, int]:
    """(out, in) of a layer's vectors (V, out, in)."""
    return layer.shape[1], layer.shape[2]


def _write(out: Path, results: dict[str, Any]) -> None:
    out.write_text(json.dumps(results, indent=1))
    out.with_suffix(".md").write_text(tables(results))


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    lines = [
        f"{results['model']}: {results['weights']:,} weights, {results['tokens']:,} tokens, {results['device']}",
        "",
        "| pairs | sketch | width | dtype | KiB a pair | error | by theory | measured | spread | rank correlation "
        "| kept half in common (range) | predicted |",
        "|--:|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results["rows"]:
        theory = f"{row['theory_error']:.5f} | {row['measured_error']:.5f}" if "theory_error" in row else " | "
        low, high = row["overlap_range"]
        lines.append(
            f"| {row['pairs']} | {row['way']} | {row['width']} | {row['dtype']} | {row['bytes'] / 1024:.0f} | "
            f"{row['error']:.5f} | {theory} | {row['spread_of_exact']:.4f} | {row['rank_correlation']:.5f} | "
            f"{100 * row['overlap']:.1f} % ({100 * low:.1f} to {100 * high:.1f}) | "
            f"{100 * row['predicted_overlap']:.1f} % |"
        )
    lines += ["", "| pairs | fold | width for 98 % | best | width by theory, unfolded |", "|--:|---|--:|--:|--:|"]
    for row in results["enough"]:
        lines.append(
            f"| {row['pairs']} | {row['fold']} | {row['width'] or '-'} | {100 * row['best_overlap']:.1f} % | "
            f"{row['width_by_theory_if_unfolded'] or '-'} |"
        )
    lines += [
        "",
        "Rank correlations: with the others in a micro-batch, as an audit has it, and with the direction.",
        "",
        "| sketch | width | others, all | others, of 24 | direction, all | direction, of 24 | spreads |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results["audits"]:
        few = [
            f"{part['mean']:.4f} ({part['p5']:.4f} to {part['p95']:.4f})"
            for part in (row["with_others_of_24"], row["with_direction_of_24"])
        ]
        lines.append(
            f"| {row['way']} | {row['width']} | {row['with_others']:.5f} | {few[0]} | "
            f"{row['with_direction']:.5f} | {few[1]} | {row['spread_with_others']:.4f}, "
            f"{row['spread_with_direction']:.4f} |"
        )
    for row in results.get("sketch_pairs", []):
        lines.append(
            f"\nsketch_pairs, {row['model']}, {row['pairs']} pairs: error {row['error']:.5f}, rank correlation "
            f"{row['rank_correlation']:.5f}, {100 * row['overlap']:.1f} % in common"
        )
        if "with_first" in row:
            least, low, quarter, median = row["with_first"]
            lines.append(
                f"Cosine of each pair's sketch with that in float32: least {least:.3f}, 5 % below {low:.3f}, "
                f"a quarter below {quarter:.4f}, half below {median:.4f}"
            )
    if results.get("speed"):
        lines += ["", "| model | method | over the floor | positions a second |", "|---|---|--:|--:|"]
        for row in results["speed"]:
            lines.append(
                f"| {row['model']} | {row['method']} | {row['over_floor']:.2f} | "
                f"{row['positions_per_second']:.0f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
