"""`congrad run`, `plan` and `status`: the whole loop, before it, in one go, and how far it is."""

from __future__ import annotations

import logging
import time
from typing import Annotated, Any

import typer

from congrad_ray.cli.options import (
    THE_LOOP,
    AsJson,
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
from congrad_ray.config.printable import without_keys
from congrad_ray.config.profile import load_profile
from congrad_ray.config.recipe import Recipe, load_recipe, recipe_of_run
from congrad_ray.config.settings import did_you_mean
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError

logger = logging.getLogger(__name__)

app = typer.Typer()


@app.command(
    rich_help_panel=THE_LOOP,
    epilog=examples(
        "congrad run my.yaml --run runs/first",
        "congrad run my.yaml --run runs/first --until select --set select.keep=0.3",
        "congrad run my.yaml --run s3://bucket/first --profile one-gpu",
    ),
)
def run(
    recipe: RecipePath,
    run: RunUri,
    profile: ProfileName = "local",
    set_: Overrides = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    redo: Redo = False,
) -> None:
    """Run all stages in order, for every iteration of the recipe. Stages that are done are skipped."""
    from congrad_ray.pipeline.loop import run_all
    from congrad_ray.pipeline.order import STAGES
    from congrad_ray.runtime.progress import duration

    if until is not None and until not in STAGES:
        hint = did_you_mean(until, STAGES)
        raise RunDirectoryError(f"--until {until}: no such stage{hint}; stages are {', '.join(STAGES)}")
    loaded = load_recipe(recipe, set_ or [])
    where = load_profile(profile)
    directory = RunDirectory.open(where.run_uri(run))
    profile_for(profile, directory.path)
    before = time.monotonic()
    run_all(loaded, where, directory, until, redo)
    if where.log_format == "text" and not screen.quiet:
        from congrad_ray.cli.display import show_run

        show_run(directory, loaded)
    logger.info(f"all done in {duration(time.monotonic() - before)}: {directory.path}")


@app.command(
    rich_help_panel=THE_LOOP,
    epilog=examples(
        "congrad plan my.yaml",
        "congrad plan my.yaml --profile aws-a10g --set model.name=google/gemma-2-2b-it",
        "congrad plan my.yaml --run runs/first --assume gpu_memory_gib=80",
    ),
)
def plan(
    recipe: RecipePath,
    profile: ProfileName = "local",
    set_: Overrides = None,
    run: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="DIR",
            help="Take mean lengths and bytes of rows from the finished stages of this run.",
        ),
    ] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(metavar="a=b", help="Override an assumption: response_share=0.3, gpu_memory_gib=80, ..."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict tokens, FLOPs, memory, time, cost and bytes of every stage, before anything runs.

    Reads the model's configuration and downloads nothing. The exit code is 2 if something does not fit, with the
    setting that helps.
    """
    from congrad_ray.pipeline.plan import demands, known_lengths, make_plan, where_it_runs
    from congrad_ray.planning.assumptions import load_assumptions
    from congrad_ray.planning.estimate import Planned
    from congrad_ray.planning.shapes import read_shapes
    from congrad_ray.runtime.resources import DoesNotFit, check_fits

    loaded, where = load_recipe(recipe, set_ or []), load_profile(profile)
    assumptions = load_assumptions(assume or [])
    there_is = where_it_runs(loaded, where, assumptions)
    lengths = known_lengths(loaded, assumptions, RunDirectory.open(run) if run else None)
    found = make_plan(Planned(loaded, where, read_shapes(loaded), lengths, assumptions), there_is)
    if as_json:
        from congrad_ray.cli.plan_tables import plan_values

        print_json(plan_values(found, loaded.name, where.name))
    else:
        from congrad_ray.cli.plan_tables import show_plan

        show_plan(found, loaded, where, lengths, assumptions, there_is)
    for demand in demands(loaded, where):
        check_fits(demand, there_is, where.cluster)
    if found.short:
        raise DoesNotFit(f"{', '.join(stage.stage for stage in found.short)}: not enough memory for one replica")
    if not as_json:
        from congrad_ray.cli.display import console

        unknown = any(stage.needed and stage.available is None for stage in found.stages)
        console.print(
            "Every stage fits the CPUs and GPUs; their memory is not known (--assume gpu_memory_gib=80)."
            if unknown
            else "Every stage fits."
        )


@app.command(
    rich_help_panel=THE_LOOP,
    epilog=examples("congrad status --run runs/first", "congrad status --run runs/first --json"),
)
def status(run: RunUri, profile: ProfileName = "local", as_json: AsJson = False) -> None:
    """Show the stages of a run and how far each is."""
    directory = RunDirectory.open(load_profile(profile).run_uri(run))
    if not directory.exists("recipe.yaml"):
        raise RunDirectoryError(f"{without_keys(run)} holds no run: there is no recipe.yaml in it")
    where = f"{without_keys(run)}/recipe.yaml"
    stored = recipe_of_run(directory.read_bytes("recipe.yaml"), where)
    if as_json:
        print_json(_status_values(directory, stored))
        return
    from congrad_ray.cli.display import show_run

    show_run(directory, stored)


def _status_values(directory: RunDirectory, recipe: Recipe) -> dict[str, Any]:
    """The status as --json gives it: `state` is done, begun or waiting."""
    from congrad_ray.pipeline.order import steps_of

    stages = []
    for stage, iteration in steps_of(recipe):
        folder = directory.stage(stage.folder, iteration)
        manifest = folder.manifest()
        values: dict[str, Any] = {"stage": stage.name, "iteration": iteration}
        if manifest:
            values |= {"state": "done", "rows": manifest.rows, "seconds": manifest.seconds}
            values |= {"finished_at": manifest.finished_at, "counters": manifest.counters}
        elif folder.begun():
            values |= {"state": "begun", "rows": folder.rows_so_far()}
        elif (rows := stage.adopted(recipe, directory)) is not None:  # an older version's, in another folder
            values |= {"state": "done", "rows": len(rows), "seconds": 0.0}
        else:
            values |= {"state": "waiting"}
        stages.append(values)
    return {"run": directory.path, "recipe": recipe.name, "iterations": recipe.iterations, "stages": stages}
