"""`congrad render` and `submit`: the files of a cluster, and jobs on one that is there."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from congrad_ray.cli.options import (
    TOOLS,
    WHOLE_RUN,
    Overrides,
    ProfileName,
    Redo,
    examples,
)
from congrad_ray.config.printable import brief, printable, without_keys
from congrad_ray.config.profile import Profile, load_profile
from congrad_ray.config.recipe import load_recipe
from congrad_ray.config.settings import SettingsError, did_you_mean
from congrad_ray.rundir.directory import RunDirectoryError

logger = logging.getLogger(__name__)

app = typer.Typer()


def _of_iteration(stage: str, iteration: int | None) -> int | None:
    """The iteration of a job of this stage; None for one without. Raises RunDirectoryError."""
    from congrad_ray.pipeline.order import STAGES

    if stage != WHOLE_RUN and stage not in STAGES:
        hint = did_you_mean(stage, (*STAGES, WHOLE_RUN))
        names = ", ".join(STAGES)
        raise RunDirectoryError(f"no such stage: {stage}{hint}; there are {names}, and {WHOLE_RUN} for all")
    if stage == WHOLE_RUN or not STAGES[stage].each_iteration:
        if iteration is not None:
            raise RunDirectoryError(f"--iteration {iteration}: {stage} is not done for each iteration")
        return None
    return iteration or 0


@app.command(
    rich_help_panel=TOOLS,
    epilog=examples(
        "congrad render aws-spot --out cluster/aws.yaml",
        "congrad render kubernetes --what rayjob --recipe my.yaml --run mine | kubectl apply -f -",
    ),
)
def render(
    profile: Annotated[
        str, typer.Argument(metavar="PROFILE", help="A profile with a section cluster: a YAML, or its name.")
    ],
    what: Annotated[
        Literal["launcher", "raycluster", "rayjob"] | None,
        typer.Option(
            help="launcher: for `ray up`, on aws and gcp. raycluster: a KubeRay cluster that stays, for jobs. "
            "rayjob: a job with a cluster of its own, gone when it ends. By itself: what the provider has."
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="RECIPE", help="rayjob: the recipe YAML, which goes into the manifest.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="URI", help="rayjob: the run directory, as of congrad run.")
    ] = None,
    stage: Annotated[
        str, typer.Option(metavar="STAGE", help="rayjob: one stage, or run: all of them in order.")
    ] = WHOLE_RUN,
    iteration: Annotated[int | None, typer.Option(min=0, metavar="N", help="rayjob: of the stage.")] = None,
    set_: Overrides = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Written there, not to the screen.")] = None,
) -> None:
    """Write the file that starts a cluster of a profile: for Ray's cluster launcher, or YAML for KubeRay."""
    from congrad_ray.deploy import render as rendering

    where = load_profile(profile)
    if what is None:
        on_kubernetes = where.cluster is not None and where.cluster.provider == "kubernetes"
        what = "raycluster" if on_kubernetes else "launcher"
    command = f"congrad render {profile} --what {what}"
    if what == "rayjob":
        if recipe is None or run is None:
            raise rendering.RenderError("--what rayjob needs --recipe RECIPE and --run URI")
        iteration = _of_iteration(stage, iteration)
        documents = rendering.ray_job(
            where, load_recipe(recipe, set_ or []), run, None if stage == WHOLE_RUN else stage, iteration
        )
        command += f" --recipe {recipe} --run {without_keys(run)} --stage {stage}"
        command += "" if iteration is None else f" --iteration {iteration}"
    else:
        documents = [rendering.launcher(where) if what == "launcher" else rendering.ray_cluster(where)]
    text = rendering.to_text(documents, f"Made by: {command}\nChange the profile and make it again.")
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
        logger.info(f"written: {out}")


@app.command(
    rich_help_panel=TOOLS,
    epilog=examples(
        "congrad submit run my.yaml --run s3://bucket/first --profile aws-spot",
        "congrad submit sketch my.yaml --run s3://bucket/first --address http://HEAD:8265",
        "congrad submit filter s3://bucket/pairs.jsonl --model my/model --out s3://bucket/filtered --keep 0.3",
    ),
    context_settings={"ignore_unknown_options": True},
)
def submit(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="A stage; run: all of them in order; or filter.")],
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE", help="A recipe YAML. For filter: PREFERENCES and the options of congrad filter."
        ),
    ],
    run: Annotated[
        str | None,
        typer.Option("--run", metavar="DIR", help="The run directory: a URI (s3://, gs://) or a shared path."),
    ] = None,
    address: Annotated[
        str, typer.Option(metavar="URL", help="The head's dashboard: http://HEAD:8265.")
    ] = "http://127.0.0.1:8265",
    profile: ProfileName = "local",
    iteration: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Of the stage, from 0; by itself 0.")
    ] = None,
    set_: Overrides = None,
    redo: Redo = False,
) -> None:
    """Run a stage, or congrad filter, as a job on a cluster that is there, and follow its log.

    The exit code is the job's.

    The repository's folder is sent along, less what .rayignore names, so recipe and profile have to be in it. The
    job itself holds no CPUs and runs on the head. Ctrl-C stops following, not the job.
    """
    from congrad_ray.deploy import submit as submission

    where = load_profile(profile)
    if stage == "filter":
        if run is not None or iteration is not None or set_:
            raise SettingsError("--run, --iteration and --set are of stages; filter has --out and --select")
        command = _filter_job(arguments, where, profile, redo)
    else:
        number = _of_iteration(stage, iteration)
        if len(arguments) != 1:
            more = " ".join(arguments[1:])
            raise SettingsError(f"submit {stage} takes one RECIPE and --run, and no {brief(more)}")
        if run is None:
            raise SettingsError(f"submit {stage} needs --run DIR, a run directory that all nodes share")
        recipe = Path(arguments[0])
        loaded = load_recipe(recipe, set_ or [])
        if number is not None and number >= loaded.iterations:
            raise RunDirectoryError(f"--iteration {number}: the recipe has iterations 0..{loaded.iterations - 1}")
        run = where.shared_run_uri(run)
        command = submission.entrypoint(stage, recipe, run, profile, number, set_ or [], redo)
    client = submission.connect(address)
    job = submission.send(client, command)
    try:
        shown = shlex.join(map(without_keys, shlex.split(command)))
        logger.info(f"job {job} on {address}: {shown}")
        code = submission.follow(client, job, lambda text: typer.echo(printable(text, lines=True), nl=False))
    except KeyboardInterrupt:
        raise submission.StillRunning(f"\nThe job keeps running. {submission.again(client, job)}") from None
    raise typer.Exit(code)


def _filter_job(arguments: list[str], where: Profile, profile: str, redo: bool) -> str:
    """The command line of a filter as a job, after the command's own check of its arguments."""
    from congrad_ray.cli import filtering
    from congrad_ray.deploy import submit as submission

    parsed = typer.main.get_command(filtering.app).make_context("congrad submit filter", list(arguments)).params
    out = parsed["out"]
    place = next(i for i, word in enumerate(arguments) if word in ("--out", f"--out={out}"))
    rest = arguments[:place] + arguments[place + (1 if "=" in arguments[place] else 2) :]
    files = {*parsed["preferences"], parsed["model"]}
    return submission.filter_entrypoint(rest, files, where.shared_run_uri(out, "--out"), profile, redo)
