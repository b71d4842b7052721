"""The tables of benchmarks: what came of every document, of every task, and of every held-out pair."""

from __future__ import annotations

import pyarrow as pa

from congrad_ray.data.tables import LANGUAGE, field

_MODEL = field("model", pa.string(), "'M_0', 'M_1', ...: the policy after that many iterations")
_TASK = field("task", pa.string(), "as the recipe names it")
_SUBTASK = field("subtask", pa.string(), "the task of lm-evaluation-harness: one of a group's, or the task itself")
_TASK_LANGUAGE = field("language", pa.string(), "BCP-47 tag of the task's language, where known", nullable=True)
_METRIC = field(
    "metric", pa.string(), "the harness' name: acc, acc_norm, or with its filter exact_match,strict-match"
)

SAMPLES = pa.schema(
    [
        field("sample_id", pa.string(), "hash of model, subtask, document and metric"),
        _MODEL,
        _TASK,
        _SUBTASK,
        _TASK_LANGUAGE,
        field("document", pa.int64(), "its number in the task"),
        field("document_hash", pa.string(), "the harness' hash of the document"),
        _METRIC,
        field("value", pa.float64(), "null where the metric has no number for one document", nullable=True),
        field("target", pa.string(), "the right answer: its text, or number from 0", nullable=True),
        field(
            "output", pa.string(), "what the model gave, as JSON: text, or (log-probability, is greedy) of choices"
        ),
    ]
)

RESULTS = pa.schema(
    [
        field("result_id", pa.string(), "hash of model, subtask and metric"),
        _MODEL,
        _TASK,
        _SUBTASK,
        _TASK_LANGUAGE,
        _METRIC,
        field("value", pa.float64(), "over all documents, by the harness", nullable=True),
        field("stderr", pa.float64(), "its standard error, by the harness", nullable=True),
        field("count", pa.int64(), "documents"),
        field("samples", pa.int64(), "rows of the subtask in the table of samples"),
        field("is_mean", pa.bool_(), "whether value is the mean over documents"),
        field("higher_is_better", pa.bool_(), "as the task says", nullable=True),
        field("cut", pa.int64(), "requests longer than model.max_length, whose beginning was cut off"),
        field("few_shot", pa.int64(), "examples before each question"),
    ]
)

SCORED = pa.schema(
    [
        field("score_id", pa.string(), "hash of model and pair_id"),
        _MODEL,
        field("pair_id", pa.string(), "hash of the pair's texts and language"),
        LANGUAGE,
        field("chosen_logps", pa.float32(), "log p(chosen), nats, summed over its tokens"),
        field("rejected_logps", pa.float32(), "log p(rejected)"),
        field("prompt_tokens", pa.int32(), "tokens of the prompt"),
        field("chosen_tokens", pa.int32(), "tokens of chosen"),
        field("rejected_tokens", pa.int32(), "tokens of rejected"),
    ]
)
