"""A command for every stage of the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from congrad_ray.cli.options import STAGES as PANEL
from congrad_ray.cli.options import (
    AsJson,
    Iteration,
    Overrides,
    ProfileName,
    RecipePath,
    Redo,
    RunUri,
    examples,
    print_json,
    profile_for,
    screen,
)
from congrad_ray.config.profile import load_profile
from congrad_ray.config.recipe import load_recipe
from congrad_ray.pipeline.order import STAGES
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError
from congrad_ray.stages.base import Stage
from congrad_ray.stages.select.stage import STAGE as SELECT

app = typer.Typer()


def _perform(
    stage: Stage, recipe: Path, run: str, iteration: int, profile: str, set_: list[str] | None, redo: bool
) -> RunDirectory:
    """Runs one stage; returns its run directory. Raises RunDirectoryError for an iteration that there is not."""
    from congrad_ray.pipeline.runner import run_stage

    loaded = load_recipe(recipe, set_ or [])
    where = load_profile(profile)
    directory = RunDirectory.open(where.run_uri(run))
    if iteration >= loaded.iterations:
        raise RunDirectoryError(f"--iteration {iteration}: the recipe has iterations 0..{loaded.iterations - 1}")
    profile_for(profile, directory.path)
    run_stage(stage, loaded, where, directory, iteration, redo)
    return directory


def _perform_and_show(
    stage: Stage, recipe: Path, run: str, iteration: int, profile: str, set_: list[str] | None, redo: bool
) -> None:
    directory = _perform(stage, recipe, run, iteration, profile, set_, redo)
    if load_profile(profile).log_format == "text" and not screen.quiet:
        from congrad_ray.cli.display import show_stage

        show_stage(directory, stage, iteration)


def _stage_command(stage: Stage) -> Callable[..., None]:
    def in_iteration(
        recipe: RecipePath,
        run: RunUri,
        iteration: Iteration = 0,
        profile: ProfileName = "local",
        set_: Overrides = None,
        redo: Redo = False,
    ) -> None:
        _perform_and_show(stage, recipe, run, iteration, profile, set_, redo)

    def once(
        recipe: RecipePath,
        run: RunUri,
        profile: ProfileName = "local",
        set_: Overrides = None,
        redo: Redo = False,
    ) -> None:
        _perform_and_show(stage, recipe, run, 0, profile, set_, redo)

    command = in_iteration if stage.each_iteration else once
    command.__doc__ = f"{stage.summary}."
    return command


def _examples(stage: Stage, *more: str) -> str:
    lines = [f"congrad {stage.name} my.yaml --run runs/first"]
    if stage.example:
        lines.append(f"congrad {stage.name} my.yaml --run runs/first --set {stage.example} --redo")
    return examples(*lines, *more)


def _select(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="A recipe YAML; congrad init writes one.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="DIR", help="The run directory: a path or a URI (s3://, gs://).")
    ] = None,
    iteration: Iteration = 0,
    profile: ProfileName = "local",
    set_: Overrides = None,
    redo: Redo = False,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="DIR1 DIR2", help="Only show how far two selections (folders) agree."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Keep the pairs that agree with the languages' common direction.

    Another direction, score, keep rule or baseline needs seconds on the same sketches. The settings are in the
    recipe's section `select`.
    """
    if compare is not None:
        from congrad_ray.cli.display import overlap_values, show_overlaps

        if as_json:
            print_json(overlap_values(*compare))
        else:
            show_overlaps(*compare)
        return
    if recipe is None or run is None:
        raise RunDirectoryError("give RECIPE and --run DIR, or --compare DIR1 DIR2; see congrad select --help")
    if as_json:
        screen.json = True
        directory = _perform(SELECT, recipe, run, iteration, profile, set_, redo)
        print_json(directory.stage(SELECT.folder, iteration).read_json("summary.json"))
    else:
        _perform_and_show(SELECT, recipe, run, iteration, profile, set_, redo)


for _stage in STAGES.values():
    if _stage is SELECT:
        folders = " ".join(f"runs/{run}/iteration-0/{SELECT.folder}" for run in ("first", "second"))
        compare = f"congrad {SELECT.name} --compare {folders}"
        app.command(_stage.name, rich_help_panel=PANEL, epilog=_examples(_stage, compare))(_select)
    else:
        app.command(_stage.name, rich_help_panel=PANEL, epilog=_examples(_stage))(_stage_command(_stage))
