"""Speed and memory on one GPU at the shapes of real models: python jobs/benchmarks/gpu.py --out FILE.jsonl

Builds Llama 3 8B and Gemma 2 2B from their configurations with random bfloat16 weights, and measures:

    sketching    `sketch_pairs` on micro-batches of pairs of unequal lengths, against the floor (a forward and a
                 backward to the inputs alone) and against a backward with all weight gradients, with and
                 without gradient checkpointing
    training     a DPO step without an optimiser, against sketching the same pairs
    head         log-probabilities of tokens at chunks of many sizes, with a frozen and a trainable output
                 embedding
    numerics     sketches of bfloat16 models against those of float32 ones, on slices of four layers
    ways         other widths and folds, and products in float32
    profile      the kernels on which sketching one micro-batch spends its time

Every measurement is written as one line of JSON as soon as it is made; one that fails is written with its error.
After --seconds no new one is begun. With --tiny all of it runs on a CPU in less than a minute.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from congrad_ray.modeling.batching import collate_pairs, token_budget_batches
from congrad_ray.modeling.logprobs import completion_logprobs, summed_logprobs
from congrad_ray.modeling.loss import ChosenRejected, LossSettings, preference_loss
from congrad_ray.modeling.packing import PairTokens
from congrad_ray.modeling.shared_prompts import attention_over, completion_sums
from congrad_ray.modeling.tokenization import TokenizedPair
from congrad_ray.stages.sketch.audit import rank_correlation
from congrad_ray.stages.sketch.capture import GradientCapture
from congrad_ray.stages.sketch.countsketch import CountSketch, FoldRule
from congrad_ray.stages.sketch.sketcher import sketch_pairs

CONFIGS = Path(__file__).resolve().parents[2] / "tests" / "planning" / "configs"
WIDTH = 32768


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    prompts: tuple[int, int] = (50, 400)
    completions: tuple[int, int] = (100, 600)
    max_tokens: int = 8192  # padded tokens of a micro-batch
    micro_batches: int = 6
    rounds: int = 2
    row: int = 1000  # tokens of a row in training
    chunks: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    head_tokens: int = 4096
    slice_layers: int = 4
    slice_pairs: int = 24
    width: int = WIDTH
    shrink: bool = False


TINY = Sizes((5, 20), (5, 30), 256, 2, 1, 50, (16, 64), 64, 2, 6, 1024, True)


class Recorder:
    """Writes every measurement as a line of JSON, its failure too; begins none after the time is over."""

    def __init__(self, out: Path, seconds: float, only: frozenset[str] = frozenset()) -> None:
        self._only = only
        self._file = out.open("a", encoding="utf-8")
        self._start = time.monotonic()
        self._seconds = seconds

    def write(self, what: str, **values: Any) -> None:
        """Writes one line."""
        line = json.dumps({"what": what, "at": round(time.monotonic() - self._start, 1), **values})
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()

    def measure(
        self, what: str, function: Callable[[], dict[str, Any]], **described: Any
    ) -> dict[str, Any] | None:
        """What `function` finds, written; None if it fails or the time is over, which is written too."""
        if self._only and what not in self._only | {"built"}:
            return None
        if time.monotonic() - self._start > self._seconds:
            self.write(what, **described, skipped=True)
            return None
        began = time.monotonic()
        found: dict[str, Any] | None = None
        try:
            found = function()
            self.write(what, **described, **found, took=round(time.monotonic() - began, 1))
        except Exception as error:
            # Only the text: the error itself would keep the frames, and the tensors in them, alive.
            self.write(what, **described, error=f"{type(error).__name__}: {str(error)[:300]}")
        release()
        return found


def release() -> None:
    """Gives back the memory that nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds and GiB at the peak (0 on a CPU) of one call."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    function()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0


