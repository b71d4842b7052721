"""The front door: `congrad <verb>`."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from congrad_ray.cli import cluster, filtering, loop, setup, stages
from congrad_ray.cli.options import FAILED, INTERRUPTED, REFUSED, screen
from congrad_ray.config.printable import printable
from congrad_ray.runtime.logs import configure, quieten_libraries

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="congrad",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (loop, stages, filtering, setup, cluster):  # the order of the help
    app.add_typer(part.app)


def _version(wanted: bool) -> None:
    if wanted:
        from congrad_ray import __version__

        typer.echo(f"congrad {__version__}")
        raise typer.Exit


@app.callback(
    epilog="[bold]Start here[/bold]\n\n  $ congrad init my.yaml\n\n  $ congrad plan my.yaml\n\n"
    "  $ congrad run my.yaml --run runs/first\n\nOnly filter preferences that you have: congrad filter --help"
)
def options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and errors only.")] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Show more: lines of Ray and vLLM, tracebacks of errors."),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Conflicting gradient filtering for multilingual preference alignment, on Ray.

    A recipe says what to do, a profile says where, and a run directory holds every stage's result. Any command can
    be stopped and given again: it resumes where it was.
    """
    screen.json = False
    screen.level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    configure(level=screen.level)
    if not verbose:
        quieten_libraries()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and ends with one of `options.EXIT_CODES`."""
    from congrad_ray.deploy.submit import StillRunning
    from congrad_ray.runtime.interrupts import StageStopped

    stopped: list[int] = []

    def stop(signal_number: int, frame: Any) -> None:
        stopped.append(signal_number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        app(list(arguments) if arguments is not None else None, prog_name="congrad")
    except StageStopped as error:
        _refuse(error, FAILED)
    except StillRunning as left:
        typer.echo(printable(left, lines=True), err=True)
        sys.exit(INTERRUPTED)
    except BaseException as error:
        # A KeyboardInterrupt in the middle of Ray's own code may come out as another error.
        if stopped or (isinstance(error, SystemExit) and error.code == INTERRUPTED):
            typer.echo("interrupted; the same command resumes from here", err=True)
            sys.exit(INTERRUPTED)
        if not isinstance(error, ValueError):
            raise
        _refuse(error, REFUSED)


def _refuse(error: ValueError, code: int) -> None:
    """Says what is wrong, in red on a terminal, and ends with the exit code."""
    if screen.verbose:
        logger.debug("the error in full:", exc_info=error)
    # Ray wraps what a worker raised; its cause is the error that says what to do.
    text = printable(getattr(error, "cause", None) or error, lines=True)
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {text}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
