"""Doing one stage: is it done, does it fit, do it, commit it."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import BUILTIN_WORLD, Recipe
from congrad_ray.config.settings import Settings, SettingsError, to_yaml, without_gone
from congrad_ray.data.records import InputError
from congrad_ray.modeling.adapters import check_quantization
from congrad_ray.modeling.source import ModelError, check_models, named_model
from congrad_ray.modeling.tokenization import MissingChatTemplate
from congrad_ray.pipeline.plan import max_cpus
from congrad_ray.rundir.directory import Manifest, RunDirectory, RunDirectoryError, StageFolder, fingerprint
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.interrupts import StageStopped
from congrad_ray.runtime.lock import only_writer
from congrad_ray.runtime.logs import about, stage_label
from congrad_ray.runtime.merging import merge_parts
from congrad_ray.runtime.metrics import Meter
from congrad_ray.runtime.pools import engine_starts, keeping, let_go
from congrad_ray.runtime.progress import duration
from congrad_ray.runtime.resources import DoesNotFit, check_fits
from congrad_ray.runtime.session import connect, connected, machine, this_machine
from congrad_ray.runtime.watchdog import free_disk, watched
from congrad_ray.stages.base import Stage

logger = logging.getLogger(__name__)


def input_fingerprints(stage: Stage, run: RunDirectory, iteration: int) -> dict[str, str]:
    """The fingerprints of a stage's inputs. Raises RunDirectoryError naming the first that is not finished."""
    return _fingerprints(stage, stage.inputs(iteration), run)


def _fingerprints(stage: Stage, inputs: Sequence[tuple[str, int | None]], run: RunDirectory) -> dict[str, str]:
    found = {}
    for folder, of_iteration in inputs:
        manifest = run.stage(folder, of_iteration).manifest()
        place = folder if of_iteration is None else f"iteration-{of_iteration}/{folder}"
        if manifest is None:
            raise RunDirectoryError(
                f"{stage.name} needs {place}, which is not finished in {run.path}: run the stage that makes it "
                "first, or `congrad run`, which does all in order."
            )
        found[place] = manifest.fingerprint
    return found


def run_stage(
    stage: Stage,
    recipe: Recipe,
    profile: Profile,
    run: RunDirectory,
    iteration: int = 0,
    redo: bool = False,
) -> Manifest:
    """Does a stage unless it is done already, on a connected Ray where it needs one, and commits it.

    Raises DoesNotFit, RunDirectoryError, StageStopped, InputError or ModelError: each a ValueError that says what
    to do.
    """
    number = iteration if stage.each_iteration else None
    with only_writer(run), keeping(), about(run.path, stage.name, number):
        return _locked_stage(stage, recipe, profile, run, iteration, redo)


def _locked_stage(
    stage: Stage, recipe: Recipe, profile: Profile, run: RunDirectory, iteration: int, redo: bool
) -> Manifest:
    number = iteration if stage.each_iteration else None
    label = stage_label(stage.name, number)
    inputs = input_fingerprints(stage, run, iteration)
    settings = stage.settings(recipe, iteration)
    output = run.stage(stage.folder, number)
    made_of = [inputs, *_older_inputs(stage, run, iteration)]
    identity = _made_before(settings, made_of, output) or fingerprint(stage.name, settings, inputs)
    if stage.always:
        output.delete()
    if not output.exists() and (rows := stage.adopted(recipe, run)) is not None:
        return _adopt(stage, rows, output, Claim(identity, settings, inputs))

    def check() -> None:
        check_models(recipe, stage.chats, present=loads_models(stage, recipe, iteration))
        if loads_models(stage, recipe, iteration):
            check_quantization(recipe.train.lora, profile.device)
        if stage.uses_ray and not (profile.cluster or profile.ray_address or connected()):
            cpus = max_cpus(recipe, profile)
            check_fits(stage.demand(recipe, profile), this_machine(profile, cpus), None)

    state = output.begin(identity, redo, label, settings, inputs, _named_as_now, check)
    if state == "done":
        manifest = output.manifest()
        assert manifest is not None
        logger.info(f"done already ({manifest.rows} rows)")
        return manifest
    try:
        return _do(stage, recipe, profile, run, iteration, output, state, Claim(identity, settings, inputs))
    except ValueError as error:
        if not isinstance(error, StageStopped) and (not stage.uses_ray or isinstance(error, _OF_INPUT)):
            output.withdraw()
        raise


def _made_before(settings: Any, made_of: Sequence[dict[str, str]], output: StageFolder) -> str | None:
    """The fingerprint of a finished result of one of these inputs, by an older version too.

    Its settings differ from these at most in ones that are gone since.
    """
    manifest = output.manifest()
    if manifest is None or not isinstance(manifest.settings, dict) or manifest.inputs not in made_of:
        return None
    return manifest.fingerprint if without_gone(Recipe, manifest.settings) == settings else None


def _older_inputs(stage: Stage, run: RunDirectory, iteration: int) -> list[dict[str, str]]:
    """The fingerprints of the inputs that the stage had in older versions; none where not all are finished."""
    if stage.older_inputs is None:
        return []
    try:
        return [_fingerprints(stage, stage.older_inputs(iteration), run)]
    except RunDirectoryError:
        return []


def _adopt(stage: Stage, rows: pa.Table, output: StageFolder, claim: Claim) -> Manifest:
    """Commits what an older version has elsewhere as the stage's result."""
    output.write_table("adopted.parquet", rows)
    manifest = output.commit(
        stage.name,
        None,
        claim.fingerprint,
        claim.settings,
        claim.inputs,
        len(rows),
        0.0,
        {"adopted": len(rows), "engine_starts": 0},
    )
    logger.info(f"taken over from an older version's result ({manifest.rows} rows)")
    return manifest


