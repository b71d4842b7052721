"""The table of responses."""

from __future__ import annotations

import pyarrow as pa

from congrad_ray.data.tables import LANGUAGE, PROMPT, PROMPT_ID, RESPONSE_ID, field

RESPONSES = pa.schema(
    [
        RESPONSE_ID,
        PROMPT_ID,
        LANGUAGE,
        PROMPT,
        field("sample", pa.int32(), "number of the sample, 0..num_generations-1"),
        field("seed", pa.int64(), "seed of the sampling"),
        field("response", pa.string(), "the generated text"),
        field("prompt_tokens", pa.int32(), "tokens of the prompt with its chat template"),
        field("response_tokens", pa.int32(), "generated tokens, the end of turn included"),
        field("truncated", pa.bool_(), "generation stopped at the token limit, not by an end of turn"),
    ]
)
