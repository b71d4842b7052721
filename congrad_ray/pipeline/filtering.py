"""`congrad filter`: an existing preference dataset in, the pairs that agree across languages out."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
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
    check_source,
    clean_language,
    clean_messages,
    clean_text,
    file_digest,
    is_parquet,
    parquet_rows,
    read_records,
)
from congrad_ray.data.tables import MESSAGES, PAIR_ID, quarantined, row_id, table_of
from congrad_ray.modeling.source import check_models, named_model
from congrad_ray.modeling.tokenization import chat_prompt_ids
from congrad_ray.pipeline.runner import by_name, run_stage
from congrad_ray.rundir.directory import (
    RunDirectory,
    RunDirectoryError,
    StageFolder,
    fingerprint,
    without_keys,
)
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.lock import only_writer
from congrad_ray.runtime.resources import driver_demand
from congrad_ray.stages.base import Stage
from congrad_ray.stages.pair.schema import PAIRS
from congrad_ray.stages.pair.stage import STAGE as PAIR
from congrad_ray.stages.select import stage as select
from congrad_ray.stages.sketch import stage as sketch

logger = logging.getLogger(__name__)

_TEXTS = ("prompt", "chosen", "rejected")
COLUMNS = (*_TEXTS, "language")
_DEEPEST_TYPE = 32


@dataclass(frozen=True)
class FilterSettings:
    """The model, how its gradients are sketched, how pairs are selected, and the training to come."""

    model: Model
    select: Select = field(default_factory=Select)
    sketch: Sketch = field(default_factory=Sketch)
    train: Train = field(default_factory=Train)
    """Of these, beta and length_penalty matter to the selection."""
    chat: bool = False
    """Whether strings are taken as chat messages."""


@dataclass(frozen=True)
class Filtered:
    """What became of the rows: rows = len(kept) + dropped + quarantined + duplicates."""

    summary: dict[str, Any]
    """The selection's summary.json."""
    kept: list[int]
    """Places of the kept rows in the input, from 0, ascending."""
    scores: list[float]
    """congrad_score of the kept rows."""
    rows: int
    dropped: int
    quarantined: int
    duplicates: int

    def __str__(self) -> str:
        return (
            f"{self.rows} rows = {len(self.kept)} kept + {self.dropped} dropped + {self.quarantined} quarantined "
            f"+ {self.duplicates} duplicates"
        )