def configuration(name: str, sizes: Sizes, layers: int | None = None) -> PretrainedConfig:
    """The configuration of a model, with fewer layers if asked for."""
    config = AutoConfig.from_pretrained(CONFIGS / name)
    if sizes.shrink:
        config.hidden_size, config.intermediate_size, config.vocab_size = 64, 128, 512
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
        config.num_hidden_layers = 2
    if layers is not None:
        config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def build(
    name: str,
    sizes: Sizes,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    layers: int | None = None,
) -> PreTrainedModel:
    """A model of this shape with random weights, made on the device.

    Attention is eager where its logits are capped (Gemma 2), which no other implementation does: transformers 5.23
    chooses it by itself, 5.17 does not.
    """
    torch.manual_seed(0)
    config = configuration(name, sizes, layers)
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    return model.eval()


def draw_pairs(count: int, sizes: Sizes, vocabulary: int, seed: int = 0) -> list[TokenizedPair]:
    """Pairs of random tokens and unequal lengths."""
    random = np.random.default_rng(seed)

    def ids(lengths: tuple[int, int]) -> list[int]:
        return random.integers(3, vocabulary, random.integers(lengths[0], lengths[1] + 1)).tolist()

    return [
        TokenizedPair(ids(sizes.prompts), ids(sizes.completions), ids(sizes.completions)) for _ in range(count)
    ]


def micro_batches(sizes: Sizes, vocabulary: int) -> list[list[TokenizedPair]]:
    """Micro-batches of all lengths, as the library makes them."""
    pairs = draw_pairs(12 * sizes.micro_batches, sizes, vocabulary)
    members = token_budget_batches([pair.padded_tokens for pair in pairs], sizes.max_tokens)
    places = np.linspace(0, len(members) - 1, sizes.micro_batches).round().astype(int)
    return [[pairs[index] for index in members[place]] for place in sorted(set(places.tolist()))]


def backward(capture: GradientCapture, batch: PairTokens) -> None:
    """A forward and a backward of the pairs' margins, to whatever requires a gradient; hooks do nothing."""
    with torch.enable_grad(), attention_over(capture.model, batch) as arguments:
        logps = completion_sums(capture.model, batch, arguments)
        seeds = torch.ones_like(logps)
        seeds[batch.pairs :] = -1.0
        torch.autograd.backward(logps, seeds)


def full_backward(capture: GradientCapture, batch: PairTokens) -> None:
    """The same with the gradients of all weights."""
    try:
        capture.model.requires_grad_(True)
        backward(capture, batch)
    finally:
        capture.model.requires_grad_(False)
        capture.model.zero_grad(set_to_none=True)


