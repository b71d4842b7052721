"""Commands run in this process, as `congrad` runs them: a process of its own for each would take seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from congrad_ray.cli.display import console
from congrad_ray.cli.main import main
from congrad_ray.cli.options import screen


@dataclass(frozen=True)
class Ended:
    """What a command left: its exit code, and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def congrad(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Ended]]:
    """Runs a command to its end on a screen of 140 columns."""
    monkeypatch.setattr("signal.signal", lambda number, handler: None)  # pytest's own stay
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(console, "_width", 140)

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        written = capsys.readouterr()
        code = end.value.code
        return Ended(code if isinstance(code, int) else 0, written.out, written.err)

    yield run
    screen.json = False
