"""Speed and memory of the gradient engine: python jobs/benchmarks/gradient.py PREFERENCES FOLDER --out FILE.json

Trains a small Llama a little on the preferences (once; kept in FOLDER) and sends the same pairs, drawn at random,
through everything in turn, several rounds, so that other load on the machine meets all alike:

    floor               a forward and a backward to the inputs alone, which no method can do without
    backward            the same with weight gradients, summed over the batch as in training
    fold 1, 2, 4, 8, auto   our sketches
    one pair at a time  autograd for each pair, then the same sketch
    vmap(grad)          torch.func for a few pairs at a time, then the same sketch
    bergson, dattri, traker   in environments of their own, made as peers/*.txt say, in the folder --peers

Prints seconds relative to the floor (median over rounds), pairs and tokens a second, and peak memory: resident
bytes above those before, each in a process of its own, at the vocabulary of --memory-vocabulary.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_llama import Shape, load_pairs, prepare, random_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from congrad_ray.modeling.batching import collate_pairs, token_budget_batches
from congrad_ray.modeling.packing import PairTokens
from congrad_ray.modeling.shared_prompts import attention_over, completion_sums
from congrad_ray.modeling.tokenization import TokenizedPair
from congrad_ray.stages.sketch.capture import GradientCapture
from congrad_ray.stages.sketch.countsketch import CountSketch, FoldRule
from congrad_ray.stages.sketch.exact import pair_gradient
from congrad_ray.stages.sketch.memory import PeakResidentMemory
from congrad_ray.stages.sketch.sketcher import sketch_pairs

HERE = Path(__file__).resolve().parent
FOLDS = (1, 2, 4, 8)
SLOW_PAIRS = 4  # of the methods that would take too long, or too much memory, on all


class _Nothing:
    """A visitor that keeps and does nothing: what remains is the floor."""

    def keep(self, name: str, inputs: Tensor) -> Tensor:
        return inputs[:1].clone()  # a view would keep all of them alive

    def visit(self, name: str, kept: Tensor, gradients: Tensor, starts: Sequence[int]) -> None:
        pass


def floor(capture: GradientCapture, batch: PairTokens) -> None:
    """The forward and the backward to the inputs."""
    capture.run(batch, _Nothing())


def floors(capture: GradientCapture, batches: list[PairTokens]) -> None:
    """The floor of several batches."""
    for batch in batches:
        floor(capture, batch)


def ordinary_backward(capture: GradientCapture, batch: PairTokens) -> None:
    """Weight gradients of the batch's sum, by autograd."""
    model = capture.model
    weights = [layer.get_parameter("weight").requires_grad_(True) for layer in capture.layers.values()]
    with attention_over(model, batch) as arguments:
        logps = completion_sums(model, batch, arguments)
        torch.autograd.grad(logps[: batch.pairs].sum() - logps[batch.pairs :].sum(), weights)
    for weight in weights:
        weight.requires_grad_(False)


def one_at_a_time(model: PreTrainedModel, sketch: CountSketch, pairs: list[TokenizedPair]) -> None:
    """Autograd's gradient of every pair, sketched afterwards."""
    for pair in pairs:
        sketch.sketch_vector(pair_gradient(model, collate_pairs([pair], 0)))


def vmapped(model: PreTrainedModel, names: list[str], sketch: CountSketch, pairs: list[TokenizedPair]) -> None:
    """torch.func's per-sample gradients of all these pairs together, sketched afterwards."""
    batch = collate_pairs(pairs, 0)
    weights = {f"{name}.weight": model.get_submodule(name).get_parameter("weight").detach() for name in names}

    def margin(weights: dict[str, Tensor], ids: Tensor, completions: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, weights, (ids,), {"use_cache": False}).logits[:, :-1]
        logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        chosen, rejected = (logprobs * completions[:, 1:]).sum(dim=1).unbind()
        return chosen - rejected

    ids = batch.input_ids.view(2, len(pairs), -1).transpose(0, 1)
    completions = batch.completion_mask.view(2, len(pairs), -1).transpose(0, 1)
    found = torch.func.vmap(torch.func.grad(margin), in_dims=(None, 0, 0))(weights, ids, completions)
    for row in range(len(pairs)):
        sketch.sketch_vector({name: found[f"{name}.weight"][row] for name in names})


