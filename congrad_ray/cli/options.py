"""The options that several commands share, and what the user asked for by those before the command."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from congrad_ray.config.profile import Profile, load_profile
from congrad_ray.runtime.logs import configure

# Groups of commands in the help.
THE_LOOP, STAGES, TOOLS = "The loop", "Stages of the loop, one at a time", "Tools"

WHOLE_RUN = "run"  # in place of a stage's name

FAILED, REFUSED, INTERRUPTED = 1, 2, 130
EXIT_CODES = {
    0: "Done.",
    FAILED: "The work failed or was stopped, or `congrad doctor` found something missing.",
    REFUSED: "Wrong input, settings or arguments, or a plan that does not fit.",
    INTERRUPTED: "Interrupted by Ctrl-C or SIGTERM. What is written is kept; the same command resumes.",
}

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe YAML; congrad init writes one.")]
RunUri = Annotated[
    str, typer.Option("--run", metavar="DIR", help="The run directory: a path or a URI (s3://, gs://).")
]
ProfileName = Annotated[
    str,
    typer.Option("--profile", metavar="P", help="Where to run: a profile YAML, or the name of a built-in one."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=c", help="Override a setting of the recipe; repeat for more."),
]
Redo = Annotated[
    bool, typer.Option("--redo", help="Throw away and redo stages made with other settings or inputs.")
]
Iteration = Annotated[int, typer.Option("--iteration", min=0, metavar="N", help="Which iteration, from 0.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@dataclass
class Screen:
    """What the user asked for with --quiet, --verbose or --json."""

    level: int = logging.INFO
    json: bool = False
    """Standard output is for one JSON object: the log goes to standard error."""

    @property
    def quiet(self) -> bool:
        return self.level > logging.INFO

    @property
    def verbose(self) -> bool:
        return self.level < logging.INFO


screen = Screen()


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  $ {line}" for line in lines)])


def profile_for(name: str, run: str) -> Profile:
    """The profile of this name; from here on the log is shown as it says, and is about `run`."""
    profile = load_profile(name)
    configure(profile.log_format, screen.level, run, errors=screen.json)
    return profile


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))