def run_filter(
    preferences: str,
    out: str | Path,
    settings: FilterSettings,
    profile: Profile,
    redo: bool = False,
    called: str | None = None,
) -> Filtered:
    """Sketches and selects the pairs of `preferences`.

    `preferences` is a JSONL or Parquet file or a hub dataset's name, with prompt, chosen and rejected (strings or
    chat messages, as in TRL) and language. As in TRL the shape decides: strings are continued as plain text,
    messages go through the chat template. `called` is what it is called where its path says nothing to a person;
    the path is then not part of what `out` is remembered by.

    Written to the folder `out`: selected.parquet (the input's columns and congrad_score), scores.parquet,
    summary.json, and work/, from which an interrupted filter is resumed and another selection is made in seconds.
    A column of a JSONL file whose values have no common type is written as text, with JSON for other values.

    Preferences and model are checked before anything is written.
    Raises InputError, SettingsError, RunDirectoryError, ModelError, MissingChatTemplate.
    """
    target = RunDirectory.open(out, "--out")
    work = RunDirectory(target.filesystem, f"{target.path}/work")
    source = validate(Source, {"name": preferences}, "PREFERENCES")
    recipe = validate(
        Recipe,
        {
            "name": "filter",
            "model": settings.model,
            "prompts": Prompts(train=source, languages=["und"]),
            "generate": Generate(max_tokens=1),  # nothing is generated
            "judge": Judge(max_tokens=1),
            "evaluate": Evaluate(max_tokens=1),
            "sketch": settings.sketch,
            "select": settings.select,
            "train": settings.train,
        },
        "the filter's settings",
    )
    check_source(source, COLUMNS)

    @cache  # read before the folder is claimed, and written when it is
    def read() -> _Preferences:
        return _read(source, settings.chat)

    def write(context: Context) -> Outcome:
        return _write(read(), context.output)

    reading = Stage(
        name="preferences",
        folder=PAIR.folder,
        summary=f"reading {called or preferences}",
        inputs=lambda iteration: [],
        settings=lambda recipe, iteration: {
            "source": called or preferences,
            "digest": file_digest(preferences),
            "chat": settings.chat,
        },
        run=write,
        demand=lambda recipe, profile: driver_demand("preferences", 0),
        uses_ray=False,
    )
    stages = (reading, sketch.STAGE, select.STAGE)
    if not redo:
        _refuse_others(without_keys(out), work, recipe, stages)
    done = work.stage(reading.folder, 0).manifest()
    stored = done is not None and done.fingerprint == _fingerprints(recipe, stages)[0]
    are_messages = _are_messages(work) if stored else None
    _check_model(recipe, read().are_messages if are_messages is None else are_messages)
    with only_writer(work):
        for stage in stages:
            run_stage(stage, recipe, profile, work, redo=redo)
            read.cache_clear()
        folder = work.stage(select.STAGE.folder, 0)
        for name in ("scores.parquet", "summary.json"):
            target.write_bytes(name, folder.read_bytes(name))
        table = folder.read_table(["pair_id", "congrad_score"], name="selected.parquet")
        of_pair = dict(zip(*(column.to_pylist() for column in table.columns), strict=True))
        selected, kept = _selected(source, settings.chat, of_pair)
        target.write_table("selected.parquet", selected)
    scores = selected["congrad_score"].to_pylist()
    filtered = _filtered(work, kept, scores)
    logger.info(str(filtered))
    return filtered


def _fingerprints(recipe: Recipe, stages: Sequence[Stage]) -> list[str]:
    """What each of a filter's stages is remembered by; each has those before it as its inputs."""
    found: dict[str, str] = {}
    for stage in stages:
        inputs = {
            f"iteration-{number}/{folder}": found[f"iteration-{number}/{folder}"]
            for folder, number in stage.inputs(0)
        }
        found[f"iteration-0/{stage.folder}"] = fingerprint(stage.name, stage.settings(recipe, 0), inputs)
    return list(found.values())


