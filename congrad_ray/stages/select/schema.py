"""The tables of a selection: every pair's scores, and the kept pairs."""

from __future__ import annotations

import pyarrow as pa

from congrad_ray.data.tables import LANGUAGE, MESSAGES, PAIR_ID, PROMPT, field

SCORES = pa.schema(
    [
        PAIR_ID,
        LANGUAGE,
        field("score", pa.float64(), "what the keep rule went by"),
        field("cosine", pa.float64(), "cosine of the pair's sketch with the multilingual direction"),
        field("dot", pa.float64(), "dot product of the pair's sketch with the multilingual direction"),
        field("worst_cosine", pa.float64(), "least cosine of the pair's sketch with the languages' gradients"),
        field("own_cosine", pa.float64(), "cosine of the pair's sketch with its own language's gradient"),
        field("kept", pa.bool_(), "whether the keep rule kept the pair"),
    ]
)


# What is copied from the table of sketches: tokens as the model's tokenizer and chat template make them.
TOKENS = ("prompt_tokens", "chosen_tokens", "rejected_tokens")

SELECTED = pa.schema(
    [
        PAIR_ID,
        LANGUAGE,
        PROMPT,
        field("chosen", MESSAGES, "TRL column"),
        field("rejected", MESSAGES, "TRL column"),
        field(
            "ref_chosen_logps",
            pa.float64(),
            "the reference's log-probability of chosen, nats; drop it for TRL with precompute_ref_log_probs",
        ),
        field(
            "ref_rejected_logps",
            pa.float64(),
            "the reference's log-probability of rejected, nats; as ref_chosen_logps",
        ),
        field("congrad_score", pa.float64(), "what the keep rule went by; by default the cosine"),
        *(field(name, pa.int32(), f"tokens of {name.removesuffix('_tokens')}") for name in TOKENS),
        *(
            field(f"{name}_score", pa.float32(), f"the judge's score of {name}; null where there is none", True)
            for name in ("chosen", "rejected")
        ),
    ]
)
