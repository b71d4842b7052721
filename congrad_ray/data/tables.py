"""What the tables of all stages share: columns, ids, quarantine. Each stage's own schema lies in its folder.

Every column carries its meaning in the field metadata under `doc`. Rows are joined by id, never by position: ids
are hashes of what a row is about, so the same input gives the same ids on every machine and in every run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from congrad_ray.config.printable import brief, printable

Message = dict[str, str]

MESSAGES = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))


def field(name: str, type_: pa.DataType, doc: str, nullable: bool = False) -> pa.Field:
    """A column with its meaning, which readers find in the metadata under `doc`."""
    return pa.field(name, type_, nullable=nullable, metadata={"doc": doc})


PROMPT_ID = field("prompt_id", pa.string(), "hash of language and prompt text")
LANGUAGE = field("language", pa.string(), "BCP-47 tag of the prompt's language")
PROMPT = field("prompt", MESSAGES, "chat messages, the last one the user's (TRL's conversational prompt)")
RESPONSE_ID = field("response_id", pa.string(), "hash of prompt_id, iteration and sample number")
PAIR_ID = field("pair_id", pa.string(), "hash of prompt_id and iteration")

QUARANTINE = pa.schema(
    [
        field("row_id", pa.string(), "id of the row, or the place it was read from"),
        field("language", pa.string(), "the row's language where known", nullable=True),
        field("reason", pa.string(), "a short fixed word for counting"),
        field("detail", pa.string(), "what was found, its first 500 characters"),
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


FAILURE = "failure"  # column: null in a good row, else {"reason": ..., "detail": ...}
FAILURE_FIELD = pa.field(FAILURE, pa.struct([("reason", pa.string()), ("detail", pa.string())]))


def failure(reason: str, detail: object) -> dict[str, str]:
    """The value of the FAILURE column of a row that goes to quarantine."""
    return {"reason": reason, "detail": str(detail)}


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
