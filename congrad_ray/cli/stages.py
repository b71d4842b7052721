"""A command for every stage of the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from congrad_ray.cli.options import (
    STAGES,
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
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError

app = typer.Typer()


def perform(
    name: str, recipe: Path, run: str, iteration: int, profile: str, set_: list[str] | None, redo: bool
) -> RunDirectory:
    """Runs one stage; returns its run directory. Raises RunDirectoryError for an iteration that there is not."""
    from congrad_ray.pipeline import order
    from congrad_ray.pipeline.runner import run_stage

    loaded = load_recipe(recipe, set_ or [])
    where = load_profile(profile)
    directory = RunDirectory.open(where.run_uri(run))
    if iteration >= loaded.iterations:
        raise RunDirectoryError(f"--iteration {iteration}: the recipe has iterations 0..{loaded.iterations - 1}")
    profile_for(profile, directory.path)
    run_stage(order.STAGES[name], loaded, where, directory, iteration, redo)
    return directory


def _perform_and_show(
    name: str, recipe: Path, run: str, iteration: int, profile: str, set_: list[str] | None, redo: bool
) -> None:
    directory = perform(name, recipe, run, iteration, profile, set_, redo)
    if load_profile(profile).log_format == "text" and not screen.quiet:
        from congrad_ray.cli.display import show_stage

        show_stage(directory, name, iteration)


def _stage_command(name: str, summary: str, each_iteration: bool) -> Callable[..., None]:
    def in_iteration(
        recipe: RecipePath,
        run: RunUri,
        iteration: Iteration = 0,
        profile: ProfileName = "local",
        set_: Overrides = None,
        redo: Redo = False,
    ) -> None:
        _perform_and_show(name, recipe, run, iteration, profile, set_, redo)

    def once(
        recipe: RecipePath,
        run: RunUri,
        profile: ProfileName = "local",
        set_: Overrides = None,
        redo: Redo = False,
    ) -> None:
        _perform_and_show(name, recipe, run, 0, profile, set_, redo)

    command = in_iteration if each_iteration else once
    command.__doc__ = f"{summary}."
    return command


def _add(name: str, summary: str, each_iteration: bool = True, change: str = "") -> None:
    lines = [f"congrad {name} my.yaml --run runs/first"]
    if change:
        lines.append(f"congrad {name} my.yaml --run runs/first --set {change} --redo")
    command = _stage_command(name, summary, each_iteration)
    app.command(name, rich_help_panel=STAGES, epilog=examples(*lines))(command)


_add("prompts", "Read, clean and draw the training and evaluation prompts", False, "prompts.train.name=data.jsonl")
_add("generate", "Sample responses from the policy with vLLM under Ray Data", True, "generate.temperature=1.0")
_add(
    "judge",
    "Score the responses from 0 to 5 with the policy or another model",
    True,
    "judge.method=expected_score",
)
_add("pair", "Pair the best with the worst response of every prompt", True, "pair.min_margin=0.5")
_add("sketch", "Count-sketch every pair's gradient on a pool of model replicas", True, "sketch.width=65536")


@app.command(
    rich_help_panel=STAGES,
    epilog=examples(
        "congrad select my.yaml --run runs/first",
        "congrad select my.yaml --run runs/first --set select.direction=mean --redo",
        "congrad select --compare runs/first/iteration-0/selection runs/second/iteration-0/selection",
    ),
)
def select(
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
        directory = perform("select", recipe, run, iteration, profile, set_, redo)
        print_json(directory.stage("selection", iteration).read_json("summary.json"))
    else:
        _perform_and_show("select", recipe, run, iteration, profile, set_, redo)


_add("train", "Train by DPO on the kept pairs, with Ray Train and DeepSpeed", True, "train.beta=0.2")
_add("evaluate", "Compare the trained model with its starting point", True, "evaluate.sampled=false")
_add("report", "Write DIR/report.html", False)
