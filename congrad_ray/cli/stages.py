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
from congrad_ray.config.printable import without_keys
from congrad_ray.config.profile import load_profile
from congrad_ray.config.recipe import load_recipe
from congrad_ray.config.settings import SettingsError
from congrad_ray.pipeline.order import STAGES
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError
from congrad_ray.stages.base import Stage
from congrad_ray.stages.evaluate.stage import STAGE as EVALUATE
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


def _evaluate(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODEL", help="A recipe YAML; or, with BASELINE, a model: folder or hub name."
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Argument(
            metavar="BASELINE",
            help="Compare MODEL with this one, without a run: a model, or a file of answers (columns prompt, "
            "language, and response, output or chosen).",
        ),
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="DIR", help="The run directory: a path or a URI (s3://, gs://).")
    ] = None,
    iteration: Iteration = 0,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="With BASELINE: the prompts, with columns prompt and language."),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(metavar="TAG", help="With BASELINE: of all prompts, in a file without the column."),
    ] = None,
    per_language: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="With BASELINE: prompts drawn of each language.", show_default="all"
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="With BASELINE: the model that compares.", show_default="BASELINE, or else MODEL"
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="With BASELINE: a server that compares, such as https://api.openai.com/v1."
        ),
    ] = None,
    endpoint_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --endpoint: the server's name for the model.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="VARIABLE", help="With --endpoint: where the environment has the key.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="With BASELINE: where answers and results go.", show_default="evaluated"),
    ] = None,
    profile: ProfileName = "local",
    set_: Overrides = None,
    redo: Redo = False,
    as_json: AsJson = False,
) -> None:
    """Compare the trained model with its starting point; or any model with another, or with a file of answers.

    RECIPE --run DIR does the stage of a run. MODEL BASELINE --prompts FILE needs no run: both answer, a judge
    compares the answers in both orders, and the win rates are shown, raw and controlled for length. Other
    settings: as in a recipe, --set evaluate.max_tokens=256, --set model.dtype=bfloat16.
    """
    of_models = {
        "--prompts": prompts,
        "--language": language,
        "--per-language": per_language,
        "--judge": judge,
        "--endpoint": endpoint,
        "--endpoint-model": endpoint_model,
        "--api-key-env": api_key_env,
        "--out": out,
    }
    if baseline is None:
        if given := [name for name, value in of_models.items() if value is not None]:
            raise SettingsError(f"{', '.join(given)}: for MODEL BASELINE; see congrad evaluate --help")
        if run is None:
            raise RunDirectoryError("give RECIPE and --run DIR, or MODEL BASELINE --prompts FILE")
        if as_json:
            screen.json = True
            directory = _perform(EVALUATE, Path(recipe), run, iteration, profile, set_, redo)
            print_json(directory.stage(EVALUATE.folder, iteration).read_json("summary.json"))
        else:
            _perform_and_show(EVALUATE, Path(recipe), run, iteration, profile, set_, redo)
        return
    if run is not None:
        raise SettingsError("--run is for RECIPE; two models are compared without a run, into --out DIR")
    if prompts is None:
        raise SettingsError("--prompts FILE is missing: what MODEL and BASELINE are to answer")
    if endpoint is None and (endpoint_model or api_key_env):
        raise SettingsError("--endpoint-model and --api-key-env are of --endpoint URL: give it too")
    if endpoint is not None and endpoint_model is None:
        raise SettingsError("--endpoint needs --endpoint-model NAME, the server's name for the model")
    from congrad_ray.pipeline.comparison import Comparison, compared_recipe, run_comparison

    screen.json = as_json
    out = out or "evaluated"
    where = profile_for(profile, without_keys(out))
    server = {"url": endpoint, "model": endpoint_model, "api_key_env": api_key_env} if endpoint else None
    settings = compared_recipe(recipe, baseline, prompts, judge, server, set_ or [])
    comparison = Comparison(recipe, baseline, settings, language, per_language)
    summary = run_comparison(comparison, out, where, redo)
    if as_json:
        print_json(summary)
    elif where.log_format == "text" and not screen.quiet:
        from congrad_ray.cli.display import show_figures
        from congrad_ray.stages.evaluate.figures import evaluation

        for figures in evaluation(summary, trained=False):
            show_figures(figures)


for _stage in STAGES.values():
    if _stage is EVALUATE:
        compare = f"congrad {_stage.name} runs/first/iteration-0/policy my-model --prompts prompts.jsonl"
        answers = f"congrad {_stage.name} my-model answers.jsonl --prompts answers.jsonl --out against-answers"
        app.command(_stage.name, rich_help_panel=PANEL, epilog=_examples(_stage, compare, answers))(_evaluate)
    elif _stage is SELECT:
        folders = " ".join(f"runs/{run}/iteration-0/{SELECT.folder}" for run in ("first", "second"))
        compare = f"congrad {SELECT.name} --compare {folders}"
        app.command(_stage.name, rich_help_panel=PANEL, epilog=_examples(_stage, compare))(_select)
    else:
        app.command(_stage.name, rich_help_panel=PANEL, epilog=_examples(_stage))(_stage_command(_stage))
