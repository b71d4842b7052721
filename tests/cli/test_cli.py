"""The commands as a user types them: help, plan, doctor, status, and errors that say what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from congrad_ray.data.tables import table_of
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.select.schema import SCORES

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "jobs" / "recipes" / "demo.yaml"


def congrad(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "congrad_ray", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "140"},
        timeout=120,
        check=False,
    )


def test_help_names_every_verb() -> None:
    result = congrad("--help")
    assert result.returncode == 0
    verbs = "run prompts generate judge pair sketch select train evaluate report filter plan status doctor"
    for verb in verbs.split():
        assert verb in result.stdout
        assert (ROOT / "jobs" / f"run_{'all' if verb == 'run' else verb}.py").exists() or verb in (
            "status",
            "doctor",
        )


def test_plan_shows_the_stages_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    result = congrad("plan", DEMO)
    assert result.returncode == 0, result.stderr
    assert "Every stage fits" in result.stdout and "sketch tables" in result.stdout
    profile = tmp_path / "small.yaml"
    profile.write_text("name: small\nlocal_cpus: 2\nengines: {cpus: 2}\n")
    result = congrad("plan", DEMO, "--profile", profile)
    assert result.returncode == 2
    assert "generate" in result.stderr and "at least 3 CPUs, there are 2" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", DEMO, "--run", "RUN", "--set", "train.betta=1"], "train.betta: no such setting"),
        (["run", DEMO, "--run", "RUN", "--until", "trian"], "--until trian: no such stage"),
        (["run", "nowhere.yaml", "--run", "RUN"], "nowhere.yaml"),
        (["run", DEMO, "--run", "RUN", "--profile", "nowhere"], "no profile 'nowhere'"),
        (["select", DEMO, "--run", "RUN"], "select needs iteration-0/pairs"),
        (["select", DEMO, "--run", "RUN", "--iteration", 7], "iterations 0..0"),
        (["select"], "give RECIPE and --run DIR, or --compare DIR1 DIR2"),
        (["select", "--compare", "RUN", "RUN"], "no scores.parquet in"),
        (
            ["select", DEMO, "--run", "RUN", "--set", "select.direction=x"],
            "direction: Input should be 'pcgrad'",
        ),
        (["select", DEMO, "--run", "RUN", "--set", "select.per_block=true"], "needs sketch.groups above 1"),
        (["select", DEMO, "--run", "RUN", "--set", "select.keep_rule=token_budget"], "needs token_budget"),
        (["status", "--run", "RUN"], "holds no run"),
        (["filter", "nowhere.jsonl", "--model", "x", "--out", "RUN"], "no file nowhere.jsonl"),
        (["filter", ROOT, "--model", "x", "--out", "RUN"], "is a folder"),
        (
            ["filter", "nowhere.jsonl", "--model", "x", "--out", "RUN", "--keep", "1.5"],
            "keep: Input should be less",
        ),
        (["filter", "x.jsonl", "--model", "x", "--out", "RUN", "--select", "scor=dot"], "scor: no such setting"),
    ],
)
def test_wrong_input_is_one_clear_line_and_exit_code_2(tmp_path: Path, arguments: list[object], told: str) -> None:
    result = congrad(*[tmp_path / "run" if a == "RUN" else a for a in arguments])
    assert result.returncode == 2
    assert told in result.stderr
    assert "Traceback" not in result.stderr


def test_doctor_finds_what_was_tried() -> None:
    result = congrad("doctor")
    assert "ray" in result.stdout and "2.60.0" in result.stdout
    assert "missing" not in result.stdout


def test_two_selections_are_compared_by_language(tmp_path: Path) -> None:
    rows = [(f"p{n}", "de" if n < 6 else "hi") for n in range(10)]
    for name, offset in (("one", 0), ("two", 2)):
        scores = [
            {
                "pair_id": pair_id,
                "language": language,
                **{column: float((n + offset) % 10) for column in ("score", "cosine", "dot")},
                **{column: 0.0 for column in ("worst_cosine", "own_cosine")},
                "kept": (n + offset) % 10 >= 5,
            }
            for n, (pair_id, language) in enumerate(rows[: 10 if name == "one" else 9])
        ]
        RunDirectory.open(tmp_path / name).write_table("scores.parquet", table_of(scores, SCORES))
    result = congrad("select", "--compare", tmp_path / "one", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    lines = {line.split()[1]: line.split() for line in result.stdout.splitlines() if line.startswith("│")}
    # Of p0..p8 the first keeps 5..8, the second 3..7.
    assert lines["all"][3:10:2] == ["9", "4", "5", "3"]
    assert lines["de"][3:10:2] == ["6", "1", "3", "1"]
    assert "only in 1: 1 pairs, only in 2: 0 pairs" in result.stdout
