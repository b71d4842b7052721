"""What the peers' scripts share: the command line, the examples, the loss, the measuring and the report.

Every script runs inside its own environment, see the .txt file of the same name, and uses nothing of this package.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

NO_LOSS = -100
Gradients = npt.NDArray[np.float32]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Example:
    """A prompt with one of its two responses; only the response's tokens have labels."""

    token_ids: list[int]
    labels: list[int]


@dataclass
class Measured:
    """What the gradient pass took."""

    seconds: float
    rss_before_mib: float
    examples: int
    padded_tokens: int
    notes: list[str] = field(default_factory=list)


def parse_arguments(description: str, projection_dimension: int) -> argparse.Namespace:
    """The command line; `projection_dimension` is the default, each script says what it means by it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--indexes", help="row numbers of the pairs, with commas between them")
    rows.add_argument("--indexes-file", type=Path, help="a JSON list of row numbers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gradients", type=Path, help="where to save the gradients of log p, two rows per pair")
    parser.add_argument("--projection-dimension", type=int, default=projection_dimension)
    # On a CPU a larger batch is no faster per token, and from some 4,000 positions much slower.
    parser.add_argument("--token-budget", type=int, default=1024, help="most positions in a batch, with padding")
    parser.add_argument("--check", action="store_true", help="compare with plain autograd; for a few short pairs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def read_examples(arguments: argparse.Namespace) -> list[Example]:
    """Chosen and rejected of every pair asked for, in this order."""
    rows = json.loads(arguments.indexes_file.read_text() if arguments.indexes_file else f"[{arguments.indexes}]")
    table = pq.read_table(arguments.pairs, columns=["prompt_ids", "chosen_ids", "rejected_ids"]).take(rows)
    return [
        Example(pair["prompt_ids"] + response, [NO_LOSS] * len(pair["prompt_ids"]) + response)
        for pair in table.to_pylist()
        for response in (pair["chosen_ids"], pair["rejected_ids"])
    ]


def shortest(examples: Sequence[Example]) -> Example:
    """The example to warm up with."""
    return min(examples, key=lambda example: len(example.token_ids))


def make_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Numbers of the examples in batches of similar length; a batch of several keeps to the budget once padded."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def padded_tokens(lengths: Sequence[int], batches: list[list[int]]) -> int:
    """How many positions these batches compute."""
    return sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)


def stack(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Token ids and labels padded on the right, which a causal model needs no attention mask for."""
    ids = [torch.tensor(example.token_ids) for example in examples]
    labels = [torch.tensor(example.labels) for example in examples]
    pad = nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True), pad(labels, batch_first=True, padding_value=NO_LOSS)


def load_model(folder: Path) -> PreTrainedModel:
    """The model in float32, frozen but for the input embedding, which lets a backward pass reach every layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.use_cache = False
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    return model


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of all linear layers but the output embedding."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def log_probability(model: PreTrainedModel, token_ids: Tensor, labels: Tensor) -> Tensor:
    """Sum of log p over the labelled tokens of a batch; only positions with a label pass the output embedding."""
    hidden = model.base_model(input_ids=token_ids).last_hidden_state[:, :-1]
    labels = labels[:, 1:]
    labelled = labels != NO_LOSS
    logits = model.get_output_embeddings()(hidden[labelled])
    return -nn.functional.cross_entropy(logits, labels[labelled], reduction="sum")


def relative_error(
    model: PreTrainedModel,
    examples: Sequence[Example],
    gradients: Gradients,
    project: Callable[[list[Tensor]], Tensor],
) -> float:
    """Largest relative error of the library's gradients; `project` projects autograd's as the library does."""
    weights = [model.get_submodule(name).get_parameter("weight").requires_grad_() for name in linear_layers(model)]
    worst = 0.0
    for example, row in zip(examples, gradients, strict=True):
        expected = project(list(torch.autograd.grad(log_probability(model, *stack([example])), weights)))
        worst = max(worst, float((torch.from_numpy(row) - expected).norm() / expected.norm()))
    return worst


def measure(work: Callable[[], Result]) -> tuple[Result, float, float]:
    """The result of `work`, its seconds, and the resident memory just before it in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize() / 2**20
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start, before


def write_report(
    arguments: argparse.Namespace,
    library: str,
    examples: Sequence[Example],
    gradients: Gradients,
    measured: Measured,
    model: PreTrainedModel,
    project: Callable[[list[Tensor]], Tensor],
) -> None:
    """Writes the result, and the gradients and their error if asked for, see `relative_error`."""
    report = {
        "library": library,
        "version": version(library),
        "seconds": measured.seconds,
        "examples": measured.examples,
        "tokens": sum(len(example.token_ids) for example in examples),
        "padded_tokens": measured.padded_tokens,
        # Read before the check, which is no part of the library's work; Linux counts in KiB.
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "rss_before_mib": measured.rss_before_mib,
        "projection_dimension": arguments.projection_dimension,
        "bytes_per_example": gradients.nbytes // len(gradients),
        "threads": arguments.threads,
        "notes": measured.notes,
    }
    if arguments.check:
        report["relative_error"] = relative_error(model, examples, gradients, project)
    if arguments.gradients:
        np.save(arguments.gradients, gradients)
    arguments.out.write_text(json.dumps(report, indent=2))
    print(json.dumps(report, indent=2))
