"""`congrad filter`: an existing preference dataset in, the pairs that agree across languages out."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pyarrow as pa

from congrad_ray.config.printable import brief
from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import (
    Evaluate,
    Generate,
    Judge,
    Model,
    Prompts,
    Recipe,
    Select,
    Sketch,
    Source,
    Train,
)
from congrad_ray.config.settings import local_path, validate
from congrad_ray.data.records import (
    BadRow,
    InputError,
    Record,
    clean_language,
    clean_messages,
    clean_text,
    file_digest,
    is_parquet,
    parquet_rows,
    read_records,
)
from congrad_ray.data.tables import MESSAGES, PAIR_ID, quarantined, row_id, table_of
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.lock import only_writer
from congrad_ray.runtime.resources import driver_demand
from congrad_ray.stages.base import Stage
from congrad_ray.stages.pair.schema import PAIRS
from congrad_ray.stages.select import stage as select
from congrad_ray.stages.sketch import stage as sketch

_TEXTS = ("prompt", "chosen", "rejected")
_COLUMNS = (*_TEXTS, "language")
_DEEPEST_TYPE = 32


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
) -> dict[str, Any]:
    """Sketches and selects the pairs of `preferences`; returns the selection's summary.

    `preferences` is a JSONL or Parquet file or a hub dataset's name, with prompt, chosen and rejected (strings or
    chat messages, as in TRL) and language. As in TRL the shape decides: strings are continued as plain text,
    messages go through the chat template; with `chat` strings are taken as chat messages.

    Written to the folder `out`: selected.parquet (the input's columns and congrad_score), scores.parquet,
    summary.json, and work/, from which an interrupted run goes on and another selection is made in seconds. A
    column of a JSONL file whose values have no common type is written as text, with JSON for what is none.
    Raises InputError, SettingsError, RunDirectoryError, ModelError, MissingChatTemplate.
    """
    target = RunDirectory.open(out)
    work = RunDirectory(target.filesystem, f"{target.path}/work")
    source = validate(Source, {"name": preferences}, "PREFERENCES")
    recipe = validate(
        Recipe,
        {
            "name": "filter",
            "model": model,
            "prompts": Prompts(train=source, languages=["und"]),
            "generate": Generate(max_tokens=1),  # nothing is generated
            "judge": Judge(max_tokens=1),
            "evaluate": Evaluate(max_tokens=1),
            "sketch": sketch_settings,
            "select": selection,
            "train": train,
        },
        "what was asked for",
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
        demand=lambda recipe, profile: driver_demand("preferences", 0),
        uses_ray=False,
    )
    with only_writer(work):
        for stage in (reading, sketch.STAGE, select.STAGE):
            run_stage(stage, recipe, profile, work, redo=redo)
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
        texts = {column: clean_text(values[column], column) for column in _TEXTS}
    if texts["chosen"] == texts["rejected"]:
        raise BadRow("identical_responses", "chosen and rejected are the same")
    return {"pair_id": row_id("preference", language, *texts.values()), "language": language, **texts}


def _read(context: Context, source: Source, chat: bool) -> Outcome:
    rows: dict[str, dict[str, Any]] = {}
    places: dict[str, str] = {}
    bad: list[dict[str, Any]] = []
    duplicates = 0
    if is_parquet(local_path(source.name)):
        # All columns once: one that is damaged should be told before the work, not after it.
        parquet_rows(local_path(source.name), [])
    for record in read_records(source, _COLUMNS):
        try:
            pair = _pair(record, chat)
        except BadRow as error:
            language = record.values.get("language")
            known = language if isinstance(language, str) else None
            bad.append(quarantined(record.place, known, error.reason, str(error)))
            continue
        duplicates += pair["pair_id"] in rows
        places.setdefault(pair["pair_id"], record.place)
        rows.setdefault(pair["pair_id"], pair)
    # A table holds one shape; that of most rows, so that a stray row at the top does not cost all others.
    shapes = Counter(type(pair["prompt"]) for pair in rows.values())
    shape = shapes.most_common(1)[0][0] if shapes else str
    for pair in [pair for pair in rows.values() if not isinstance(pair["prompt"], shape)]:
        detail = f"prompt is no {shape.__name__} as in most rows; see --chat"
        bad.append(quarantined(places[pair["pair_id"]], pair["language"], "mixed_shapes", detail))
        del rows[pair["pair_id"]]
    context.output.write_quarantine(bad, "quarantine.parquet")
    counts = context.output.quarantine_counts()
    if not rows:
        raise InputError(
            f"{brief(source.name)} has no usable pair; rows put aside by reason: {counts}. They are in "
            f"{context.output.path}/quarantine, each with its place and what was found"
        )
    text_type = pa.string() if shape is str else MESSAGES
    schema = pa.schema(
        [PAIR_ID, PAIRS.field("language")] + [PAIRS.field(name).with_type(text_type) for name in _TEXTS]
    )
    context.output.write_table("pairs.parquet", table_of(list(rows.values()), schema))
    languages = dict(sorted(Counter(row["language"] for row in rows.values()).items()))
    return Outcome(len(rows), {"duplicates": duplicates, "languages": languages, "quarantined": counts})


def _selected(source: Source, chat: bool, kept: dict[str, float]) -> pa.Table:
    """The input's own rows that were kept, in their order, with the column congrad_score."""
    numbers, scores, rows, pairs = [], [], [], []
    left = dict(kept)
    for number, record in enumerate(read_records(source, _COLUMNS)):
        try:
            pair = _pair(record, chat)
        except BadRow:
            continue
        score = left.pop(pair["pair_id"], None)
        if score is not None:
            numbers.append(number)
            scores.append(score)
            rows.append(record.values)
            pairs.append(pair)
    path = local_path(source.name)
    table = parquet_rows(path, numbers) if is_parquet(path) else _table(rows, pairs)
    if "congrad_score" in table.column_names:  # of a filter before
        table = table.drop_columns("congrad_score")
    return table.append_column("congrad_score", pa.array(scores, pa.float64()))


def _table(rows: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> pa.Table:
    """The rows with all their columns; the three texts in one shape, if need be as read for the pairs."""
    names = list({key: None for row in rows for key in row})  # in the order in which they come
    arrays = {name: _array([row.get(name) for row in rows]) for name in names}
    texts = [arrays[name] for name in _TEXTS]
    if None in texts or len({pa.types.is_string(array.type) for array in texts if array is not None}) > 1:
        arrays.update({name: pa.array([pair[name] for pair in pairs]) for name in _TEXTS})
    for name, array in arrays.items():
        if array is None:
            arrays[name] = pa.array([None if row.get(name) is None else _text(row[name]) for row in rows])
    return pa.table({_text(name): array for name, array in arrays.items()})


def _array(values: list[Any]) -> pa.Array | None:
    """The values in the type that Arrow finds for them; None where there is none, or none that can be written."""
    try:
        array = pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, RecursionError):
        return None
    text = str(array.type)
    # Parquet has no struct without fields, and its readers give up on types of great depth.
    return None if "struct<>" in text or text.count("<") > _DEEPEST_TYPE else array


def _text(value: Any) -> str:
    """A text as it is, anything else as JSON; without lone surrogates, which cannot be written."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "backslashreplace").decode()
