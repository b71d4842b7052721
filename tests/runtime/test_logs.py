"""What the commands show of log records: lines for a person, or JSON with what each is about."""

from __future__ import annotations

import json
import logging
import re
import threading

import pytest

from congrad_ray.runtime.logs import about, configure, inherited

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
