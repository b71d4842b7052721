"""The Arrow schema of every table that passes from one stage to the next.

Every column carries its meaning in the field metadata under `doc`. Rows are joined by
id, never by position: ids are hashes of what a row is about, so the same input gives the same ids on every
machine and in every run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from congrad_ray.config.printable import brief, printable

Message = dict[str, str]

MESSAGES = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))


def _field(name: str, type_: pa.DataType, doc: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, type_, nullable=nullable, metadata={"doc": doc})


PROMPT_ID = _field("prompt_id", pa.string(), "hash of language and prompt text")
LANGUAGE = _field("language", pa.string(), "BCP-47 tag of the prompt's language")
PROMPT = _field("prompt", MESSAGES, "chat messages, the last one the user's (TRL's conversational prompt)")
RESPONSE_ID = _field("response_id", pa.string(), "hash of prompt_id, iteration and sample number")
PAIR_ID = _field("pair_id", pa.string(), "hash of prompt_id and iteration")

PROMPTS = pa.schema(
    [
        PROMPT_ID,
        LANGUAGE,
        PROMPT,
        _field("split", pa.string(), "'train' or 'evaluation'"),
        _field("seen", pa.bool_(), "whether prompts of this language are trained on"),
        _field("task", pa.string(), "built-in world: what the true score is computed from", nullable=True),
    ]
)

RESPONSES = pa.schema(
    [
        RESPONSE_ID,
        PROMPT_ID,
        LANGUAGE,
        PROMPT,
        _field("sample", pa.int32(), "number of the sample, 0..num_generations-1"),
        _field("seed", pa.int64(), "seed of the sampling"),
        _field("response", pa.string(), "the generated text"),
        _field("prompt_tokens", pa.int32(), "tokens of the prompt with its chat template"),
        _field("response_tokens", pa.int32(), "generated tokens, the end of turn included"),
        _field("truncated", pa.bool_(), "generation stopped at the token limit, not by an end of turn"),
    ]
)

JUDGEMENTS = pa.schema(
    [
        RESPONSE_ID,
        PROMPT_ID,
        LANGUAGE,
        _field("score", pa.float32(), "0..5; null where no judgement could be read", nullable=True),
        _field("readable", pa.int32(), "judgements that could be read"),
        _field("asked", pa.int32(), "judgements asked for"),
        _field("outputs", pa.list_(pa.string()), "what the judge wrote, for the reader of a run"),
    ]
)

JUDGEMENT_SAMPLES = pa.schema(
    [
        _field("judgement_id", pa.string(), "hash of response_id and number"),
        RESPONSE_ID,
        PROMPT_ID,
        LANGUAGE,
        _field("score", pa.float64(), "0..5; null: unreadable", nullable=True),
        _field("mass", pa.float64(), "expected_score: probability of the score tokens together", nullable=True),
        _field("output", pa.string(), "what the judge wrote", nullable=True),
        _field("unreadable", pa.string(), "why there is no score", nullable=True),
        _field("prompt_tokens", pa.int32(), "tokens of what the judge was asked", nullable=True),
        _field("output_tokens", pa.int32(), "tokens that the judge wrote", nullable=True),
    ]
)

PAIRS = pa.schema(
    [
        PAIR_ID,
        PROMPT_ID,
        LANGUAGE,
        PROMPT,
        _field("chosen", MESSAGES, "the best response as an assistant message"),
        _field("rejected", MESSAGES, "the worst response as an assistant message"),
        _field("chosen_score", pa.float32(), "the judge's score of chosen"),
        _field("rejected_score", pa.float32(), "the judge's score of rejected"),
        _field("chosen_response_id", pa.string(), "response_id of chosen"),
        _field("rejected_response_id", pa.string(), "response_id of rejected"),
    ]
)


def sketches_schema(width: int, dtype: str) -> pa.Schema:
    """Schema of the sketch stage's table for sketches of `width` numbers of a NumPy dtype."""
    sketch = pa.binary(width * np.dtype(dtype).itemsize)
    return pa.schema(
        [
            PAIR_ID,
            LANGUAGE,
            _field(
                "sketch", sketch, f"sketch of u, the pair's gradient direction: {width} {dtype}, little-endian"
            ),
            _field("sketch_scale", pa.float32(), "what the numbers of the sketch are to be multiplied by"),
            _field(
                "norm", pa.float64(), "Euclidean norm of u over the sketched layers: exact where no side is folded"
            ),
            _field("coefficient", pa.float64(), "c > 0: the gradient of the DPO loss is -c * u"),
            _field("chosen_logps", pa.float64(), "summed log-probability of chosen, nats; also the reference's"),
            _field(
                "rejected_logps",
                pa.float64(),
                "summed log-probability of rejected, nats; also the reference's",
            ),
            _field("prompt_tokens", pa.int32(), "tokens of the prompt"),
            _field("chosen_tokens", pa.int32(), "tokens of chosen"),
            _field("rejected_tokens", pa.int32(), "tokens of rejected"),
            _field("positions", pa.int32(), "positions computed for the pair in layers other than attention"),
            _field("attention_padding", pa.int32(), "padding positions computed beside the pair in attention"),
            _field(
                "audit_exact",
                pa.float64(),
                "audited pairs: exact cosine of u with the mean u of the others in its micro-batch",
                nullable=True,
            ),
            _field(
                "audit_sketched", pa.float64(), "audited pairs: the same from the stored sketches", nullable=True
            ),
        ]
    )


def sketch_bytes(sketches: NDArray[Any]) -> list[bytes]:
    """The sketch column's values of (rows, width) numbers in the dtype to be stored."""
    little_endian = sketches.astype(sketches.dtype.newbyteorder("<"), copy=False)
    return [row.tobytes() for row in little_endian]


