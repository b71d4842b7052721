"""`congrad filter`: an existing preference dataset in, the pairs that agree across languages out."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from congrad_ray.config.evaluation import Evaluate
from congrad_ray.config.judging import Judge
from congrad_ray.config.printable import without_keys
from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Generate, Limits, Model, Prompts, Recipe, Select, Sketch
from congrad_ray.config.settings import validate
from congrad_ray.config.training import Train
from congrad_ray.data.own_rows import write_own_rows
from congrad_ray.data.preferences import PREFERENCES
from congrad_ray.modeling.source import check_models, named_model
from congrad_ray.modeling.tokenization import chat_prompt_ids
from congrad_ray.pipeline.outcomes import every_row, kept_rows
from congrad_ray.pipeline.preferences import Preferences, Reading, read_preferences
from congrad_ray.pipeline.runner import by_name, run_stage
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError, fingerprint
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.lock import only_writer
from congrad_ray.runtime.resources import driver_demand
from congrad_ray.stages.base import Stage
from congrad_ray.stages.pair.stage import STAGE as PAIR
from congrad_ray.stages.select import stage as select
from congrad_ray.stages.sketch import stage as sketch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FilterSettings:
    """The model, how its gradients are sketched, how pairs are selected, and the training to come."""

    model: Model
    select: Select = field(default_factory=Select)
    sketch: Sketch = field(default_factory=Sketch)
    train: Train = field(default_factory=Train)
    """Of these, the settings of the loss matter to the selection."""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Filtered:
    """What became of the rows: rows = kept + dropped + quarantined, which is asserted."""

    summary: dict[str, Any]
    """The selection's summary.json with the numbers of rows."""
    kept: list[int]
    """Places of the kept rows in the input, from 0, ascending; of several sources, one after the other."""
    scores: list[float]
    """congrad_score of the kept rows."""
    rows: int
    dropped: int
    duplicates: int
    """Of the dropped, those that are there more than once."""
    reasons: dict[str, int]
    """Rows in quarantine by reason."""

    def __post_init__(self) -> None:
        if self.rows != len(self.kept) + self.dropped + self.quarantined:
            raise AssertionError(f"rows are lost: {self}")

    @property
    def quarantined(self) -> int:
        """Rows in quarantine."""
        return sum(self.reasons.values())

    def __str__(self) -> str:
        twice = f" (of which {self.duplicates:,} are there twice)" if self.duplicates else ""
        return (
            f"{self.rows:,} rows = {len(self.kept):,} kept + {self.dropped:,} dropped{twice} + "
            f"{self.quarantined:,} quarantined"
        )


def run_filter(
    reading: Reading,
    out: str | Path,
    settings: FilterSettings,
    profile: Profile,
    redo: bool = False,
    called: str | None = None,
    all_rows: bool = False,
) -> Filtered:
    """Sketches and selects the pairs of `reading`.

    `called` is what the preferences are called where their path says nothing to a person; the path is then not
    part of what `out` is remembered by.

    Written to the folder `out`: selected.parquet (the input's columns and congrad_score), scores.parquet,
    summary.json, with `all_rows` rows.parquet (every row with what became of it), and work/, from which an
    interrupted filter is resumed and another selection is made in seconds.

    Preferences and model are checked before anything is written.
    Raises InputError, SettingsError, RunDirectoryError, ModelError, MissingChatTemplate.
    """
    target = RunDirectory.open(out, "--out")
    work = RunDirectory(target.filesystem, f"{target.path}/work")
    recipe = validate(
        Recipe,
        {
            "name": "filter",
            "model": settings.model,
            "prompts": Prompts(train=reading.sources[0], languages=["und"]),
            "generate": Generate(max_tokens=1),  # nothing is generated
            "judge": Judge(max_tokens=1),
            "evaluate": Evaluate(max_tokens=1),
            "sketch": settings.sketch,
            "select": settings.select,
            "train": settings.train,
            "limits": settings.limits,
        },
        "the filter's settings",
    )
    sketch.check_judged(recipe, PREFERENCES.names)
    reading.check()
    with tempfile.TemporaryDirectory(prefix="congrad-preferences-") as temporary:

        @cache  # read before the folder is claimed, and written when it is
        def read() -> Preferences:
            return read_preferences(reading, Path(temporary), settings.limits.failed_share)

        def write(context: Context) -> Outcome:
            read().show(settings.select.min_pairs)
            read().write_to(context.output)
            return Outcome(read().pairs, read().counters())

        of_reading = reading.settings(called)
        first = Stage(
            name="preferences",
            folder=PAIR.folder,
            summary=f"reading {called or ', '.join(without_keys(source.name) for source in reading.sources)}",
            inputs=lambda iteration: [],
            settings=lambda recipe, iteration: of_reading,
            run=write,
            demand=lambda recipe, profile: driver_demand("preferences", 0),
            uses_ray=False,
        )
        stages = (first, sketch.STAGE, select.STAGE)
        if not redo:
            _refuse_others(without_keys(out), work, recipe, stages)
        _check_model(recipe, _has_chats(work, _fingerprints(recipe, stages)[0], read))
        with only_writer(work):
            for stage in stages:
                run_stage(stage, recipe, profile, work, redo=redo)
            filtered = _write(reading, work, target, all_rows)
    logger.info(str(filtered))
    if filtered.reasons:
        why = ", ".join(f"{reason} {count:,}" for reason, count in filtered.reasons.items())
        logger.info(f"quarantined: {why}; see {without_keys(out)}/work/*/*/quarantine")
    return filtered


