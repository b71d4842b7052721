"""What the commands show of log records: lines for a person, or JSON with what each is about."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading

import pytest

from congrad_ray.runtime.logs import about, configure, configure_unless_handled, inherited
from congrad_ray.runtime.progress import Progress, duration

logger = logging.getLogger("congrad_ray.anything")


def test_lines_have_the_time_the_stage_and_the_level(capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    logger.info("before")
    with about("run", "judge", 1):
        logger.warning("few can be read \x1b[2J")
        thread = threading.Thread(target=inherited(logger.info), args=("from a thread",))
        thread.start()
        thread.join()
    with about("run", "prompts", None):
        logger.info("done")
    logger.debug("a detail")
    lines = [re.sub(r"^\d\d:\d\d:\d\d  ", "", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "before",
        "judge (iteration 1): warning: few can be read \\x1b[2J",
        "judge (iteration 1): from a thread",
        "prompts: done",
    ]


def test_lines_of_json_say_what_they_are_about(capsys: pytest.CaptureFixture[str]) -> None:
    configure("json", run="runs/one")
    logger.info("before")
    with about("runs/one", "judge", 0):
        logger.warning("few")
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first.keys() == {"time", "level", "run", "message"}
    del second["time"]
    assert second == {"level": "warning", "run": "runs/one", "stage": "judge", "iteration": 0, "message": "few"}


def test_once_more_replaces_and_the_root_logger_stays(capsys: pytest.CaptureFixture[str]) -> None:
    root = list(logging.getLogger().handlers)
    configure("json")
    configure(level=logging.WARNING)
    logger.info("not shown")
    logger.warning("shown")
    assert capsys.readouterr().out.count("\n") == 1
    assert logging.getLogger().handlers == root


def test_a_program_that_handles_records_itself_sees_them_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    configure_unless_handled()  # pytest has handlers
    logger.info("handled by the program")
    monkeypatch.setattr(root, "handlers", [])
    for _ in range(2):
        configure_unless_handled()
    logger.info("printed")
    assert [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()] == ["printed"]


def test_progress_is_a_bar_on_a_terminal_and_a_line_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    configure()
    with about("run", "sketch", 0):
        progress = Progress(100)
        progress.add(40)
        logger.info("in between")
        progress.add(30)
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
        assert "━" in shown and "sketch (iteration 0): 40/100 rows" in shown and "in between" in shown
        progress.add(30)
        assert "sketch (iteration 0): 100/100 rows\n" in capsys.readouterr().out
    configure()


def test_a_bar_does_not_outlive_its_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    configure()
    screen = sys.stdout
    with pytest.raises(KeyboardInterrupt), about("run", "sketch", 0):
        Progress(100).add(40)
        assert sys.stdout is not screen  # lines come above the bar
        raise KeyboardInterrupt
    assert sys.stdout is screen


def test_elsewhere_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    Progress(100).add(40)  # too soon for a line
    assert capsys.readouterr().out == ""


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.2, 58, 89, 90, 3599, 4320, 7200, 9086, 300_000)] == [
        "0 s",
        "58 s",
        "89 s",
        "2 min",
        "1 h",
        "1 h 12 min",
        "2 h",
        "2 h 31 min",
        "3 d 11 h",
    ]
