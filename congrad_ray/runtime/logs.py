"""Lines of progress: for a person on a terminal, or as JSON for what collects a cluster's logs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from congrad_ray.config.printable import printable

Log = Callable[[str], None]


@dataclass(frozen=True)
class StreamLog:
    """Writes each text to standard output, with the time and, as `json`, with what the text is about."""

    format: Literal["text", "json"] = "text"
    run: str | None = None
    stage: str | None = None
    iteration: int | None = None

    def __call__(self, text: str) -> None:
        sys.stdout.write(f"{self._line(text)}\n")
        sys.stdout.flush()

    def _line(self, text: str) -> str:
        if self.format == "text":
            return f"{time.strftime('%H:%M:%S')}  {printable(text, lines=True)}"
        about = {"run": self.run, "stage": self.stage, "iteration": self.iteration}
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **{name: value for name, value in about.items() if value is not None},
            "message": text,
        }
        return json.dumps(fields)


def about_stage(log: Log, run: str, stage: str, iteration: int | None) -> Log:
    """`log` for what a stage says: the stage is a field of a line of JSON, and the beginning of any other."""
    if isinstance(log, StreamLog) and log.format == "json":
        return replace(log, run=run, stage=stage, iteration=iteration)
    label = stage_label(stage, iteration)
    return lambda text: log(f"{label}: {text}")


def stage_label(stage: str, iteration: int | None) -> str:
    """How a person is told of a stage."""
    return stage if iteration is None else f"{stage} (iteration {iteration})"