def main() -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preferences", type=Path, help="JSONL with prompt, chosen, rejected and language")
    parser.add_argument("folder", type=Path, help="where the model is made and kept")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int, default=32768)
    parser.add_argument("--max-tokens", type=int, default=4096, help="padded tokens of a micro-batch")
    parser.add_argument(
        "--peers", type=Path, help="folder of the peers' environments, each under its library's name"
    )
    parser.add_argument("--libraries", default="bergson,dattri,traker", help="which of the peers")
    parser.add_argument("--bergson-sides", default="16,32,64")
    parser.add_argument("--memory-vocabulary", type=int, default=128_000)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(json.dumps(memory_of(arguments)))
        return
    shape = Shape()
    folder = prepare(arguments.folder, arguments.preferences, shape)
    every, _ = load_pairs(folder)
    drawn = sorted(np.random.default_rng(0).permutation(len(every))[: arguments.pairs].tolist())
    pairs = [every[index] for index in drawn]
    few = sorted(pairs, key=lambda pair: pair.longest_row)[len(pairs) // 2 - SLOW_PAIRS // 2 :][:SLOW_PAIRS]
    seconds, tokens = time_all(arguments, folder, pairs, few, drawn)
    results = {
        "shape": vars(shape),
        "pairs": len(pairs),
        "tokens": tokens,
        "rows": summary(seconds, tokens),
        "memory": memory_table(arguments),
        "seconds": seconds,
    }
    arguments.out.write_text(json.dumps(results, indent=1))
    print_tables(results)


def time_all(
    arguments: argparse.Namespace,
    folder: Path,
    pairs: list[TokenizedPair],
    few: list[TokenizedPair],
    drawn: list[int],
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every method in every round, and token counts of all pairs and of the few."""
    model, plain = (AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32) for _ in range(2))
    with GradientCapture(model) as capture:

        def batches(of: list[TokenizedPair]) -> list[PairTokens]:
            members = token_budget_batches([pair.padded_tokens for pair in of], arguments.max_tokens)
            return [capture.layout([of[index] for index in batch]) for batch in members]

        all_batches, few_batches = batches(pairs), batches(few)
        sketches = {fold: CountSketch(arguments.width, 0, FoldRule(fold)) for fold in FOLDS}

        ours: dict[str, Callable[[PairTokens], object]] = {
            "floor": partial(floor, capture),
            "backward": partial(ordinary_backward, capture),
            **{f"fold {fold}": partial(sketch_pairs, capture, sketch) for fold, sketch in sketches.items()},
            "fold auto": partial(sketch_pairs, capture, CountSketch(arguments.width, 0, FoldRule())),
        }
        others: dict[str, Callable[[], float | None]] = {
            "floor of a few": partial(floors, capture, few_batches),
            "one pair at a time": partial(one_at_a_time, plain, sketches[1], few),
            "vmap(grad)": partial(vmapped, plain, list(capture.layers), sketches[1], few),
        }
        libraries = arguments.libraries.split(",") if arguments.peers else []
        if "bergson" in libraries:
            for side in arguments.bergson_sides.split(","):
                options = ["--projection-dimension", side]
                others[f"bergson {side} x {side}"] = partial(peer, arguments, folder, "bergson", drawn, options)
        seconds: dict[str, list[float]] = {name: [] for name in (*ours, *others)}
        for number in range(arguments.rounds):
            totals = _interleaved(ours, all_batches, number)
            for name, method in others.items():
                start = time.perf_counter()
                measured = method()
                totals[name] = time.perf_counter() - start if measured is None else measured
            for name, total in totals.items():
                seconds[name].append(total)
                print(f"round {number + 1}: {name} {total:.2f} s", flush=True)
        rows = [drawn[pairs.index(pair)] for pair in few]
        for library, options in (("dattri", ["--projection-dimension", "16"]), ("traker", [])):
            if library in libraries:
                seconds[library] = [peer(arguments, folder, library, rows, options)]
                print(f"{library} {seconds[library][0]:.2f} s", flush=True)
    return seconds, {
        "all": sum(batch.positions for batch in all_batches),
        "few": sum(batch.positions for batch in few_batches),
        "all, prompts twice": sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs),
        "pairs": len(pairs),
        "few pairs": len(few),
    }


def _interleaved(
    methods: dict[str, Callable[[PairTokens], object]], batches: list[PairTokens], turn: int
) -> dict[str, float]:
    """Seconds of every method on all batches, batch by batch in changing order: a machine's speed drifts."""
    totals = dict.fromkeys(methods, 0.0)
    names = list(methods)
    for number, batch in enumerate(batches):
        first = (number + turn) % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            methods[name](batch)
            totals[name] += time.perf_counter() - start
    return totals


def peer(
    arguments: argparse.Namespace, folder: Path, library: str, rows: list[int], options: Sequence[str] = ()
) -> float:
    """Seconds that a peer measures for the gradients of these pairs."""
    python = arguments.peers / library / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"no {python}: make the environment as {HERE / 'peers' / library}.txt says")
    out = arguments.out.with_suffix(f".{library}.json")
    command = [python, HERE / "peers" / f"{library}_peer.py", "--model", folder / "model"]
    command += ["--pairs", folder / "pairs.parquet", "--indexes", ",".join(map(str, rows)), "--out", out]
    command += ["--threads", str(arguments.threads), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return float(json.loads(out.read_text())["seconds"])


def summary(seconds: dict[str, list[float]], tokens: dict[str, int]) -> list[dict[str, Any]]:
    """Every method against the floor of the same pairs, round by round; medians."""
    rows = []
    for name, values in seconds.items():
        of_few = name in ("floor of a few", "one pair at a time", "vmap(grad)", "dattri", "traker")
        floor = seconds["floor of a few" if of_few else "floor"]
        ratios = [value / floor[number] for number, value in enumerate(values)]
        middle = statistics.median(values)
        twice = name.startswith("bergson")
        rows.append(
            {
                "method": name,
                "over_floor": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "pairs_per_second": tokens["few pairs" if of_few else "pairs"] / middle,
                "tokens_per_second": tokens["all, prompts twice" if twice else "few" if of_few else "all"]
                / middle,
            }
        )
    return rows


def memory_of(arguments: argparse.Namespace) -> dict[str, float]:
    """MiB above the model at the peak of one micro-batch, of the method named by `--memory-of`."""
    shape = Shape(vocabulary=arguments.memory_vocabulary)
    model = random_llama(shape)
    with GradientCapture(model) as capture:
        length = arguments.max_tokens // 2 // 4
        tokens = list(range(5, 5 + length))
        pair = TokenizedPair(tokens[: length // 4], tokens[: length * 3 // 4], tokens[: length * 3 // 4][::-1])
        batch = capture.layout([pair] * 4)
        warm = capture.layout([TokenizedPair([5, 6, 7], [8, 9], [10])])

        def work(of: PairTokens) -> None:
            if arguments.memory_of == "floor":
                floor(capture, of)
            else:
                fold = int(arguments.memory_of.removeprefix("fold "))
                sketch_pairs(capture, CountSketch(arguments.width, 0, FoldRule(fold)), of)

        work(warm)
        with PeakResidentMemory() as memory:
            work(batch)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        return {
            "positions": batch.positions,
            "peak": (memory.peak - memory.before) / 2**20,
            "model": weights / 2**20,
        }


def memory_table(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """`memory_of` for the floor and every fold, each in a process of its own."""
    found = {}
    for method in ("floor", *(f"fold {fold}" for fold in FOLDS)):
        command = [sys.executable, *sys.argv, "--memory-of", method]
        found[method] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def print_tables(results: dict[str, Any]) -> None:
    """The results as Markdown tables."""
    print("\n| method | time over the floor | lowest to highest | pairs/s | tokens/s |\n|---|--:|--:|--:|--:|")
    for row in results["rows"]:
        print(
            f"| {row['method']} | {row['over_floor']:.2f} | {row['lowest']:.2f} to {row['highest']:.2f} | "
            f"{row['pairs_per_second']:.2f} | {row['tokens_per_second']:.0f} |"
        )
    print(
        "\n| method | positions | peak above the model, MiB | with the model, over the floor |\n|---|--:|--:|--:|"
    )
    floor = results["memory"]["floor"]
    for method, row in results["memory"].items():
        ratio = (row["peak"] + row["model"]) / (floor["peak"] + floor["model"])
        print(f"| {method} | {row['positions']} | {row['peak']:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
