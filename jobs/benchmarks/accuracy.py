"""How near sketches come to exact gradients: python jobs/benchmarks/accuracy.py PREFERENCES FOLDER --out FILE.json

Trains a small Llama a little on the preferences (once; kept in FOLDER), finds the exact de-conflicted direction
and every pair's exact cosine with it in two passes, and in the second sketches every pair in many ways:
count-sketches of several widths and folds, stored in several types, and two-sided Gaussian projections layer by
layer, the way of LoGra and bergson. Prints for each the bytes of a pair, the error of the cosine with the
direction (root mean square), its rank correlation and the overlap of the kept half.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from small_llama import Shape, load_pairs, prepare
from torch import Tensor
from transformers import AutoModelForCausalLM

from congrad_ray.gradient.audit import rank_correlation
from congrad_ray.gradient.capture import GradientCapture, pair_segments
from congrad_ray.gradient.countsketch import CountSketch, FoldRule
from congrad_ray.gradient.exact import LayerVectors, add_weighted_sums_
from congrad_ray.gradient.storage import to_storage
from congrad_ray.preference.batching import token_budget_batches
from congrad_ray.preference.packing import PairTokens
from congrad_ray.preference.tokenization import TokenizedPair
from congrad_ray.surgery.keep import keep_top_fraction
from congrad_ray.surgery.scores import PairProducts, Surgery, make_direction
from congrad_ray.surgery.scores import agreement as agreement_with

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Way:
    """A way of sketching: a count-sketch of a fold and width, or two-sided projections to `side` x `side`."""

    fold: int = 0
    width: int = 0
    side: int = 0

    @property
    def name(self) -> str:
        return f"two-sided {self.side} x {self.side}" if self.side else f"count-sketch fold {self.fold}"


class _Projection:
    """Two-sided projections of every layer, one after the other."""

    def __init__(self, side: int, layers: Sequence[str]) -> None:
        self.side = side
        self._place = {name: index for index, name in enumerate(layers)}
        self._matrices: dict[tuple[str, str], Tensor] = {}
        self.width = side * side * len(layers)

    def _matrix(self, name: str, which: str, features: int) -> Tensor:
        if (name, which) not in self._matrices:
            generator = torch.Generator().manual_seed(self._place[name] * 2 + (which == "outputs"))
            self._matrices[name, which] = torch.randn((features, self.side), generator=generator) / self.side**0.5
        return self._matrices[name, which]

    def add_(self, row: Tensor, name: str, d: Tensor, a: Tensor) -> None:
        start = self._place[name] * self.side**2
        left = d @ self._matrix(name, "outputs", d.shape[1])
        right = a @ self._matrix(name, "inputs", a.shape[1])
        row[start : start + self.side**2] = (left.T @ right).flatten()


class _AllWays:
    """A visitor that finds the exact inner products with `vectors`, the norms, and every way's sketch."""

    def __init__(
        self,
        sketches: dict[Way, CountSketch],
        projections: dict[Way, _Projection],
        vectors: LayerVectors,
        pairs: int,
    ) -> None:
        self._vectors = vectors
        self._folds = sorted({way.fold for way in sketches})
        self.sketches = sketches
        self.projections = projections
        self.tables = {way: sketch.table(pairs, "cpu") for way, sketch in self.sketches.items()}
        self.projected = {
            way: torch.zeros(pairs, projection.width) for way, projection in self.projections.items()
        }
        self.dots = torch.zeros((pairs, len(next(iter(vectors.values())))), dtype=torch.float64)
        self.squared_norms = torch.zeros(pairs, dtype=torch.float64)

    def keep(self, name: str, inputs: Tensor) -> Tensor:
        return inputs

    def visit(self, name: str, kept: Tensor, gradients: Tensor, starts: Sequence[int]) -> None:
        flat = self._vectors[name].flatten(1)
        by_fold = {fold: [way for way in self.sketches if way.fold == fold] for fold in self._folds}
        for pair, part in pair_segments(starts):
            a, d = kept[part], gradients[part]
            gradient = d.T @ a
            self.dots[pair] += flat @ gradient.flatten()
            self.squared_norms[pair] += gradient.square().sum()
            for ways in by_fold.values():
                folding = self.sketches[ways[0]]  # folds do not depend on the width
                folded = folding.fold_outputs(name, d).T @ folding.fold_inputs(name, a)
                for way in ways:
                    self.sketches[way].add_(self.tables[way][pair : pair + 1], name, folded[None])
            for way, projection in self.projections.items():
                projection.add_(self.projected[way][pair], name, d, a)

    def results(self) -> dict[Way, Tensor]:
        """Sketches (B, width) by way."""
        return {
            **{way: self.sketches[way].sketches(table) for way, table in self.tables.items()},
            **self.projected,
        }