def sketch_numbers(table: pa.Table | pa.RecordBatch, dtype: str) -> NDArray[np.float32]:
    """The sketches in a table with the columns sketch and sketch_scale, (rows, width) float32."""
    return stored_numbers(table, dtype) * table["sketch_scale"].to_numpy()[:, None].astype(np.float32)


def stored_numbers(table: pa.Table | pa.RecordBatch, dtype: str) -> NDArray[Any]:
    """The numbers of the sketch column as they are stored, without their scales: (rows, width), not copied."""
    column = table["sketch"]
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    stored = np.dtype(dtype).newbyteorder("<")
    rows, numbers = len(column), column.type.byte_width // stored.itemsize
    values = np.frombuffer(column.buffers()[1], stored, rows * numbers, column.offset * column.type.byte_width)
    return values.reshape(rows, numbers)


SCORES = pa.schema(
    [
        PAIR_ID,
        LANGUAGE,
        _field("score", pa.float64(), "what the keep rule went by"),
        _field("cosine", pa.float64(), "cosine of the pair's sketch with the multilingual direction"),
        _field("dot", pa.float64(), "dot product of the pair's sketch with the multilingual direction"),
        _field("worst_cosine", pa.float64(), "least cosine of the pair's sketch with the languages' gradients"),
        _field("own_cosine", pa.float64(), "cosine of the pair's sketch with its own language's gradient"),
        _field("kept", pa.bool_(), "whether the keep rule kept the pair"),
    ]
)

SELECTED = pa.schema(
    [
        PAIR_ID,
        LANGUAGE,
        PROMPT,
        _field("chosen", MESSAGES, "TRL column"),
        _field("rejected", MESSAGES, "TRL column"),
        _field("ref_chosen_logps", pa.float64(), "TRL column: the reference's log-probability of chosen, nats"),
        _field(
            "ref_rejected_logps",
            pa.float64(),
            "TRL column: the reference's log-probability of rejected, nats",
        ),
        _field("congrad_score", pa.float64(), "what the keep rule went by; by default the cosine"),
    ]
)

ANSWERS = pa.schema(
    [
        _field("answer_id", pa.string(), "hash of prompt_id, model, decoding and sample number"),
        PROMPT_ID,
        LANGUAGE,
        _field("seen", pa.bool_(), "whether prompts of this language are trained on"),
        PROMPT,
        _field("model", pa.string(), "'M_0', 'M_1', ...: the policy after that many iterations"),
        _field("decoding", pa.string(), "'greedy' or 'sampled'"),
        _field("response", pa.string(), "the generated text"),
        _field("response_tokens", pa.int32(), "generated tokens"),
        _field("truncated", pa.bool_(), "generation stopped at the token limit"),
        _field("true_score", pa.float32(), "built-in world: quality in 0..1 computed by program", nullable=True),
    ]
)

COMPARISONS = pa.schema(
    [
        _field("comparison_id", pa.string(), "hash of both answer ids and the order"),
        PROMPT_ID,
        LANGUAGE,
        _field("seen", pa.bool_(), "whether prompts of this language are trained on"),
        _field("model", pa.string(), "the model compared"),
        _field("baseline", pa.string(), "the model compared with"),
        _field("order", pa.string(), "'model_first' or 'baseline_first'"),
        _field("win", pa.float32(), "1 model wins, 0.5 tie, 0 baseline wins; null unreadable", nullable=True),
        _field("output", pa.string(), "what the judge wrote", nullable=True),
        _field("unreadable", pa.string(), "why there is no verdict", nullable=True),
    ]
)

QUARANTINE = pa.schema(
    [
        _field("row_id", pa.string(), "id of the row, or the place it was read from"),
        _field("language", pa.string(), "the row's language where known", nullable=True),
        _field("reason", pa.string(), "a short fixed word for counting"),
        _field("detail", pa.string(), "what was found, its first 500 characters"),
    ]
)


def row_id(*parts: object) -> str:
    """128-bit hash of the parts as 32 hex digits; unit separators keep ('a', 'bc') apart from ('ab', 'c')."""
    text = "\x1f".join(str(part) for part in parts)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def prompt_id(language: str, messages: Iterable[Message]) -> str:
    """The id of a prompt: a hash of its language and of its messages' roles and texts."""
    return row_id("prompt", language, *(part for m in messages for part in (m["role"], m["content"])))


def response_id(prompt_id: str, iteration: int, sample: int) -> str:
    """The id of a response: its prompt, the iteration whose policy wrote it, and the sample number."""
    return row_id("response", prompt_id, iteration, sample)


def pair_id(prompt_id: str, iteration: int) -> str:
    """The id of a preference pair: there is at most one for a prompt in an iteration."""
    return row_id("pair", prompt_id, iteration)


def quarantined(row_id: str, language: str | None, reason: str, detail: str) -> dict[str, Any]:
    """One row of the quarantine table, safe to print; `detail` is cut to 500 characters."""
    return {
        "row_id": printable(row_id),
        "language": None if language is None else brief(language),
        "reason": reason,
        "detail": printable(detail[:500], lines=True),
    }


def table_of(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as an Arrow table of exactly `schema`: columns in its order, types cast, extra keys dropped.

    Raises ValueError naming the column when a row lacks it or holds a value of another type.
    """
    for name in schema.names:
        missing = next((row for row in rows if name not in row), None)
        if missing is not None:
            raise ValueError(f"column '{name}' is missing from a row with columns {sorted(missing)}")
    columns = []
    for field in schema:
        try:
            columns.append(pa.array([row[field.name] for row in rows], type=field.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
            raise ValueError(f"column '{field.name}' should be {field.type}: {error}") from error
    return pa.Table.from_arrays(columns, schema=schema)
