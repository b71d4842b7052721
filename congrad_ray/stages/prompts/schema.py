"""The table of prompts."""

from __future__ import annotations

import pyarrow as pa

from congrad_ray.data.tables import LANGUAGE, PROMPT, PROMPT_ID, field

ROWS_PER_PART = 65_536

PROMPTS = pa.schema(
    [
        PROMPT_ID,
        LANGUAGE,
        PROMPT,
        field("split", pa.string(), "'train' or 'evaluation'"),
        field("seen", pa.bool_(), "whether prompts of this language are trained on"),
        field("task", pa.string(), "built-in world: what the true score is computed from", nullable=True),
    ]
)