def compare(
    methods: dict[str, Callable[[PairTokens], object]], batches: list[PairTokens], rounds: int
) -> dict[str, Any]:
    """Of each method its time against the first one's (median over micro-batches), speed and peak memory.

    The methods take turns on every micro-batch. One that fails is left out from there on, with its error.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    peaks = dict.fromkeys(methods, 0.0)
    errors: dict[str, str] = {}
    for number, batch in enumerate([max(batches, key=lambda one: one.positions), *batches * rounds]):
        for name, method in methods.items():
            if name in errors:
                continue
            try:
                took, peak = timed(partial(method, batch))
            except Exception as error:
                errors[name] = f"{type(error).__name__}: {str(error)[:200]}"
            else:
                peaks[name] = max(peaks[name], peak)
                if number:  # the first is for warming up
                    seconds[name].append(took)
            if name in errors:
                release()
    tokens = np.array([batch.positions for batch in batches] * rounds)
    pairs = np.array([batch.pairs for batch in batches] * rounds)
    rows_tokens = np.array(
        [int((batch.chosen_tokens + batch.rejected_tokens).sum()) for batch in batches] * rounds
    )
    first = next(iter(methods))
    found: dict[str, Any] = {"positions": tokens.tolist(), "pairs": pairs.tolist()}
    found["completion_tokens"] = rows_tokens.tolist()
    for name in methods:
        if name in errors:
            found[name] = {"error": errors[name]}
            continue
        times = np.array(seconds[name])
        found[name] = {
            "tokens_per_second": round(float(np.median(tokens / times)), 1),
            "pairs_per_second": round(float(pairs.sum() / times.sum()), 3),
            "peak_gib": round(peaks[name], 2),
            "seconds": [round(value, 4) for value in times],
        }
        if first not in errors:
            ratios = times / np.array(seconds[first])
            found[name]["over_first"] = round(float(np.median(ratios)), 3)
            found[name]["range"] = [round(float(ratios.min()), 3), round(float(ratios.max()), 3)]
    return found


def sketching(model: PreTrainedModel, sizes: Sizes, checkpointing: bool) -> dict[str, Any]:
    """Sketching against the floor and a full backward."""
    with GradientCapture(model, gradient_checkpointing=checkpointing) as capture:
        groups = micro_batches(sizes, model.config.vocab_size)
        start = time.perf_counter()
        batches = [capture.layout(group) for group in groups]
        layout = (time.perf_counter() - start) / len(groups)
        methods: dict[str, Callable[[PairTokens], object]] = {
            "floor": partial(backward, capture),
            "sketch": partial(sketch_pairs, capture, CountSketch(sizes.width, 0)),
            "full backward": partial(full_backward, capture),
        }
        return {
            "layers": len(capture.layers),
            "prompts_shared": capture.why_not_shared or True,
            "layout_seconds": round(layout, 4),
            "model_gib": round(sum(parameter.nbytes for parameter in model.parameters()) / 2**30, 2),
            **compare(methods, batches, sizes.rounds),
        }


def ways(model: PreTrainedModel, sizes: Sizes, name: str, way: tuple[int, FoldRule, str]) -> dict[str, Any]:
    """One other way of sketching, against the floor."""
    width, fold, dtype = way
    with GradientCapture(model) as capture:
        batches = [capture.layout(group) for group in micro_batches(sizes, model.config.vocab_size)[::2]]
        compute = torch.float32 if dtype == "float32" else None
        sketch = CountSketch(width, 0, fold)
        methods: dict[str, Callable[[PairTokens], object]] = {
            "floor": partial(backward, capture),
            name: partial(sketch_pairs, capture, sketch, compute_dtype=compute),
        }
        return compare(methods, batches, 1)


def training(model: PreTrainedModel, sizes: Sizes, pairs: int, checkpointing: bool) -> dict[str, Any]:
    """A step of training on pairs whose rows have `sizes.row` tokens, gradients kept, no optimiser."""
    random = np.random.default_rng(1)
    prompt = sizes.row * 3 // 10

    def ids(count: int) -> list[int]:
        return random.integers(3, model.config.vocab_size, count).tolist()

    drawn = [
        TokenizedPair(ids(prompt), ids(sizes.row - prompt - 7 * number), ids((sizes.row - prompt) * 9 // 10))
        for number in range(pairs)
    ]
    tokens = sum(2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in drawn)
    sketched, _ = _sketch_seconds(model, drawn, sizes)
    batch = collate_pairs(drawn, 0, model.device)
    zeros = torch.zeros(pairs, device=model.device)
    reference = ChosenRejected(zeros, zeros)
    tokens_of = ChosenRejected(batch.chosen_tokens, batch.rejected_tokens)

    def step() -> None:
        logps = completion_logprobs(model, batch)
        losses, _ = preference_loss(ChosenRejected(*logps.chunk(2)), reference, LossSettings(), tokens_of)
        losses.mean().backward()

    try:
        model.requires_grad_(True)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        step()
        measured = [timed(step) for _ in range(4)]
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
        model.requires_grad_(False)
        model.zero_grad(set_to_none=True)
    seconds = statistics.median(took for took, _ in measured)
    return {
        "tokens": tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_gib": round(max(peak for _, peak in measured), 2),
        "sketch_seconds": round(sketched, 4),
        "over_sketching": round(seconds / sketched, 3),
    }


def _sketch_seconds(model: PreTrainedModel, pairs: list[TokenizedPair], sizes: Sizes) -> tuple[float, float]:
    with GradientCapture(model) as capture:
        batch = capture.layout(pairs)
        sketch = CountSketch(sizes.width, 0)
        sketch_pairs(capture, sketch, batch)
        measured = [timed(partial(sketch_pairs, capture, sketch, batch)) for _ in range(4)]
    return statistics.median(took for took, _ in measured), max(peak for _, peak in measured)


def head(model: PreTrainedModel, sizes: Sizes, trainable: bool, chunk: int) -> dict[str, Any]:
    """Forward and backward of the log-probabilities of tokens, `chunk` at a time."""
    weight = model.get_output_embeddings().get_parameter("weight")
    random = torch.Generator(model.device).manual_seed(0)
    shape = (sizes.head_tokens, weight.shape[1])
    states = torch.randn(shape, device=model.device, dtype=weight.dtype, generator=random).requires_grad_(True)
    tokens = torch.randint(weight.shape[0], (sizes.head_tokens,), device=model.device, generator=random)
    rows = torch.arange(sizes.head_tokens, device=model.device) % 8
    model.requires_grad_(False)
    weight.requires_grad_(trainable)
    wanted = [states, weight] if trainable else [states]

    def work() -> None:
        torch.autograd.grad(summed_logprobs(model, states, tokens, rows, 8, chunk).sum(), wanted)

    work()
    before = torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    measured = [timed(work) for _ in range(5)]
    seconds = statistics.median(took for took, _ in measured)
    return {
        "logits_mib": round(chunk * weight.shape[0] * 4 / 2**20, 1),
        "milliseconds": round(1000 * seconds, 2),
        "peak_above_gib": round(max(peak for _, peak in measured) - before, 3),
    }


def numerics(name: str, sizes: Sizes, device: str) -> dict[str, Any]:
    """A bfloat16 model's sketches and log-probabilities against those of the same weights in float32."""
    model = build(name, sizes, device, layers=sizes.slice_layers)
    pairs = draw_pairs(sizes.slice_pairs, sizes, model.config.vocab_size, seed=2)
    sketch = CountSketch(sizes.width, 0)
    members = token_budget_batches([pair.padded_tokens for pair in pairs], sizes.max_tokens)
    order = [index for group in members for index in group]
    lengths = [len(pairs[index].chosen_ids) for index in order] + [
        len(pairs[index].rejected_ids) for index in order
    ]

    def sketches(dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        with GradientCapture(model) as capture:
            results = [
                sketch_pairs(capture, sketch, capture.layout([pairs[index] for index in group]), dtype)
                for group in members
            ]
        logps = [torch.cat([getattr(result, which) for result in results]) for which in _LOGPS]
        return torch.cat([result.sketches for result in results]).double(), torch.cat(logps).double()

    rounded = {"bfloat16": sketches(None), "bfloat16, products float32": sketches(torch.float32)}
    model.float()
    exact, exact_logps = sketches(None)
    exact_cosines = _cosines_with_mean(exact)
    found: dict[str, Any] = {"spread_of_cosines": float(exact_cosines.std())}
    per_token = torch.tensor(lengths, device=exact.device)
    for which, (values, logps) in rounded.items():
        cosines = _cosines_with_mean(values)
        agreement = torch.nn.functional.cosine_similarity(values, exact)
        ratio = values.norm(dim=1) / exact.norm(dim=1) - 1
        found[which] = {
            "norms_relative_error": float(ratio.square().mean().sqrt()),
            "norms_bias": float(ratio.mean()),
            "cosine_with_float32": {"mean": float(agreement.mean()), "min": float(agreement.min())},
            "cosines_error": float(np.sqrt(np.mean((cosines - exact_cosines) ** 2))),
            "rank_correlation": rank_correlation(exact_cosines, cosines),
            "logprob_error_per_token": float(((logps - exact_logps) / per_token).square().mean().sqrt()),
            "logprob_per_token": float((exact_logps / per_token).mean()),
        }
    return found


_LOGPS = ("chosen_logps", "rejected_logps")


def _cosines_with_mean(sketches: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    mean = sketches.mean(dim=0, keepdim=True)
    return torch.nn.functional.cosine_similarity(sketches, mean).cpu().numpy()


def profile(model: PreTrainedModel, sizes: Sizes) -> dict[str, Any]:
    """The kernels that take most of the time of sketching one micro-batch, in milliseconds."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with GradientCapture(model) as capture:
        batch = capture.layout(micro_batches(sizes, model.config.vocab_size)[-1])
        sketch = CountSketch(sizes.width, 0)
        sketch_pairs(capture, sketch, batch)
        with torch.profiler.profile(activities=activities) as profiler:
            sketch_pairs(capture, sketch, batch)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    on_gpu = torch.cuda.is_available()

    def milliseconds(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000

    events = sorted(profiler.key_averages(), key=milliseconds, reverse=True)
    return {
        "total": round(sum(milliseconds(event) for event in events), 1),
        "top": [[event.key[:90], round(milliseconds(event), 2), event.count] for event in events[:25]],
    }


@contextmanager
def built(recorder: Recorder, name: str, *arguments: Any, **options: Any) -> Iterator[PreTrainedModel | None]:
    """A model, or None where it cannot be built or the time is over; its memory is given back."""
    holder: list[PreTrainedModel] = []

    def make() -> dict[str, Any]:
        holder.append(build(name, *arguments, **options))
        return {"attention": holder[0].config._attn_implementation}

    recorder.measure("built", make, model=name)
    yield holder.pop() if holder else None
    release()


def main() -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, to append to")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which nothing new is begun")
    parser.add_argument("--only", default="", help="some of the measurements, as sketching,head; all by default")
    parser.add_argument("--tiny", action="store_true", help="everything small, on a CPU too")
    arguments = parser.parse_args()
    sizes = TINY if arguments.tiny else Sizes()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        raise SystemExit("no CUDA device; --tiny runs on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    recorder = Recorder(arguments.out, arguments.seconds, frozenset(filter(None, arguments.only.split(","))))
    recorder.write(
        "machine",
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        torch=torch.__version__,
        transformers=transformers.__version__,
        sizes=vars(sizes),
    )
    run(recorder, sizes, device)


def run(recorder: Recorder, sizes: Sizes, device: str) -> None:
    """Everything, the most important first."""
    for name in ("llama3-8b", "gemma2-2b"):
        with built(recorder, name, sizes, device) as model:
            if model is not None:
                for checkpointing in (False, True) if name == "llama3-8b" else (False,):
                    work = partial(sketching, model, sizes, checkpointing)
                    recorder.measure("sketching", work, model=name, checkpointing=checkpointing)
                for pairs, checkpointing in ((1, True), (1, False), (2, True), (2, False)):
                    described = {"model": name, "pairs": pairs, "checkpointing": checkpointing}
                    recorder.measure(
                        "training", partial(training, model, sizes, pairs, checkpointing), **described
                    )
                recorder.measure("profile", partial(profile, model, sizes), model=name)
            del model
    for name in ("llama3-8b", "gemma2-2b"):
        with built(recorder, name, sizes, device, layers=1) as model:
            if model is not None:
                for trainable in (False, True):
                    for chunk in sizes.chunks:
                        described = {"model": name, "trainable": trainable, "chunk_tokens": chunk}
                        recorder.measure("head", partial(head, model, sizes, trainable, chunk), **described)
            del model
    for name in ("llama3-8b", "gemma2-2b"):
        recorder.measure("numerics", partial(numerics, name, sizes, device), model=name)
    other_ways = _other_ways(sizes)
    for name in ("llama3-8b", "gemma2-2b"):
        with built(recorder, name, sizes, device) as model:
            if model is not None:
                for way, settings in other_ways.items():
                    recorder.measure("ways", partial(ways, model, sizes, way, settings), model=name, way=way)
            del model


def _other_ways(sizes: Sizes) -> dict[str, tuple[int, FoldRule, str]]:
    """Widths, folds and the dtype of products (empty: the model's)."""
    width = sizes.width
    auto = FoldRule()
    ways: list[tuple[int, FoldRule, str]] = [(4 * width, auto, ""), (width, auto, "float32")]
    if not sizes.shrink:
        ways += [(factor * width, FoldRule(min_side=side), "") for side in (512, 1024) for factor in (1, 4)]
        ways += [(16 * width, auto, ""), (width, FoldRule(4), ""), (width, FoldRule(2), "")]
    return {
        f"{rule}, width {number}{', ' if dtype else ''}{dtype}": (number, rule, dtype)
        for number, rule, dtype in ways
    }


if __name__ == "__main__":
    main()
