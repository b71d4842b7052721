"""Doing one stage: is it done, does it fit, do it, commit it."""

from __future__ import annotations

import errno
import logging
import os
import time
from dataclasses import replace
from typing import Any

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import BUILTIN_WORLD, Recipe
from congrad_ray.config.settings import to_yaml
from congrad_ray.modeling.source import check_models, named_model
from congrad_ray.rundir.directory import Manifest, RunDirectory, RunDirectoryError, fingerprint
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.lock import only_writer
from congrad_ray.runtime.logs import about, stage_label
from congrad_ray.runtime.metrics import Meter
from congrad_ray.runtime.resources import check_fits, most_cpus, needs
from congrad_ray.runtime.session import connect, machine
from congrad_ray.runtime.watchdog import free_disk, watched
from congrad_ray.stages.base import Stage

logger = logging.getLogger(__name__)


def input_fingerprints(stage: Stage, run: RunDirectory, iteration: int) -> dict[str, str]:
    """The fingerprints of a stage's inputs. Raises RunDirectoryError naming the first that is not finished."""
    found = {}
    for folder, of_iteration in stage.inputs(iteration):
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
    with only_writer(run), about(run.path, stage.name, number):
        return _locked_stage(stage, recipe, profile, run, iteration, redo)


def _locked_stage(
    stage: Stage, recipe: Recipe, profile: Profile, run: RunDirectory, iteration: int, redo: bool
) -> Manifest:
    number = iteration if stage.each_iteration else None
    label = stage_label(stage.name, number)
    inputs = input_fingerprints(stage, run, iteration)
    settings = stage.settings(recipe, iteration)
    identity = fingerprint(stage.name, settings, inputs)
    output = run.stage(stage.folder, number)
    if stage.always:
        output.delete()
    state = output.begin(identity, redo, label)
    if state == "done":
        manifest = output.manifest()
        assert manifest is not None
        logger.info(f"done already ({manifest.rows} rows)")
        return manifest
    if recipe.model.name == BUILTIN_WORLD and stage.uses_ray:
        # Built here, before the clock runs and Ray takes memory; every later stage finds it in the cache.
        named_model(recipe.model.name, recipe.model, recipe.seed)
    check_models(recipe, stage.chats)
    logger.info(f"{'going on' if state == 'continue' else 'starting'}: {stage.summary}")
    run.write_bytes("recipe.yaml", to_yaml(recipe).encode())
    if stage.uses_ray:
        connect(profile, most_cpus(recipe, profile))
        need = next(need for need in needs(recipe, profile) if need.stage == stage.name)
        check_fits(need, machine(), profile.cluster)
    before = time.monotonic()
    meter = Meter(run.path, stage.name, number)
    context = Context(recipe, profile, run, iteration, output, meter)
    meter.set("congrad_stage_running", 1)
    try:
        outcome = _work(stage, context, label)
    finally:
        meter.set("congrad_stage_running", 0)
    counters = {key: value for key, value in outcome.counters.items() if value not in ({}, None)}
    manifest = output.commit(
        stage.name, number, identity, settings, inputs, outcome.rows, time.monotonic() - before, counters
    )
    logger.info(f"{manifest.rows} rows in {manifest.seconds:.0f} s {_brief(counters)}".rstrip())
    return manifest


def _work(stage: Stage, context: Context, label: str) -> Outcome:
    """Does the work, watched where it is done on Ray. Raises RunDirectoryError for a disk that is full."""
    timeout = context.recipe.limits.stall_timeout_s
    try:
        if not stage.uses_ray:
            return stage.run(context)
        grows = context.profile.cluster is not None
        with watched(label, timeout, context.output, grows) as watchdog:
            return stage.run(replace(context, progressed=watchdog.progressed))
    except Exception as error:
        # Out of a Ray task it comes as an error of Ray with the text in it.
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        free = free_disk(context.output)
        left = "" if free is None else f" ({free / 2**30:.2f} GiB are free)"
        raise RunDirectoryError(
            f"{label}: no space left on a disk: that of {context.output.path}{left}, or Ray's in /tmp/ray. "
            "What is written is kept: make room, and the same command goes on with what is missing."
        ) from error


def _brief(counters: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in counters.items() if isinstance(value, int | float))
