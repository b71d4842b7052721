"""The front door: `congrad <verb>`."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from congrad_ray.cli.display import console, plain, show_overlaps, show_run, show_selection, show_stage
from congrad_ray.config import recipe as recipes
from congrad_ray.config.printable import printable
from congrad_ray.config.profile import load_profile
from congrad_ray.config.recipe import Recipe, load_recipe
from congrad_ray.config.settings import apply_overrides, settings_in, validate
from congrad_ray.deploy.submit import StillRunning
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError, without_keys
from congrad_ray.runtime.interrupts import StageStopped
from congrad_ray.runtime.logs import StreamLog
from congrad_ray.runtime.resources import DoesNotFit, check_fits, needs

app = typer.Typer(
    name="congrad",
    help="Conflicting gradient filtering for multilingual preference alignment, on Ray.\n\n"
    "A recipe says what to do, a profile where; a run directory holds every stage's result. Any command can be "
    "stopped and given again: it goes on where it was.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
_log = StreamLog()

WHOLE_RUN = "run"  # in place of a stage's name

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe YAML; see jobs/recipes/.")]
RunUri = Annotated[
    str, typer.Option("--run", metavar="DIR", help="The run directory: a path or a URI (s3://, gs://).")
]
ProfileName = Annotated[
    str,
    typer.Option("--profile", metavar="P", help="A profile YAML, or the name of a built-in one."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=c", help="Override a setting of the recipe; repeat for more."),
]
Redo = Annotated[
    bool, typer.Option("--redo", help="Throw away and redo stages made with other settings or inputs.")
]
Iteration = Annotated[int, typer.Option("--iteration", min=0, metavar="N", help="Which iteration, from 0.")]


@app.command()
def run(
    recipe: RecipePath,
    run: RunUri,
    profile: ProfileName = "local",
    set_: Overrides = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    redo: Redo = False,
) -> None:
    """All stages in order, for every iteration of the recipe. Stages that are done are skipped."""
    from congrad_ray.pipeline.order import STAGES, run_all

    if until is not None and until not in STAGES:
        raise RunDirectoryError(f"--until {until}: no such stage; stages are {', '.join(STAGES)}")
    where = load_profile(profile)
    directory = RunDirectory.open(where.run_uri(run))
    loaded = load_recipe(recipe, set_ or [])
    before = time.monotonic()
    log = StreamLog(where.log_format, directory.path)
    run_all(loaded, where, directory, until, redo, log)
    if where.log_format == "text":
        show_run(directory, loaded)
    log(f"all done in {time.monotonic() - before:.0f} s: {directory.path}")


def _perform(
    name: str, recipe: Path, run: str, iteration: int, profile: str, set_: list[str] | None, redo: bool
) -> None:
    """Runs one stage and shows what a person wants to see of it."""
    from congrad_ray.pipeline.order import STAGES
    from congrad_ray.pipeline.runner import run_stage

    where = load_profile(profile)
    directory = RunDirectory.open(where.run_uri(run))
    loaded = load_recipe(recipe, set_ or [])
    if iteration >= loaded.iterations:
        raise RunDirectoryError(f"--iteration {iteration}: the recipe has iterations 0..{loaded.iterations - 1}")
    log = StreamLog(where.log_format, directory.path)
    run_stage(STAGES[name], loaded, where, directory, iteration, redo, log)
    if where.log_format == "text":
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
        _perform(name, recipe, run, iteration, profile, set_, redo)

    def once(
        recipe: RecipePath,
        run: RunUri,
        profile: ProfileName = "local",
        set_: Overrides = None,
        redo: Redo = False,
    ) -> None:
        _perform(name, recipe, run, 0, profile, set_, redo)

    command = in_iteration if each_iteration else once
    command.__doc__ = f"{summary}."
    return command


for _name, _summary, _each in (
    ("prompts", "Read, clean and draw the training and evaluation prompts", False),
    ("generate", "Sample responses from the policy with vLLM under Ray Data", True),
    ("judge", "Score the responses 0..5 with the policy or another model", True),
    ("pair", "Pair the best with the worst response of every prompt", True),
    ("sketch", "Count-sketch every pair's gradient on a pool of model replicas", True),
    ("train", "DPO on the kept pairs with Ray Train and DeepSpeed", True),
    ("evaluate", "Compare the trained model with its starting point", True),
    ("report", "Write RUN/report.html", False),
):
    app.command(_name)(_stage_command(_name, _summary, _each))


@app.command()
def select(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="A recipe YAML; see jobs/recipes/.")
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
) -> None:
    """Keep the pairs that agree with the languages' common direction.

    Another direction, score, keep rule or baseline needs seconds on the same sketches:
    --set select.direction=mean --redo. The settings are in the recipe's section `select`.
    """
    if compare is not None:
        show_overlaps(*compare)
        return
    if recipe is None or run is None:
        raise RunDirectoryError("give RECIPE and --run DIR, or --compare DIR1 DIR2; see congrad select --help")
    _perform("select", recipe, run, iteration, profile, set_, redo)


@app.command("filter")
def filter_command(
    preferences: Annotated[str, typer.Argument(metavar="PREFERENCES", help="JSONL, Parquet, or a hub dataset.")],
    model: Annotated[str, typer.Option(help="The model to be trained: a folder or hub name.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where selected.parquet and the rest go.")],
    keep: Annotated[float, typer.Option(help="Top fraction kept per language.")] = 0.5,
    select: Annotated[
        list[str] | None,
        typer.Option(metavar="a=b", help="How to select: direction=mean, score=dot, leave_out=language, ..."),
    ] = None,
    beta: Annotated[float, typer.Option(help="DPO's beta of the training to come.")] = 0.1,
    length_penalty: Annotated[float, typer.Option(help="Alpha of R-DPO, per token.")] = 0.0,
    width: Annotated[int, typer.Option(help="Numbers per sketch.")] = recipes.Sketch().width,
    exact: Annotated[
        bool, typer.Option("--exact", help="Exact gradients: two passes, memory for a gradient per language.")
    ] = False,
    max_length: Annotated[int, typer.Option(help="Tokens of a prompt with one response.")] = 2048,
    max_tokens_per_batch: Annotated[
        int | None, typer.Option(help="Padded tokens of a micro-batch.", show_default="8192, on a CPU 4096")
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="The model's dtype.")] = "float32",
    chat: Annotated[bool, typer.Option("--chat", help="Take strings as chat messages.")] = False,
    chat_template: Annotated[
        str | None, typer.Option(help="A Jinja file, or the name of one of the model's.")
    ] = None,
    profile: ProfileName = "local",
    redo: Redo = False,
) -> None:
    """Filter a preference dataset: the pairs whose gradients agree across languages.

    PREFERENCES has prompt, chosen and rejected (strings or chat messages, as in TRL) and language.
    """
    from congrad_ray.pipeline.filtering import FilterSettings, run_filter

    where = load_profile(profile)
    log = StreamLog(where.log_format, without_keys(out))
    settings = FilterSettings(
        model=validate(
            recipes.Model,
            {"name": model, "dtype": dtype, "chat_template": chat_template, "max_length": max_length},
            "--model",
        ),
        select=validate(recipes.Select, apply_overrides({"keep": keep}, select or []), "--keep, --select"),
        train=validate(
            recipes.Train, {"beta": beta, "length_penalty": length_penalty}, "--beta, --length-penalty"
        ),
        sketch=validate(
            recipes.Sketch,
            {
                "method": "exact" if exact else "count_sketch",
                "width": width,
                "max_tokens_per_batch": max_tokens_per_batch,
            },
            "--width, --max-tokens-per-batch",
        ),
        chat=chat,
    )
    filtered = run_filter(preferences, out, settings, where, redo, log)
    if where.log_format == "text":
        show_selection(filtered.summary)
    log(f"kept pairs: {without_keys(out).rstrip('/')}/selected.parquet")


@app.command()
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
) -> None:
    """Tokens, FLOPs, memory, time, cost and bytes of every stage, before anything runs.

    Reads the model's configuration and downloads nothing. Exit code 2 if something does not fit, with the setting
    that would mend it.
    """
    from congrad_ray.cli.plan_tables import memory_table, plan_table, size, told_lengths
    from congrad_ray.planning.assumptions import load_assumptions
    from congrad_ray.planning.inputs import known_lengths, read_shapes, where_it_runs
    from congrad_ray.planning.plan import make_plan

    loaded, where = load_recipe(recipe, set_ or []), load_profile(profile)
    assumptions = load_assumptions(assume or [])
    there_is = where_it_runs(loaded, where, assumptions)
    lengths = known_lengths(loaded, assumptions, RunDirectory.open(run) if run else None)
    found = make_plan(loaded, where, read_shapes(loaded), lengths, assumptions, there_is)
    title = f"{loaded.name} on {where.name}: {loaded.iterations} iteration(s) together, predicted"
    console.print(plan_table(found, plain(title)))
    console.print(memory_table(found))
    if found.training_checkpoints:
        console.print(f"While training runs, its two checkpoints take {size(found.training_checkpoints)} besides.")
    console.print(told_lengths(lengths, assumptions), highlight=False)
    console.print(f"There is: {there_is.where}, {there_is.cpus:g} CPUs and {there_is.gpus:g} GPUs for Ray")
    for line in found.advice:
        console.print(plain(line), highlight=False)
    for need in needs(loaded, where):
        check_fits(need, there_is, where.cluster)
    if found.short:
        raise DoesNotFit(f"{', '.join(stage.stage for stage in found.short)}: not enough memory for one replica")
    unknown = any(stage.needed and stage.available is None for stage in found.stages)
    console.print(
        "Every stage fits the CPUs and GPUs; their memory is not known (--assume gpu_memory_gib=80)."
        if unknown
        else "Every stage fits."
    )


@app.command()
def status(run: RunUri, profile: ProfileName = "local") -> None:
    """The stages of a run and how far each is."""
    directory = RunDirectory.open(load_profile(profile).run_uri(run))
    if not directory.exists("recipe.yaml"):
        raise RunDirectoryError(f"{without_keys(run)} holds no run: there is no recipe.yaml in it")
    where = f"{without_keys(run)}/recipe.yaml"
    stored = validate(Recipe, settings_in(directory.read_bytes("recipe.yaml"), where), where)
    show_run(directory, stored)


@app.command()
def doctor(
    run: Annotated[str, typer.Option("--run", metavar="DIR", help="Where runs will be written.")] = ".",
) -> None:
    """Versions, devices and disk; what is missing and the command that mends it. Exit code 1 if something is."""
    from congrad_ray.deploy.doctor import examine

    findings = examine(run)
    table = Table("what", "found", "to mend it")
    for finding in findings:
        table.add_row(finding.what, plain(finding.found), plain(finding.mend) or "[green]ok[/green]")
    console.print(table)
    if any(finding.mend for finding in findings):
        raise typer.Exit(1)


def _of_iteration(stage: str, iteration: int | None) -> int | None:
    """The iteration of a job of this stage; None for one without. Raises RunDirectoryError."""
    from congrad_ray.pipeline.order import STAGES

    if stage != WHOLE_RUN and stage not in STAGES:
        raise RunDirectoryError(f"no such stage: {stage}; there are {', '.join(STAGES)}, and {WHOLE_RUN} for all")
    if stage == WHOLE_RUN or not STAGES[stage].each_iteration:
        if iteration is not None:
            raise RunDirectoryError(f"--iteration {iteration}: {stage} is not done for each iteration")
        return None
    return iteration or 0


@app.command()
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
    """Write the file that starts a cluster of a profile: Ray cluster launcher or KubeRay YAML.

    congrad render aws-spot --out cluster/aws.yaml, then ray up cluster/aws.yaml;
    congrad render kubernetes --what rayjob --recipe my.yaml --run mine, piped into kubectl apply -f -
    """
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
        _log(f"written: {out}")


@app.command()
def submit(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="A stage, or run: all of them in order.")],
    recipe: RecipePath,
    run: RunUri,
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
    """Run a stage as a job on a cluster that is there, and follow its log; the exit code is the job's.

    The repository's folder is sent along, less what .rayignore names, so recipe and profile have to be in it. The
    job itself holds no CPUs and runs on the head. Ctrl-C stops following, not the job.
    """
    from congrad_ray.deploy import submit as submission

    number = _of_iteration(stage, iteration)
    loaded, where = load_recipe(recipe, set_ or []), load_profile(profile)
    if number is not None and number >= loaded.iterations:
        raise RunDirectoryError(f"--iteration {number}: the recipe has iterations 0..{loaded.iterations - 1}")
    run = where.shared_run_uri(run)
    command = submission.entrypoint(stage, recipe, run, profile, number, set_ or [], redo)
    client = submission.connect(address)
    job = submission.send(client, command)
    try:
        _log(f"job {job} on {address}: {without_keys(command)}")
        code = submission.follow(client, job, lambda text: typer.echo(printable(text, lines=True), nl=False))
    except KeyboardInterrupt:
        raise submission.StillRunning(f"\nThe job goes on. {submission.again(client, job)}") from None
    raise typer.Exit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command. Exit codes: 0 done, 1 failed, 2 wrong input or settings, 130 interrupted (goes on later)."""
    stopped: list[int] = []

    def stop(signal_number: int, frame: Any) -> None:
        stopped.append(signal_number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        app(list(arguments) if arguments is not None else None)
    except StageStopped as error:
        typer.echo(f"error: {printable(error, lines=True)}", err=True)
        sys.exit(1)
    except StillRunning as told:
        typer.echo(printable(told, lines=True), err=True)
        sys.exit(130)
    except BaseException as error:
        # A KeyboardInterrupt in the middle of Ray's own code may come out as another error.
        if stopped or (isinstance(error, SystemExit) and error.code == 130):
            typer.echo("interrupted; the same command goes on from here", err=True)
            sys.exit(130)
        if not isinstance(error, ValueError):
            raise
        # Ray wraps what a worker raised; its cause is the error that says what to do.
        typer.echo(f"error: {printable(getattr(error, 'cause', None) or error, lines=True)}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
