"""One pass of sketches over each dataset, and over some pairs exact gradients and the embedding's."""

from __future__ import annotations

import io
import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from congrad_ray.config.recipe import Recipe
from congrad_ray.data.tables import FAILURE
from congrad_ray.modeling.source import ModelSource
from congrad_ray.rundir.directory import Folder
from congrad_ray.runtime.progress import Progress
from congrad_ray.stages.select.directions import Float64Array
from congrad_ray.stages.sketch.replicas import ReplicaSpec, SketchReplica
from congrad_ray.stages.sketch.schema import sketches_schema
from real_study.pairs import SELECT, StudyDataError, study_pairs, tokenized_pairs
from real_study.protocol import DatasetName, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from congrad_ray.modeling.batching import PairBatch

logger = logging.getLogger("congrad_ray.real_study")

PAIRS_FILE = "pairs.parquet"
SKETCHES = "sketches"
SETTINGS_FILE = "sketches.json"
EXACT_FILE = "exact-gram.npy"
EMBEDDING = "embedding"

EMBEDDING_SKETCHES = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("squared_norm", pa.float64(), nullable=False),  # exact
        pa.field("sketch", pa.binary(), nullable=False),  # float32
    ]
)


def write_pairs(
    dataset: DatasetName, protocol: Protocol, source: ModelSource, data: Path, run: Folder
) -> pa.Table:
    """The pairs of a dataset, written to the run the first time.

    Raises StudyDataError where the run has other pairs, which another protocol, file or tokenizer made.
    """
    folder = run / dataset
    pairs = study_pairs(dataset, protocol, data, source.load_tokenizer())
    if not folder.exists(PAIRS_FILE):
        folder.write_table(PAIRS_FILE, pairs)
    elif not folder.read_table(name=PAIRS_FILE).equals(pairs):
        raise StudyDataError(
            f"{folder.path}/{PAIRS_FILE} has other pairs than this protocol, data and model make: "
            "give another --run"
        )
    return pairs


def sketch_dataset(
    dataset: DatasetName, protocol: Protocol, recipe: Recipe, source: ModelSource, run: Folder, threads: int
) -> None:
    """Sketches the pairs to select from that have no sketch yet, `pairs_per_piece` at a time, each a file.

    Raises StudyDataError where the run has sketches of other settings.
    """
    folder = run / dataset / SKETCHES
    settings = {"model.dtype": recipe.model.dtype, "model.max_length": recipe.model.max_length}
    settings |= recipe.sketch.model_dump(mode="json", exclude={"max_tokens_per_batch", "gradient_checkpointing"})
    before = (run / dataset).read_json(SETTINGS_FILE)
    if before is None:
        (run / dataset).write_json(SETTINGS_FILE, settings)
    elif before != settings:
        other = {name: before.get(name) for name in settings if before.get(name) != settings[name]}
        raise StudyDataError(f"{folder.path} has sketches of other settings, {other}: give another --run")
    pairs = _to_select_from(run, dataset)
    done = folder.read_table(["pair_id"])["pair_id"] if folder.files(".parquet") else pa.array([], pa.string())
    missing = pairs.filter(
        pc.invert(pc.is_in(pairs["pair_id"], value_set=pa.array(done.to_pylist(), pa.string())))
    )
    logger.info(f"{dataset}: {len(pairs)} pairs, {len(missing)} of them to be sketched")
    if not len(missing):
        return
    replica = SketchReplica(ReplicaSpec(source, recipe, threads=threads))
    progress = Progress(len(missing))
    schema = sketches_schema(recipe.sketch.width, recipe.sketch.stored_dtype)
    for start in range(0, len(missing), protocol.pairs_per_piece):
        found = replica(missing.slice(start, protocol.pairs_per_piece))
        good = found.filter(found[FAILURE].is_null())
        for row in found.filter(found[FAILURE].is_valid()).to_pylist():
            logger.warning(f"{dataset} {row['language']} {row['pair_id']} is left out: {row[FAILURE]}")
        columns = [good[name] for name in schema.names]
        folder.write_table(f"part-{len(folder.files('.parquet')):05}.parquet", pa.table(columns, schema=schema))
        tokens = sum(int(pc.sum(good[f"{name}_tokens"]).as_py() or 0) for name in ("prompt", "chosen", "rejected"))
        progress.add(len(good), len(found) - len(good), tokens)


