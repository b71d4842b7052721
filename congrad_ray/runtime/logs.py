"""How log records look: lines for a person on a terminal, or JSON for what collects a cluster's logs.

Every module logs with `logging.getLogger(__name__)`: progress and results at INFO, warnings at WARNING. Nothing is
shown of it until `configure` is called, as the commands and the functions of `congrad_ray` do; these leave it to a
program's own handlers where there are any.
"""

from __future__ import annotations

import contextvars
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from congrad_ray.config.printable import BAR, printable

_about: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("what records are about", default={})  # noqa: B039


@contextmanager
def about(run: str, stage: str, iteration: int | None) -> Iterator[None]:
    """What is logged in the body is about this stage of this run."""
    token = _about.set({"run": run, "stage": stage, "iteration": iteration})
    try:
        yield
    finally:
        _about.reset(token)
        for handler in _screens():
            handler.end_bar()


def inherited(target: Callable[..., None]) -> Callable[..., None]:
    """`target` for a new thread, whose records are about what those of this thread are about."""
    context = contextvars.copy_context()
    return lambda *arguments: context.run(target, *arguments)


def stage_label(stage: str, iteration: int | None) -> str:
    """How a stage is named on the screen."""
    return stage if iteration is None else f"{stage} (iteration {iteration})"


class TextFormatter(logging.Formatter):
    """`HH:MM:SS  stage: message`; control characters of the message are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        found = _about.get()
        label = f"{stage_label(found['stage'], found['iteration'])}: " if found else ""
        level = "warning: " if record.levelno >= logging.WARNING else ""
        text = f"{time.strftime('%H:%M:%S')}  {label}{level}{printable(record.getMessage(), lines=True)}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, run, stage and iteration as far as they are known, and message."""

    def __init__(self, run: str | None = None) -> None:
        super().__init__()
        self._run = run

    def format(self, record: logging.LogRecord) -> str:
        fields = {"run": self._run, **_about.get()}
        values: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "level": record.levelname.lower(),
            **{name: value for name, value in fields.items() if value is not None},
            "message": record.getMessage(),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values)


class _Screen(logging.Handler):
    """Writes to whatever standard output (or error) is at the time; on a terminal progress is a bar."""

    def __init__(self, errors: bool, bars: bool) -> None:
        super().__init__()
        self._errors, self._bars = errors, bars
        self._bar: Any = None  # a rich.progress.Progress while there is one on the screen

    def emit(self, record: logging.LogRecord) -> None:
        try:
            bar = getattr(record, "bar", None)
            if bar and self._bars and bar[0] < bar[1]:
                self._move(record, *bar)
                return
            if bar:
                self.end_bar()
            stream = sys.stderr if self._errors else sys.stdout
            stream.write(f"{self.format(record)}\n")
            stream.flush()
        except Exception:
            self.handleError(record)

    def _move(self, record: logging.LogRecord, done: int, total: int) -> None:
        label = self.format(record).partition("  ")[2]  # without the time
        if self._bar is None:
            from rich.progress import BarColumn, Progress, TextColumn

            text = TextColumn("{task.description}", markup=False)
            # It redirects standard output as long as it is there: lines come above it.
            self._bar = Progress(BarColumn(20), text, transient=True)
            self._bar.add_task(label, total=total, completed=done)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=label)

    def end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def close(self) -> None:
        self.end_bar()
        super().close()


def quieten_libraries() -> None:
    """Keeps off the screen what libraries say of themselves there, which a user can do nothing about."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore", FutureWarning)
    # A Ray of one's own, which ends with the command, has a token that nobody needs to know of.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    # Filters, since these libraries set their loggers' levels when they are imported or started. DeepSpeed says
    # that there is no GPU; Ray Data's LLM processors connect to the Ray that is connected, and look for a mirror.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    for name in ("ray._private.worker", "ray.llm._internal.common.utils.download_utils"):
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.WARNING)


def _screens() -> list[_Screen]:
    handlers = logging.getLogger("congrad_ray").handlers
    return [handler for handler in handlers if isinstance(handler, _Screen)]


def configure(
    format: Literal["text", "json"] = "text",
    level: int = logging.INFO,
    run: str | None = None,
    errors: bool = False,
) -> None:
    """Shows the package's records on standard output; once more replaces what an earlier call asked for.

    The root logger stays as it is. `run`: the run directory, a field of every line of JSON. `errors`: on
    standard error instead. On a terminal progress is a bar, elsewhere a line now and then.
    """
    bars = format == "text" and level <= logging.INFO and not errors and sys.stdout.isatty()
    handler = _Screen(errors, bars)
    handler.setFormatter(TextFormatter() if format == "text" else JsonFormatter(run))
    logger = logging.getLogger("congrad_ray")
    for known in _screens():
        known.close()
        logger.removeHandler(known)
    logger.addHandler(handler)
    logger.setLevel(min(level, BAR) if bars else level)
    logger.propagate = False  # what configures the root logger would show every line twice


def configure_unless_handled(format: Literal["text", "json"] = "text", run: str | None = None) -> None:
    """Shows the package's records as `configure` does, where nothing handles them yet."""
    if not logging.getLogger("congrad_ray").hasHandlers():
        configure(format, run=run)