def main() -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preferences", type=Path, help="JSONL with prompt, chosen, rejected and language")
    parser.add_argument("folder", type=Path, help="where the model is made and kept")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=None, help="at most so many, drawn at random")
    parser.add_argument("--folds", default="1,2,4,8")
    parser.add_argument("--widths", default="8192,16384,32768,65536")
    parser.add_argument("--sides", default="8,16,24,32", help="of two-sided projections")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    heads = arguments.hidden_size // 64
    shape = Shape(
        hidden_size=arguments.hidden_size,
        layers=arguments.layers,
        intermediate_size=arguments.hidden_size * 11 // 4,
        heads=heads,
        key_value_heads=max(1, heads // 2),
    )
    folder = prepare(arguments.folder, arguments.preferences, shape)
    pairs, languages = load_pairs(folder)
    if arguments.pairs:
        drawn = np.sort(np.random.default_rng(0).permutation(len(pairs))[: arguments.pairs])
        pairs, languages = [pairs[index] for index in drawn], [languages[index] for index in drawn]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    ways = [Way(fold, width) for fold in numbers(arguments.folds) for width in numbers(arguments.widths)]
    ways += [Way(side=side) for side in numbers(arguments.sides)]
    rows = compare(model, pairs, languages, ways)
    described = {"hidden_size": shape.hidden_size, "layers": shape.layers, "pairs": len(pairs)}
    arguments.out.write_text(json.dumps({**described, "rows": rows}, indent=1))
    print_table(rows)


def compare(model: Any, pairs: list[TokenizedPair], languages: list[str], ways: list[Way]) -> list[dict[str, Any]]:
    """One row of results for every way and dtype."""
    names = sorted(set(languages))
    index = np.array([names.index(language) for language in languages])
    with GradientCapture(model) as capture:
        vectors: LayerVectors = {}
        for members, batch in _batches(capture, pairs, "exact language gradients"):
            weights = torch.zeros((len(names), len(members)))
            weights[torch.tensor(index[members]), torch.arange(len(members))] = 1.0
            add_weighted_sums_(vectors, weights, capture, batch)
        counts = torch.tensor(np.bincount(index), dtype=torch.float32)[:, None, None]
        vectors = {name: values / counts for name, values in vectors.items()}
        gram = sum(values.double().flatten(1) @ values.double().flatten(1).T for values in vectors.values())
        dots = np.zeros((len(pairs), len(names)))
        norms = np.zeros(len(pairs))
        found: dict[Way, Tensor] = {}
        sketches = {way: CountSketch(way.width, 0, FoldRule(way.fold)) for way in ways if way.fold}
        projections = {way: _Projection(way.side, list(capture.layers)) for way in ways if way.side}
        for members, batch in _batches(capture, pairs, "exact cosines and sketches"):
            visitor = _AllWays(sketches, projections, vectors, len(members))
            capture.run(batch, visitor)
            dots[members] = visitor.dots.numpy()
            norms[members] = visitor.squared_norms.sqrt().numpy()
            for way, values in visitor.results().items():
                found.setdefault(way, torch.zeros(len(pairs), values.shape[1]))[members] = values
    exact_gram = np.asarray(gram)
    exact = cosines_with_pcgrad(dots, norms, exact_gram)
    rows = []
    for way, whole in found.items():
        for dtype in ("float32", "float16", "int8"):
            stored, scales = to_storage(whole, dtype)
            numbers = stored.astype(np.float64) * scales[:, None]
            rows.append(
                {
                    "way": way.name,
                    "fold": way.fold,
                    "side": way.side,
                    "width": stored.shape[1],
                    "dtype": dtype,
                    "bytes": stored.shape[1] * stored.itemsize,
                    **agreement(numbers, languages, exact),
                }
            )
    return rows


def cosines_with_pcgrad(dots: Float64Array, norms: Float64Array, gram: Float64Array) -> Float64Array:
    """Cosines (N,) of vectors with PCGrad's direction, from their products (N, L) with the languages' own."""
    nobody = np.zeros(len(dots))
    products = PairProducts(dots[:, None], norms[:, None] ** 2, nobody.astype(np.int64), nobody, nobody)
    return agreement_with(products, make_direction(gram[None], Surgery())).cosine


def agreement(sketches: Float64Array, languages: list[str], exact: Float64Array) -> dict[str, float]:
    """Of cosines with the direction found from `sketches` (N, width), against the exact ones (N,)."""
    names = sorted(set(languages))
    index = np.array([names.index(language) for language in languages])
    gradients = np.stack([sketches[index == number].mean(axis=0) for number in range(len(names))])
    gram = gradients @ gradients.T
    norms = np.linalg.norm(sketches, axis=1)
    cosines = cosines_with_pcgrad(sketches @ gradients.T, norms, gram)
    ids = [f"{number:08}" for number in range(len(exact))]
    kept = [keep_top_fraction(values, ids, 0.5, languages) for values in (exact, cosines)]
    return {
        "error": float(np.sqrt(np.mean((cosines - exact) ** 2))),
        "rank_correlation": rank_correlation(exact, cosines),
        "overlap": float((kept[0] & kept[1]).sum() / kept[0].sum()),
        "spread_of_exact": float(exact.std()),
    }


def _batches(
    capture: GradientCapture, pairs: list[TokenizedPair], what: str
) -> Iterator[tuple[list[int], PairTokens]]:
    batches = token_budget_batches([pair.padded_tokens for pair in pairs], 4096)
    start = time.monotonic()
    for number, members in enumerate(batches):
        yield members, capture.layout([pairs[member] for member in members])
        if number % 20 == 0:
            print(
                f"{what}: {number + 1}/{len(batches)} micro-batches, {time.monotonic() - start:.0f} s", flush=True
            )


def print_table(rows: list[dict[str, Any]]) -> None:
    """The results as a Markdown table."""
    print("| sketch | width | dtype | KiB a pair | error | rank correlation | kept half in common |")
    print("|---|--:|---|--:|--:|--:|--:|")
    for row in rows:
        print(
            f"| {row['way']} | {row['width']} | {row['dtype']} | {row['bytes'] / 1024:.1f} | {row['error']:.5f} | "
            f"{row['rank_correlation']:.5f} | {100 * row['overlap']:.1f} % |"
        )


if __name__ == "__main__":
    main()