def loads_models(stage: Stage, recipe: Recipe, iteration: int) -> bool:
    """Whether the work of a stage is with models, so that they decide its output."""
    return stage.uses_ray and "model" in by_name(stage.settings(recipe, iteration))


def by_name(settings: Any) -> dict[str, Any]:
    """A stage's settings with the names that the recipe has for them.

    A stage keeps what decides its output in a form of its own: a mapping of sections, one section's settings, or a
    list of both; what is known of it is which section has settings of these names.
    """
    if isinstance(settings, dict) and "model" in settings and isinstance(settings["model"], dict):
        return settings
    found: dict[str, Any] = {}
    for value in settings if isinstance(settings, list) else [settings]:
        section = _section_of(value) if isinstance(value, dict) else None
        if section:
            found[section] = value
        elif isinstance(value, dict):
            found |= value
        else:
            found[f"another setting ({len(found) + 1})"] = value
    return found


def _named_as_now(settings: Any) -> dict[str, Any]:
    """`by_name`, also of settings that an older version wrote."""
    return without_gone(Recipe, by_name(settings))


def _section_of(values: dict[str, Any]) -> str | None:
    """The section of a recipe that has settings of all these names."""
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if (
            isinstance(section, type)
            and issubclass(section, Settings)
            and values.keys() <= section.model_fields.keys() | section.gone.keys()
        ):
            return name
    return None


# Errors of the settings and inputs: where they end a stage on Ray before its first row, nothing is being written.
_OF_INPUT = (SettingsError, InputError, ModelError, MissingChatTemplate, DoesNotFit)


@dataclass(frozen=True)
class Claim:
    """What a stage's result is known by."""

    fingerprint: str
    settings: Any
    inputs: dict[str, str]


def _do(
    stage: Stage,
    recipe: Recipe,
    profile: Profile,
    run: RunDirectory,
    iteration: int,
    output: StageFolder,
    state: Literal["continue", "new"],
    claim: Claim,
) -> Manifest:
    """Does a stage that has been claimed, and commits it."""
    number = iteration if stage.each_iteration else None
    if recipe.model.name == BUILTIN_WORLD and stage.uses_ray:
        # Built here, before the clock runs and Ray takes memory; every later stage finds it in the cache.
        named_model(recipe.model.name, recipe.model, recipe.seed)
    doing = stage.summary[:1].lower() + stage.summary[1:]
    logger.info(f"{'resuming' if state == 'continue' else 'starting'}: {doing}")
    run.write_bytes("recipe.yaml", to_yaml(recipe).encode())
    if stage.uses_ray:
        connect(profile, max_cpus(recipe, profile))
        demand = stage.demand(recipe, profile)
        check_fits(demand, machine(), profile.cluster)
        if demand.setting and not stage.chats:
            let_go(f"{stage.name} needs its room")
    starts = engine_starts() if stage.chats else 0
    before = time.monotonic()
    meter = Meter(run.path, stage.name, number)
    context = Context(recipe, profile, run, iteration, output, meter)
    meter.set("congrad_stage_running", 1)
    try:
        outcome = _work(stage, context, stage_label(stage.name, number))
    finally:
        meter.set("congrad_stage_running", 0)
    counters = {key: value for key, value in outcome.counters.items() if value not in ({}, None)}
    if stage.chats:
        counters["engine_starts"] = engine_starts() - starts
    seconds = time.monotonic() - before
    manifest = output.commit(
        stage.name, number, claim.fingerprint, claim.settings, claim.inputs, outcome.rows, seconds, counters
    )
    logger.info(_summary(manifest))
    return manifest


def _work(stage: Stage, context: Context, label: str) -> Outcome:
    """Does the work, watched where it is done on Ray. Raises RunDirectoryError for a disk that is full."""
    timeout = context.recipe.limits.stall_timeout_s
    try:
        if not stage.uses_ray:
            return stage.run(context)
        grows = context.profile.cluster is not None
        with watched(label, timeout, context.output, grows) as watchdog:
            outcome = stage.run(replace(context, progressed=watchdog.progressed))
            for name in stage.parts:
                merge_parts(context.output / name if name else context.output, watchdog.progressed)
            return outcome
    except Exception as error:
        # Out of a Ray task it comes as an error of Ray with the text in it.
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        free = free_disk(context.output)
        left = "" if free is None else f" ({free / 2**30:.2f} GiB are free)"
        raise RunDirectoryError(
            f"{label}: no space left on a disk: that of {context.output.path}{left}, or Ray's in /tmp/ray. "
            "What is written is kept: make room, and the same command resumes with what is missing."
        ) from error


def _summary(manifest: Manifest) -> str:
    """`1,546 rows in 58 s; 776 kept, 2 in quarantine (bad_language 2)`: the counters in words."""
    parts = []
    for name, value in manifest.counters.items():
        words = name.replace("_", " ")
        if name == "quarantined":
            total = sum(value.values())
            parts.append(
                f"{total:,} in quarantine ({', '.join(f'{key} {count}' for key, count in value.items())})"
            )
        elif isinstance(value, bool) or not isinstance(value, int | float) or not value:
            continue
        elif isinstance(value, int):
            parts.append(f"{value:,} {words.removesuffix('s') if value == 1 else words}")
        else:
            parts.append(f"{words} {value:.4g}")
    rows = f"{manifest.rows:,} row{'' if manifest.rows == 1 else 's'} in {duration(manifest.seconds)}"
    return f"done: {rows}{'; ' if parts else ''}{', '.join(parts)}"
