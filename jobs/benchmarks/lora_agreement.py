"""Whether sketches of a LoRA adapter's gradients choose the pairs that sketches of all linear layers choose.

    python jobs/benchmarks/lora_agreement.py PREFERENCES --model FOLDER --out FILE

Takes the shortest pairs of every language and sketches them in one pass over all linear layers and new
adapters of several ranks and seeds. Of those B alone has a gradient, that of the layer times A^T. The pairs of
each way are scored by their cosine with the direction that PCGrad makes of its languages. Compared are the rank
correlation of the scores, and the overlap of the half that is kept of each language. With so few pairs the
gradient of a language holds much of each pair of it, so both are given for directions without the pair too.
Float32; some minutes for SmolLM2-135M on a core.

PREFERENCES is JSONL with language, prompt, chosen and rejected. FILE gets a line for every way with its scores,
and one for every comparison.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from congrad_ray.config.names import LeaveOut
from congrad_ray.config.recipe import Model
from congrad_ray.config.training import Lora
from congrad_ray.modeling.adapters import with_adapter
from congrad_ray.modeling.batching import token_budget_batches
from congrad_ray.modeling.packing import PairTokens
from congrad_ray.modeling.source import named_model
from congrad_ray.modeling.tokenization import TokenizedPair, tokenize_pair
from congrad_ray.stages.select.keep import keep_top_fraction
from congrad_ray.stages.select.scores import PairProducts, Surgery, agreement, make_direction
from congrad_ray.stages.sketch.audit import rank_correlation
from congrad_ray.stages.sketch.capture import GradientCapture
from congrad_ray.stages.sketch.countsketch import CountSketch, FoldRule
from congrad_ray.stages.sketch.sketcher import _Sketching

Float64Array = NDArray[np.float64]
Scores = dict[LeaveOut, Float64Array]
LEFT_OUT: tuple[LeaveOut, ...] = ("nothing", "pair")
WIDTH = 131_072
LEAST_TOKENS = 40


@dataclass(frozen=True)
class Way:
    """What is sketched, and how: the linear layers, or B of an adapter with these A by layer."""

    sketch: CountSketch
    adapter: dict[str, Tensor] | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preferences", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=12, help="of each language")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pairs, languages = read_pairs(arguments.preferences, arguments.model, arguments.pairs)
    model = named_model(arguments.model, Model(dtype="float32")).load_model("cpu")

    def sketch(seed: int) -> CountSketch:
        return CountSketch(WIDTH, seed, FoldRule(None, 512))

    # Another sketch of the same gradients tells how much of a difference is the sketch's own.
    ways = {"linear": Way(sketch(0)), "linear, another sketch": Way(sketch(1))}
    for rank in arguments.ranks:
        for seed in arguments.seeds:
            ways[f"lora r {rank} seed {seed}"] = Way(sketch(0), adapter_of(model, rank, seed))
    sketches = sketch_all(model, pairs, ways)
    scores = {
        name: {left_out: scores_of(found, languages, left_out) for left_out in LEFT_OUT}
        for name, found in sketches.items()
    }
    with arguments.out.open("w") as file:

        def write(**row: object) -> None:
            print(json.dumps(row), file=file)

        tokens = [pair.padded_tokens for pair in pairs]
        write(what="pairs", model=Path(arguments.model).name, pairs=len(pairs), languages=languages, tokens=tokens)
        for name, of_way in scores.items():
            write(what="way", name=name, scores={key: found.round(5).tolist() for key, found in of_way.items()})
        ids = [f"{number:03}" for number in range(len(pairs))]
        for one, other in combinations(scores, 2):
            for left_out in LEFT_OUT:
                found = scores[one][left_out], scores[other][left_out]
                kept = [keep_top_fraction(values, ids, 0.5, languages) for values in found]
                write(
                    what="comparison",
                    of=[one, other],
                    without=left_out,
                    rank_correlation=round(rank_correlation(*found), 4),
                    overlap=round(float((kept[0] & kept[1]).sum() / kept[0].sum()), 4),
                )


def read_pairs(path: Path, model: str, count: int) -> tuple[list[TokenizedPair], list[str]]:
    """The `count` shortest pairs of every language, but of LEAST_TOKENS tokens or more, and their languages."""
    tokenizer = named_model(model, Model()).load_tokenizer()
    by_language: dict[str, list[TokenizedPair]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        pair = tokenize_pair(tokenizer, row["prompt"], row["chosen"], row["rejected"], max_length=10**6)
        if pair.padded_tokens >= LEAST_TOKENS:
            by_language.setdefault(row["language"], []).append(pair)
    found = {
        name: sorted(pairs, key=lambda pair: pair.padded_tokens)[:count] for name, pairs in by_language.items()
    }
    return [pair for pairs in found.values() for pair in pairs], [
        name for name, pairs in found.items() for _ in pairs
    ]


class _EveryWay:
    """A `LayerVisitor` that sketches a layer's gradient, and that of every new adapter on it.

    With B = 0 the gradient of B is the layer's times A^T (and the scaling, which no cosine sees), that of A is 0.
    """

    def __init__(self, ways: dict[str, Way], batch: PairTokens) -> None:
        self._adapters = {name: way.adapter for name, way in ways.items()}
        self.of_way = {
            name: _Sketching(way.sketch, batch.pairs, torch.device("cpu"), None) for name, way in ways.items()
        }

    def keep(self, name: str, inputs: Tensor) -> Tensor:
        return inputs

    def visit(self, name: str, kept: Tensor, gradients: Tensor, starts: Sequence[int]) -> None:
        for way, sketching in self.of_way.items():
            adapter = self._adapters[way]
            inputs = kept if adapter is None else kept @ adapter[name].T
            sketching.visit(name, sketching.keep(name, inputs), gradients, starts)


def sketch_all(
    model: PreTrainedModel, pairs: list[TokenizedPair], ways: dict[str, Way]
) -> dict[str, Float64Array]:
    """Sketches (N, WIDTH) of all pairs in every way, not rounded, in one pass."""
    sketches = {name: np.zeros((len(pairs), WIDTH)) for name in ways}
    with GradientCapture(model) as capture:
        for members in token_budget_batches([pair.padded_tokens for pair in pairs], 1024):
            batch = capture.layout([pairs[member] for member in members])
            visitor = _EveryWay(ways, batch)
            capture.run(batch, visitor)
            for name, sketching in visitor.of_way.items():
                sketches[name][members] = ways[name].sketch.sketches(sketching.table).double().numpy()
            print(f"{len(members)} pairs more", flush=True)
    return sketches


def adapter_of(model: PreTrainedModel, rank: int, seed: int) -> dict[str, Tensor]:
    """The A of every layer of a new adapter; the model is left as it was."""
    adapted = with_adapter(model, Lora(r=rank), seed)
    found = {
        name.removeprefix("base_model.model.").split(".lora_A.")[0]: values.detach().clone()
        for name, values in adapted.named_parameters()
        if ".lora_A." in name
    }
    adapted.unload()
    return found


def scores_of(sketches: Float64Array, languages: list[str], left_out: LeaveOut) -> Float64Array:
    """Cosines (N,) of the pairs with the direction that PCGrad makes of the languages' means."""
    names = sorted(set(languages))
    index = np.array([names.index(language) for language in languages])
    counts = np.bincount(index)
    shares = 1.0 / counts[index]
    membership = np.zeros((len(names), len(index)))
    membership[index, np.arange(len(index))] = shares
    inner = sketches @ sketches.T
    gram, dots = membership @ inner @ membership.T, inner @ membership.T
    products = PairProducts(dots[:, None], np.diag(inner)[:, None], index, shares, np.ones(len(index)))
    direction = make_direction(gram[None], Surgery(leave_out=left_out))
    return agreement(products, direction, left_out).cosine


if __name__ == "__main__":
    main()
