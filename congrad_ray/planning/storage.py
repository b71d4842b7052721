"""Bytes that every stage leaves in the run directory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import pyarrow as pa
import torch

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.modeling.shape import BYTES, ModelShape
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.tokens import Lengths, StageCount
from congrad_ray.rundir.directory import Manifest, parquet_bytes
from congrad_ray.stages.evaluate.schema import ANSWERS
from congrad_ray.stages.generate.schema import RESPONSES
from congrad_ray.stages.judge.schema import JUDGEMENT_SAMPLES, JUDGEMENTS
from congrad_ray.stages.pair.schema import PAIRS
from congrad_ray.stages.prompts.schema import PROMPTS
from congrad_ray.stages.select.schema import SCORES, SELECTED
from congrad_ray.stages.sketch.schema import sketch_bytes, sketches_schema
from congrad_ray.stages.sketch.storage import to_storage

# 32 hexadecimal digits hold 16 bytes, and zstd finds nearly all of that.
_ID_BYTES = 18.0
# As the stages write them: stages.sketch.stage, stages.judge.stage.
_PAIRS_PER_PART, _JUDGEMENTS_PER_PART = 64, 4096
_PART_BYTES = {"cpu": 2**15, "cuda": 2**21}


def stage_bytes(
    count: StageCount,
    counts: dict[str, StageCount],
    shape: ModelShape,
    recipe: Recipe,
    lengths: Lengths,
    assumptions: Assumptions,
    profile: Profile,
) -> float:
    """Bytes on disk of a stage of one iteration, when it is done; see also `checkpoint_bytes`.

    Where a run has measured the bytes of a row, those are taken.
    """
    stage = count.stage
    if stage == "train":
        return float(policy_bytes(shape, recipe))
    rows = counts["generate"].rows if stage == "judge" else count.rows
    if not rows:
        return 0.0
    of_row = lengths.row_bytes.get(stage)
    if of_row is None:
        of_row = _row_bytes(stage, counts, recipe, lengths, assumptions)
    answers = {
        "generate": recipe.generate.max_tokens,
        "judge": recipe.judge.max_tokens if recipe.judge.method == "sampled" else 1,
        "evaluate": recipe.evaluate.max_tokens,
    }
    parts = 2 if stage == "select" else 1
    if stage in answers:
        parts = math.ceil(count.rows / profile.engines.rows_per_batch(answers[stage]))
    if stage == "judge":
        parts += math.ceil(rows / _JUDGEMENTS_PER_PART)
    if stage == "sketch":
        text = assumptions.bytes_per_token * (lengths.prompt + 2 * lengths.paired_response)
        parts = math.ceil(rows / max(1, min(_PAIRS_PER_PART, _PART_BYTES[profile.device] // text)))
    # The direction for each language, and the languages' gradients, in float32.
    direction = 8.0 * len(recipe.prompts.languages) * recipe.sketch.width if stage == "select" else 0.0
    return rows * of_row + parts * file_bytes(_schema(stage, recipe)) + direction


def measured_row_bytes(recipe: Recipe, manifests: Mapping[str, Manifest]) -> dict[str, float]:
    """Bytes of a row by stage, from what finished stages of a run have written; `manifests` are by stage."""
    found = {}
    for stage, manifest in manifests.items():
        parts = [
            size
            for name, size in manifest.files.items()
            if name.endswith(".parquet") and not name.startswith("quarantine/")
        ]
        if manifest.rows and parts:
            beside = len(parts) * file_bytes(_schema(stage, recipe))
            found[stage] = max(0.0, sum(parts) - beside) / manifest.rows
    return found


def _row_bytes(
    stage: str, counts: dict[str, StageCount], recipe: Recipe, lengths: Lengths, assumptions: Assumptions
) -> float:
    """Expected bytes of a row, of the judge's for each response; texts shrink as is assumed."""
    text = assumptions.bytes_per_token / assumptions.text_compression
    prompt, response, paired = (
        text * tokens for tokens in (lengths.prompt, lengths.response, lengths.paired_response)
    )
    fixed = _fixed(_schema(stage, recipe))
    # The samples of a prompt stand close together: zstd finds its text and id again.
    again = 1 - 1 / recipe.generate.num_generations
    match stage:
        case "prompts":
            return fixed + prompt
        case "generate":
            return fixed + prompt + response - again * (_ID_BYTES + prompt)
        case "judge":
            # What the judge wrote is there twice: a row for each judgement, and a row for each response.
            asked = counts["judge"].rows / counts["generate"].rows
            of_sample = _fixed(JUDGEMENT_SAMPLES) - again * _ID_BYTES + 2 * lengths.judgement * text
            return fixed - again * _ID_BYTES + asked * of_sample
        case "pair":
            return fixed + prompt + 2 * paired
        case "sketch":
            sketch = _schema(stage, recipe).field("sketch").type.byte_width
            return fixed - sketch + stored_sketch_bytes(_width(recipe), recipe.sketch.stored_dtype)
        case "select":
            kept = counts["train"].rows / recipe.train.num_train_epochs / counts["select"].rows
            return fixed + kept * (_fixed(SELECTED) + prompt + 2 * paired)
        case "evaluate":
            return fixed + prompt + text * lengths.answer
    raise ValueError(f"no stage {stage}")


