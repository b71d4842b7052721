"""The table of preference pairs."""

from __future__ import annotations

import pyarrow as pa

from congrad_ray.data.tables import LANGUAGE, MESSAGES, PAIR_ID, PROMPT, PROMPT_ID, field

PAIRS = pa.schema(
    [
        PAIR_ID,
        PROMPT_ID,
        LANGUAGE,
        PROMPT,
        field("chosen", MESSAGES, "the best response as an assistant message"),
        field("rejected", MESSAGES, "the worst response as an assistant message"),
        field("chosen_score", pa.float32(), "the judge's score of chosen"),
        field("rejected_score", pa.float32(), "the judge's score of rejected"),
        field("chosen_response_id", pa.string(), "response_id of chosen"),
        field("rejected_response_id", pa.string(), "response_id of rejected"),
    ]
)
