"""The tables of judgements: one row for each, and one for each response."""

from __future__ import annotations

import pyarrow as pa

from congrad_ray.data.tables import LANGUAGE, PROMPT_ID, RESPONSE_ID, field

ROWS_PER_PART = 4096  # of JUDGEMENTS

JUDGEMENTS = pa.schema(
    [
        RESPONSE_ID,
        PROMPT_ID,
        LANGUAGE,
        field(
            "score",
            pa.float32(),
            "0..5, a reward model's logit, or of several judges the mean of standardised scores; null: unread",
            nullable=True,
        ),
        field("readable", pa.int32(), "judgements that could be read"),
        field("asked", pa.int32(), "judgements asked for"),
        field(
            "outputs",
            pa.list_(pa.string()),
            "what the judge wrote; of comparisons and several judges it is in samples/ alone",
        ),
    ]
)


JUDGEMENT_SAMPLES = pa.schema(
    [
        field("judgement_id", pa.string(), "hash of response_id and number"),
        RESPONSE_ID,
        PROMPT_ID,
        LANGUAGE,
        field("score", pa.float64(), "0..5, or a reward model's logit; null: unreadable", nullable=True),
        field("mass", pa.float64(), "expected_score: probability of the score tokens together", nullable=True),
        field("output", pa.string(), "what the judge wrote", nullable=True),
        field("unreadable", pa.string(), "why there is no score", nullable=True),
        field("prompt_tokens", pa.int32(), "tokens of what the judge was asked", nullable=True),
        field("output_tokens", pa.int32(), "tokens that the judge wrote", nullable=True),
        field("judge", pa.string(), "who judged: its model's name", nullable=True),
        field(
            "compared_with", pa.string(), "pairwise: response_id of the other, whose score is 5 less this", True
        ),
    ]
)
