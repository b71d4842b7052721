"""Bytes that every stage leaves in the run directory."""

from __future__ import annotations

import pyarrow as pa

from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.shape import BYTES, ModelShape
from congrad_ray.planning.tokens import Lengths, StageCount
from congrad_ray.recipe import Recipe
from congrad_ray.tables import ANSWERS, JUDGEMENTS, PAIRS, PROMPTS, RESPONSES, SCORES, SELECTED, sketches_schema

# 32 hexadecimal digits hold 16 bytes, and zstd finds nearly all of that.
_ID_BYTES = 18.0


def stage_bytes(
    count: StageCount,
    counts: dict[str, StageCount],
    shape: ModelShape,
    recipe: Recipe,
    lengths: Lengths,
    assumptions: Assumptions,
) -> float:
    """Bytes on disk of a stage of one iteration, when it is done; see also `checkpoint_bytes`.

    Numbers, sketches above all, are counted as they are: zstd makes them smaller by a part that depends on them.
    """
    text = assumptions.bytes_per_token / assumptions.text_compression
    prompt, response, paired = (
        text * tokens for tokens in (lengths.prompt, lengths.response, lengths.paired_response)
    )
    rows = count.rows
    match count.stage:
        case "prompts":
            return rows * (_fixed(PROMPTS) + prompt)
        case "generate":
            # The samples of a prompt stand close together: zstd finds its text and id again.
            once = rows / recipe.generate.num_generations
            return rows * (_fixed(RESPONSES) - _ID_BYTES + response) + once * (_ID_BYTES + prompt)
        case "judge":
            # What the judge wrote is there twice: a row for each judgement, and a row for each response.
            written = 2 * count.decode * text
            return rows * 2 * _ID_BYTES + counts["generate"].rows * _fixed(JUDGEMENTS) + written
        case "pair":
            return rows * (_fixed(PAIRS) + prompt + 2 * paired)
        case "sketch":
            width = recipe.sketch.width
            if recipe.sketch.method == "exact":
                width = len(recipe.prompts.languages)
            return rows * (_fixed(sketches_schema(width, recipe.sketch.stored_dtype)))
        case "select":
            kept = counts["train"].rows / recipe.train.num_train_epochs
            # The direction for each language, and the languages' gradients, in float32.
            direction = 8.0 * len(recipe.prompts.languages) * recipe.sketch.width
            return rows * _fixed(SCORES) + kept * (_fixed(SELECTED) + prompt + 2 * paired) + direction
        case "train":
            return float(policy_bytes(shape, recipe))
        case "evaluate":
            return rows * (_fixed(ANSWERS) + prompt + text * lengths.answer)
    raise ValueError(f"no stage {count.stage}")


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