def _has_chats(work: RunDirectory, identity: str, read: Callable[[], Preferences]) -> bool:
    """Whether some pairs are chat messages: as was counted when they were read, or by reading them now."""
    done = work.stage(PAIR.folder, 0).manifest()
    if done is not None and done.fingerprint == identity and "chats" in done.counters:
        return bool(done.counters["chats"])
    return bool(read().chats)


def _write(reading: Reading, work: RunDirectory, target: RunDirectory, all_rows: bool) -> Filtered:
    """Writes what the filter is for, and counts what became of all rows."""
    folder = work.stage(select.STAGE.folder, 0)
    kept, scores = kept_rows(work)
    with target.output_stream("selected.parquet") as sink:
        write_own_rows(reading.sources, kept, {"congrad_score": scores}, sink)
    if all_rows:
        added = every_row(work)
        with target.output_stream("rows.parquet") as sink:
            write_own_rows(reading.sources, np.arange(len(added["congrad_status"])), added, sink)
    target.write_bytes("scores.parquet", folder.read_bytes("scores.parquet"))
    filtered = _filtered(work, folder.read_json("summary.json"), kept.tolist(), scores.to_pylist())
    if target.exists("export") and target.read_json("summary.json") != filtered.summary:
        logger.info("the exports of another selection are deleted; give --to again for those of this one")
        (target / "export").delete()
    target.write_json("summary.json", filtered.summary)
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
        words = {"source": "preferences", "digest": "content of the preferences"}
        return {words.get(str(name), str(name)): value for name, value in settings.items()}
    return by_name(settings)


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


def _filtered(work: RunDirectory, summary: dict[str, Any], kept: list[int], scores: list[float]) -> Filtered:
    """The numbers of all rows, from what the stages counted."""
    reading, sketching = (work.stage(stage.folder, 0).manifest() for stage in (PAIR, sketch.STAGE))
    assert reading and sketching  # both are done
    reasons: Counter[str] = Counter()
    for manifest in (reading, sketching):
        reasons.update(manifest.counters.get("quarantined", {}))
    duplicates = reading.counters.get("duplicates", 0)
    filtered = Filtered(
        summary=summary,
        kept=kept,
        scores=scores,
        rows=reading.rows + duplicates + sum(reading.counters.get("quarantined", {}).values()),
        dropped=sketching.rows - len(kept) + duplicates,
        duplicates=duplicates,
        reasons=dict(sorted(reasons.items())),
    )
    rows = {
        "rows": filtered.rows,
        "kept": len(kept),
        "dropped": filtered.dropped,
        "duplicates": duplicates,
        "quarantined": filtered.reasons,
        "prompts_taken": reading.counters.get("prompts_taken", {}),
    }
    return replace(filtered, summary={"rows": rows, **summary})