def subset(pairs: pa.Table, per_language: int) -> pa.Table:
    """The first pairs of each language by id, which is a hash: as good as drawn. Sorted by pair_id."""
    taken: Counter[str] = Counter()
    wanted = []
    pairs = pairs.sort_by("pair_id")
    for language in pairs["language"].to_pylist():
        taken[language] += 1
        wanted.append(taken[language] <= per_language)
    return pairs.filter(pa.array(wanted))


def exact_gram(protocol: Protocol, recipe: Recipe, source: ModelSource, run: Folder, threads: int) -> None:
    """Writes the exact inner products (n, n) float64 of the u of alpaca's subset, in the order of `subset`."""
    import torch

    from congrad_ray.stages.sketch.capture import GradientCapture
    from congrad_ray.stages.sketch.exact import gram_matrix

    folder = run / "alpaca"
    if folder.exists(EXACT_FILE):
        return
    pairs = subset(_to_select_from(run, "alpaca"), protocol.selection.subset_per_language)
    logger.info(f"exact gradients of {len(pairs)} pairs, in one pass")
    torch.set_num_threads(threads)
    tokenized = tokenized_pairs(pairs, source.load_tokenizer(), protocol.max_length)
    model = source.load_model("cpu")
    # All pairs go together: what a layer keeps of them is dropped and computed again in the backward.
    with GradientCapture(model, recipe.sketch.layers, gradient_checkpointing=True) as capture:
        gram = gram_matrix(capture, capture.layout(tokenized)).numpy()
    buffer = io.BytesIO()
    np.save(buffer, gram)
    folder.write_bytes(EXACT_FILE, buffer.getvalue())


def read_exact_gram(run: Folder) -> Float64Array | None:
    """What `exact_gram` wrote, if it did."""
    folder = run / "alpaca"
    if not folder.exists(EXACT_FILE):
        return None
    found: Float64Array = np.load(io.BytesIO(folder.read_bytes(EXACT_FILE)))
    return found


def embedding_sketches(protocol: Protocol, source: ModelSource, run: Folder, threads: int) -> None:
    """Sketches the embedding's part of u of alpaca's subset, which sketches leave out; a file for each pair.

    Where the output embedding is the input embedding (tied) it is the gradient of both uses.
    """
    import torch

    from congrad_ray.modeling.batching import collate_pairs
    from congrad_ray.stages.sketch.countsketch import CountSketch, FoldRule

    folder = run / "alpaca" / EMBEDDING
    pairs = subset(_to_select_from(run, "alpaca"), protocol.selection.subset_per_language)
    missing = pairs.filter(
        pa.array([not folder.exists(f"{pair}.parquet") for pair in pairs["pair_id"].to_pylist()])
    )
    logger.info(f"the embedding's gradients of {len(pairs)} pairs, {len(missing)} of them to be done")
    if not len(missing):
        return
    torch.set_num_threads(threads)
    tokenizer = source.load_tokenizer()
    model = source.load_model("cpu").requires_grad_(False)
    sketch = CountSketch(protocol.sketch.width, protocol.sketch.seed, FoldRule(1))
    progress = Progress(len(missing))
    tokenized = tokenized_pairs(missing, tokenizer, protocol.max_length)
    for pair, tokens in zip(missing["pair_id"].to_pylist(), tokenized, strict=True):
        gradient = embedding_gradient(model, collate_pairs([tokens], int(tokenizer.pad_token_id)))
        numbers = sketch.sketch_vector({"embedding": gradient}).numpy()
        row = {
            "pair_id": pair,
            "squared_norm": float(gradient.double().square().sum()),
            "sketch": numbers.tobytes(),
        }
        folder.write_table(f"{pair}.parquet", pa.Table.from_pylist([row], schema=EMBEDDING_SKETCHES))
        progress.add(1)


def embedding_gradient(model: PreTrainedModel, batch: PairBatch) -> Tensor:
    """The output embedding's part of u of the one pair in `batch`, (vocabulary, hidden) float32, by autograd.

    u = grad log p(chosen) - grad log p(rejected). Its flag is as before afterwards.
    """
    import torch

    from congrad_ray.modeling.logprobs import completion_logprobs

    weight = model.get_output_embeddings().get_parameter("weight")
    required = weight.requires_grad
    weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            chosen, rejected = completion_logprobs(model, batch)
            return torch.autograd.grad(chosen - rejected, weight)[0].float()
    finally:
        weight.requires_grad_(required)


def _to_select_from(run: Folder, dataset: DatasetName) -> pa.Table:
    pairs = (run / dataset).read_table(name=PAIRS_FILE)
    return pairs.filter(pc.equal(pairs["part"], SELECT))