def _refuse_others(out: str, work: RunDirectory, recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Raises RunDirectoryError where `out` holds what other preferences or settings made."""
    found = [
        work.stage(stage.folder, 0).changes(identity, stage.settings(recipe, 0), named=_in_words)
        for stage, identity in zip(stages, _fingerprints(recipe, stages), strict=True)
    ]
    if all(changes is None for changes in found):
        return
    lines = dict.fromkeys(line for changes in found for line in changes or [])
    raise RunDirectoryError(
        "\n".join(
            [
                f"--out {out} holds a filter of other preferences or with other settings{':' if lines else '.'}",
                *lines,
                "Give another --out, or add --redo to replace what differs.",
            ]
        )
    )


def _in_words(settings: Any) -> dict[str, Any]:
    """A stage's settings by names that say something to a person."""
    if isinstance(settings, dict) and "digest" in settings:
        return {
            "preferences": settings["source"],
            "content of the preferences": settings["digest"],
            "chat": settings["chat"],
        }
    return by_name(settings)


def _are_messages(work: RunDirectory) -> bool | None:
    """Whether the pairs that were read before are chat messages; None where their file is gone or damaged."""
    pairs = work.stage(PAIR.folder, 0)
    try:
        with pairs.open_parquet(f"{pairs.path}/pairs.parquet") as file:
            return bool(file.schema_arrow.field("prompt").type == MESSAGES)
    except (FileNotFoundError, RunDirectoryError):
        return None


def _check_model(recipe: Recipe, chats: bool) -> None:
    """Raises ModelError or MissingChatTemplate for a model that the sketch stage could not use.

    Beyond what is checked before every stage, the model's weights, and the tokenizer of one that is on the hub.
    """
    check_models(recipe, present=True)
    source = named_model(recipe.model.name, recipe.model, recipe.seed)
    source.check_files()
    tokenizer = source.load_tokenizer()
    if chats:
        chat_prompt_ids(tokenizer, [{"role": "user", "content": "?"}])


def _filtered(work: RunDirectory, kept: list[int], scores: list[float]) -> Filtered:
    """The numbers of all rows, from what the stages counted."""
    reading, sketching, selecting = (
        work.stage(stage.folder, 0).manifest() for stage in (PAIR, sketch.STAGE, select.STAGE)
    )
    assert reading and sketching and selecting  # all are done
    quarantined = sum(sum(manifest.counters.get("quarantined", {}).values()) for manifest in (reading, sketching))
    duplicates = reading.counters.get("duplicates", 0)
    return Filtered(
        summary=work.stage(select.STAGE.folder, 0).read_json("summary.json"),
        kept=kept,
        scores=scores,
        rows=reading.rows + sum(reading.counters.get("quarantined", {}).values()) + duplicates,
        dropped=sketching.rows - len(kept),
        quarantined=quarantined,
        duplicates=duplicates,
    )


def _pair(record: Record, chat: bool) -> dict[str, Any]:
    """The pair in a record, with its id. Raises BadRow."""
    if record.problem:
        raise BadRow(*record.problem)
    for column in COLUMNS:
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


@dataclass(frozen=True)
class _Preferences:
    """The pairs of a source, each once, and what could not be used."""

    pairs: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    duplicates: int
    are_messages: bool


def _read(source: Source, chat: bool) -> _Preferences:
    """Raises InputError where the source cannot be read, or has no usable pair."""
    rows: dict[str, dict[str, Any]] = {}
    places: dict[str, str] = {}
    bad: list[dict[str, Any]] = []
    duplicates = 0
    if is_parquet(local_path(source.name)):
        # All columns once: report one that is damaged before the work, not after it.
        parquet_rows(local_path(source.name), [])
    for record in read_records(source, COLUMNS):
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
    if not rows:
        raise InputError(
            f"{brief(source.name)} has no usable pair; rows that cannot be used, by reason:\n{_why(bad)}"
        )
    return _Preferences(list(rows.values()), bad, duplicates, shape is not str)


def _why(bad: Sequence[dict[str, Any]]) -> str:
    """How many rows there are for each reason, and the first of them."""
    counts = Counter(row["reason"] for row in bad)
    first = {row["reason"]: row for row in reversed(bad)}
    return "\n".join(
        f"  {reason}: {counts[reason]}, such as {first[reason]['row_id']}: {brief(first[reason]['detail'])}"
        for reason in sorted(counts)
    )


def _write(preferences: _Preferences, output: StageFolder) -> Outcome:
    output.write_quarantine(preferences.quarantine, "quarantine.parquet")
    text_type = MESSAGES if preferences.are_messages else pa.string()
    schema = pa.schema(
        [PAIR_ID, PAIRS.field("language")] + [PAIRS.field(name).with_type(text_type) for name in _TEXTS]
    )
    output.write_table("pairs.parquet", table_of(preferences.pairs, schema))
    languages = dict(sorted(Counter(row["language"] for row in preferences.pairs).items()))
    counts = output.quarantine_counts()
    counters = {"duplicates": preferences.duplicates, "languages": languages, "quarantined": counts}
    return Outcome(len(preferences.pairs), counters)


def _selected(source: Source, chat: bool, kept: dict[str, float]) -> tuple[pa.Table, list[int]]:
    """The input's own rows that were kept, in their order, with the column congrad_score; and their places."""
    numbers, scores, rows, pairs = [], [], [], []
    left = dict(kept)
    for number, record in enumerate(read_records(source, COLUMNS)):
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
    return table.append_column("congrad_score", pa.array(scores, pa.float64())), numbers


def _table(rows: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> pa.Table:
    """The rows with all their columns; the three texts in one shape, if necessary as read for the pairs."""
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
