"""The tables of an evaluation: answers, and comparisons of two."""

from __future__ import annotations

import pyarrow as pa

from congrad_ray.data.tables import LANGUAGE, PROMPT, PROMPT_ID, field

ANSWERS = pa.schema(
    [
        field("answer_id", pa.string(), "hash of prompt_id, model, decoding and sample number"),
        PROMPT_ID,
        LANGUAGE,
        field("seen", pa.bool_(), "whether prompts of this language are trained on"),
        PROMPT,
        field("model", pa.string(), "'M_0', 'M_1', ...: the policy after that many iterations"),
        field("decoding", pa.string(), "'greedy' or 'sampled'"),
        field("response", pa.string(), "the generated text"),
        field("response_tokens", pa.int32(), "generated tokens"),
        field("truncated", pa.bool_(), "generation stopped at the token limit"),
        field("true_score", pa.float32(), "built-in world: quality in 0..1 computed by program", nullable=True),
    ]
)


COMPARISONS = pa.schema(
    [
        field("comparison_id", pa.string(), "hash of both answer ids and the order"),
        PROMPT_ID,
        LANGUAGE,
        field("seen", pa.bool_(), "whether prompts of this language are trained on"),
        field("model", pa.string(), "the model compared"),
        field("baseline", pa.string(), "the model compared with, or 'references'"),
        field("order", pa.string(), "'model_first' or 'baseline_first'"),
        field("win", pa.float32(), "1 model wins, 0.5 tie, 0 baseline wins; null unreadable", nullable=True),
        field("output", pa.string(), "what the judge wrote", nullable=True),
        field("unreadable", pa.string(), "why there is no verdict", nullable=True),
        field("prompt_tokens", pa.int32(), "of what the judge was asked", nullable=True),
        field("output_tokens", pa.int32(), "of what it wrote", nullable=True),
    ]
)