def _schema(stage: str, recipe: Recipe) -> pa.Schema:
    """Of the table that a stage writes most of."""
    if stage == "sketch":
        return sketches_schema(_width(recipe), recipe.sketch.stored_dtype)
    return {
        "prompts": PROMPTS,
        "generate": RESPONSES,
        "judge": JUDGEMENTS,
        "pair": PAIRS,
        "select": SCORES,
        "evaluate": ANSWERS,
    }[stage]


def _width(recipe: Recipe) -> int:
    return len(recipe.prompts.languages) if recipe.sketch.method == "exact" else recipe.sketch.width


@cache
def file_bytes(schema: pa.Schema) -> int:
    """What a Parquet part takes beside its rows: header and footer, with what the schema says of every column."""
    return len(parquet_bytes(schema.empty_table()))


@cache
def stored_sketch_bytes(width: int, dtype: str) -> float:
    """Bytes of a sketch on disk, from a few that are drawn from a normal distribution and stored as a part is.

    Many gradient entries add up in each number, which makes them nearly normal for a model of real size. Those of
    a tiny one have longer tails, and zstd finds more in them.
    """
    rows = 16
    drawn = torch.randn((rows, width), generator=torch.Generator().manual_seed(0))
    stored, _ = to_storage(drawn, dtype)
    field = sketches_schema(width, dtype).field("sketch")
    table = pa.table([pa.array(sketch_bytes(stored), field.type)], schema=pa.schema([field]))
    return len(parquet_bytes(table)) / rows


def policy_bytes(shape: ModelShape, recipe: Recipe) -> int:
    """Bytes of a checkpoint's safetensors: every parameter in the model's dtype, tied ones once."""
    return shape.parameters * BYTES[recipe.model.dtype]


def checkpoint_bytes(shape: ModelShape, recipe: Recipe, steps: float) -> float:
    """Bytes of the two training checkpoints that are kept while training runs: weights, master copy, moments."""
    if steps <= recipe.train.save_steps:
        return 0.0
    return 2.0 * shape.parameters * (BYTES[recipe.model.dtype] + 12)


def _fixed(schema: pa.Schema) -> float:
    """Bytes of a row's numbers and ids; texts are counted apart."""
    total = 0.0
    for field in schema:
        if field.name.endswith("_id"):
            total += _ID_BYTES
        elif pa.types.is_fixed_size_binary(field.type):
            total += field.type.byte_width
        elif pa.types.is_integer(field.type) or pa.types.is_floating(field.type):
            total += field.type.bit_width / 8
    return total
