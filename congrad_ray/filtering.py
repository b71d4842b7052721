"""`congrad filter`: an existing preference dataset in, the pairs that agree across languages out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa

from congrad_ray.execution import run_stage
from congrad_ray.profile import Profile
from congrad_ray.recipe import Evaluate, Generate, Model, Prompts, Recipe, Select, Sketch, Source, Train
from congrad_ray.records import (
    BadRow,
    InputError,
    Record,
    clean_language,
    clean_messages,
    clean_text,
    file_digest,
    read_records,
)
from congrad_ray.rundir import RunDirectory
from congrad_ray.stages import select, sketch
from congrad_ray.stages.base import Context, Log, Outcome, Stage
from congrad_ray.tables import MESSAGES, PAIR_ID, PAIRS, quarantined, row_id, table_of

_COLUMNS = ("prompt", "chosen", "rejected", "language")


def filter_preferences(
    preferences: str,
    model: Model,
    out: str,
    profile: Profile,
    selection: Select,
    train: Train,
    sketch_settings: Sketch,
    chat: bool = False,
    redo: bool = False,
    log: Log = print,
) -> dict[str, Any]:
    """Sketches and selects the pairs of `preferences`; returns the selection's summary.

    `preferences` is a JSONL or Parquet file or a hub dataset's name, with prompt, chosen and rejected (strings or
    chat messages, as in TRL) and language. As in TRL the shape decides: strings are continued as plain text,
    messages go through the chat template; with `chat` strings are taken as chat messages.

    Written to the folder `out`: selected.parquet (the input's columns and congrad_score), scores.parquet,
    summary.json, and work/, from which an interrupted run goes on and another selection is made in seconds.
    Raises InputError, RunDirectoryError, ModelError, MissingChatTemplate.
    """
    target = RunDirectory.open(out)
    work = RunDirectory.open(f"{out.rstrip('/')}/work")
    source = Source(name=preferences)
    recipe = Recipe(
        name="filter",
        model=model,
        prompts=Prompts(train=source, languages=["und"]),
        generate=Generate(max_tokens=1),  # nothing is generated
        evaluate=Evaluate(max_tokens=1),
        sketch=sketch_settings,
        select=selection,
        train=train,
    )

    def read(context: Context) -> Outcome:
        return _read(context, source, chat)

    reading = Stage(
        name="preferences",
        folder="pairs",
        summary=f"reading {preferences}",
        inputs=lambda iteration: [],
        settings=lambda recipe, iteration: {
            "source": preferences,
            "digest": file_digest(preferences),
            "chat": chat,
        },
        run=read,
        uses_ray=False,
    )
    for stage in (reading, sketch.STAGE, select.STAGE):
        run_stage(stage, recipe, profile, work, redo=redo, log=log)
    folder = work.stage("selection", 0)
    for name in ("scores.parquet", "summary.json"):
        target.write_bytes(name, folder.read_bytes(name))
    scores = folder.read_table(["pair_id", "congrad_score"], name="selected.parquet")
    kept = dict(zip(*(column.to_pylist() for column in scores.columns), strict=True))
    target.write_table("selected.parquet", _selected(source, chat, kept))
    summary: dict[str, Any] = folder.read_json("summary.json")
    return summary


def _pair(record: Record, chat: bool) -> dict[str, Any]:
    """The pair in a record, with its id. Raises BadRow."""
    if record.problem:
        raise BadRow(*record.problem)
    for column in _COLUMNS:
        if column not in record.values:
            raise BadRow("missing_column", f"no '{column}' in this row")
    values = record.values
    language = clean_language(values["language"], {})
    if chat or isinstance(values["prompt"], list):
        texts: dict[str, Any] = {
            "prompt": clean_messages(values["prompt"], "prompt", "user"),
            "chosen": clean_messages(values["chosen"], "chosen", "assistant"),
            "rejected": clean_messages(values["rejected"], "rejected", "assistant"),
        }
    else:
        texts = {column: clean_text(values[column], column) for column in ("prompt", "chosen", "rejected")}
    if texts["chosen"] == texts["rejected"]:
        raise BadRow("identical_responses", "chosen and rejected are the same")
    return {"pair_id": row_id("preference", language, *texts.values()), "language": language, **texts}


def _read(context: Context, source: Source, chat: bool) -> Outcome:
    rows: dict[str, dict[str, Any]] = {}
    bad: list[dict[str, Any]] = []
    duplicates = 0
    shape: type | None = None
    for record in read_records(source, _COLUMNS):
        try:
            pair = _pair(record, chat)
            shape = shape or type(pair["prompt"])
            if not isinstance(pair["prompt"], shape):
                raise BadRow("mixed_shapes", f"prompt is no {shape.__name__} as in the rows before; see --chat")
        except BadRow as error:
            language = record.values.get("language")
            known = language if isinstance(language, str) else None
            bad.append(quarantined(record.place, known, error.reason, str(error)))
            continue
        duplicates += pair["pair_id"] in rows
        rows.setdefault(pair["pair_id"], pair)
    context.output.write_quarantine(bad, "quarantine.parquet")
    counts = context.output.quarantine_counts()
    if not rows:
        raise InputError(f"{source.name} has no usable pair: {counts}")
    text_type = pa.string() if shape is str else MESSAGES
    schema = pa.schema(
        [PAIR_ID, PAIRS.field("language")]
        + [PAIRS.field(name).with_type(text_type) for name in ("prompt", "chosen", "rejected")]
    )
    context.output.write_table("pairs.parquet", table_of(list(rows.values()), schema))
    languages = dict(sorted(Counter(row["language"] for row in rows.values()).items()))
    return Outcome(len(rows), {"duplicates": duplicates, "languages": languages, "quarantined": counts})


def _selected(source: Source, chat: bool, kept: dict[str, float]) -> pa.Table:
    """The input's own rows that were kept, in their order, with the column congrad_score."""
    rows = []
    left = dict(kept)
    for record in read_records(source, _COLUMNS):
        try:
            score = left.pop(_pair(record, chat)["pair_id"], None)
        except BadRow:
            continue
        if score is not None:
            rows.append({**record.values, "congrad_score": score})
    return pa.Table.from_pylist(rows)
