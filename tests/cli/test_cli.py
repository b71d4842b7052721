"""The commands as a user types them: help, plan, doctor, status, and errors that say what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import Ended
from congrad_ray.config.recipe import Recipe, load_recipe
from congrad_ray.config.settings import parse_yaml, validate
from congrad_ray.config.starter import starter_recipe
from congrad_ray.data.tables import table_of
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.select.schema import SCORES

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "jobs" / "recipes" / "demo.yaml"
OLD = ROOT / "tests" / "pipeline" / "old-run"
_STAGES = "prompts baseline generate judge pair sketch select train benchmark evaluate report"
VERBS = f"run plan status {_STAGES} filter init doctor render submit"

Command = Callable[..., Ended]


def test_help_names_every_verb_in_groups(congrad: Command) -> None:
    result = congrad("--help")
    assert result.code == 0
    for verb in VERBS.split():
        assert f" {verb} " in result.out
        script = f"run_{'all' if verb == 'run' else verb}.py"
        tools = ("status", "doctor", "init", "render", "submit")
        assert (ROOT / "jobs" / script).exists() or verb in tools
    groups = [result.out.index(group) for group in ("The loop", "Stages of the loop", "Tools")]
    assert groups == sorted(groups)


@pytest.mark.parametrize("verb", VERBS.split())
def test_the_help_of_every_verb_has_an_example(congrad: Command, verb: str) -> None:
    result = congrad(verb, "--help")
    assert result.code == 0
    assert f"$ congrad {verb}" in result.out


def test_help_and_status_import_nothing_that_takes_long(tmp_path: Path) -> None:
    script = """
import sys
from congrad_ray.cli.main import main
for command in (["--help"], ["status", "--run", sys.argv[1]], ["--version"]):
    try:
        main(command)
    except SystemExit as end:
        assert not end.code, command
slow = {"torch", "transformers", "ray", "vllm", "scipy", "datasets", "deepspeed", "huggingface_hub"}
print("imported:", sorted(slow & sys.modules.keys()))
"""
    command = [sys.executable, "-c", script, str(OLD / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env={**os.environ})
    assert result.stdout.splitlines()[-1] == "imported: []"
    assert "congrad 0." in result.stdout


def test_plan_shows_the_stages_and_refuses_what_does_not_fit(congrad: Command, tmp_path: Path) -> None:
    result = congrad("plan", DEMO)
    assert result.code == 0, result.err
    assert "Every stage fits" in result.out and "sketch tables" in result.out
    profile = tmp_path / "small.yaml"
    profile.write_text("name: small\nlocal_cpus: 2\nengines: {cpus: 2}\n")
    result = congrad("plan", DEMO, "--profile", profile)
    assert result.code == 2
    assert "baseline" in result.err and "at least 3 CPUs, there are 2" in result.err


def test_json_is_all_that_is_on_standard_output(congrad: Command, tmp_path: Path) -> None:
    plan = json.loads(congrad("plan", DEMO, "--json").out)
    assert plan["fits"] and [stage["stage"] for stage in plan["stages"]][:3] == ["prompts", "baseline", "generate"]
    assert plan["stages"][1]["needed"]["peak"] > 0
    status = json.loads(congrad("status", "--run", OLD / "run", "--json").out)
    assert {stage["state"] for stage in status["stages"]} == {"done"}
    done = _STAGES.replace(" benchmark", "").split()  # the run does not ask for it
    assert [stage["stage"] for stage in status["stages"]] == done
    doctor = json.loads(congrad("doctor", "--json").out)
    assert {"what", "found", "fix"} == doctor["findings"][0].keys() and isinstance(doctor["ok"], bool)
    folder = tmp_path / "old-run"
    shutil.copytree(OLD, folder)
    selection = congrad("select", folder / "recipe.yaml", "--run", folder / "run", "--json")
    assert "done already" in selection.err or selection.code == 2  # a recipe of relative paths
    scores = OLD / "run" / "iteration-0" / "selection"
    overlaps = json.loads(congrad("select", "--compare", scores, scores, "--json").out)
    assert overlaps["only_in"] == [0, 0] and overlaps["languages"][0]["kept_first"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run", DEMO, "--run", "RUN", "--set", "train.betta=1"],
            "train.betta: no such setting (did you mean beta?)",
        ),
        (["run", DEMO, "--run", "RUN", "--set", "trian.beta=1"], "trian: no such setting (did you mean train?)"),
        (["run", DEMO, "--run", "RUN", "--set", "beta=1"], "did you mean train.beta?"),
        (["run", DEMO, "--run", "RUN", "--until", "trian"], "--until trian: no such stage (did you mean train?)"),
        (["run", "nowhere.yaml", "--run", "RUN"], "cannot read recipe nowhere.yaml: no such file"),
        (["run", ROOT, "--run", "RUN"], "it is a folder"),
        (["run", DEMO, "--run", "RUN", "--profile", "locl"], "no profile 'locl' (did you mean local?)"),
        (["run", DEMO, "--run", "RUN", "--profile", "no.yaml"], "cannot read profile no.yaml: no such file"),
        (
            ["run", DEMO, "--run", "RUN", "--set", "model.name=my-modle"],
            "no model my-modle: there is no such folder",
        ),
        (["statsu", "--run", "RUN"], "No such command 'statsu'. Did you mean 'status'?"),
        (["submit", "trian", DEMO, "--run", "RUN"], "no such stage: trian (did you mean train?)"),
        (["select", DEMO, "--run", "RUN"], "select needs iteration-0/pairs"),
        (["select", DEMO, "--run", "RUN", "--iteration", 7], "iterations 0..0"),
        (["select"], "give RECIPE and --run DIR, or --compare DIR1 DIR2"),
        (["select", "--compare", "RUN", "RUN"], "no scores.parquet in"),
        (
            ["select", DEMO, "--run", "RUN", "--set", "select.direction=pcgard"],
            "select.direction: must be 'pcgrad', 'mean'",
        ),
        (["select", DEMO, "--run", "RUN", "--set", "select.per_block=true"], "needs sketch.groups above 1"),
        (["select", DEMO, "--run", "RUN", "--set", "select.keep_rule=token_budget"], "needs token_budget"),
        (["status", "--run", "RUN"], "holds no run"),
        (["filter", "nowhere.jsonl", "--model", "x", "--out", "RUN"], "no file nowhere.jsonl"),
        (["filter", ROOT / "docs" / "how-to", "--model", "x", "--out", "RUN"], "is a folder that has no file"),
        (
            ["filter", "nowhere.jsonl", "--model", "x", "--out", "RUN", "--keep", "1.5"],
            "keep: must be at most 1 (found 1.5)",
        ),
        (["filter", "x.jsonl", "--model", "x", "--out", "RUN", "--select", "scor=dot"], "did you mean score?"),
    ],
)
def test_wrong_input_is_one_clear_line_and_exit_code_2(
    congrad: Command, tmp_path: Path, arguments: list[object], message: str
) -> None:
    result = congrad(*[tmp_path / "run" if a == "RUN" else a for a in arguments])
    assert result.code == 2
    assert message in result.err
    for raw in ("Traceback", "Errno", "Input should", "pydantic"):
        assert raw not in result.err


def test_one_real_process_ends_with_the_exit_code_and_the_message() -> None:
    command = [sys.executable, "-m", "congrad_ray", "run", "nowhere.yaml", "--run", "x"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: cannot read recipe nowhere.yaml: no such file\n" and not result.stdout


def test_verbose_shows_the_error_in_full_and_quiet_only_warnings(congrad: Command, tmp_path: Path) -> None:
    result = congrad("--verbose", "run", "nowhere.yaml", "--run", tmp_path)
    assert result.code == 2 and "Traceback" in result.out and "no such file" in result.err
    assert "written" in congrad("init", tmp_path / "one.yaml").out
    result = congrad("--quiet", "init", tmp_path / "two.yaml")
    assert (result.code, result.out) == (0, "") and (tmp_path / "two.yaml").exists()


def test_init_writes_a_recipe_that_loads_and_overwrites_nothing(congrad: Command, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    assert congrad("init", path, "--schema").code == 0
    assert load_recipe(path).name == "my"
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=my.schema.json\n")
    assert Recipe.model_fields["model"].annotation.model_fields["max_length"].description in text
    schema = json.loads((tmp_path / "my.schema.json").read_text())
    assert "select" in schema["properties"]
    path.write_text("mine")
    refused = congrad("init", path)
    assert refused.code == 2 and "exists: add --force to overwrite" in refused.err
    assert path.read_text() == "mine"
    assert congrad("init", path, "--force").code == 0 and path.read_text() != "mine"
    assert "no such file" in congrad("init", tmp_path / "nowhere" / "my.yaml").err


def test_every_setting_of_a_starter_recipe_loads_with_its_mark_taken_away() -> None:
    text = starter_recipe("x")
    start = text.index("# The model to align.")
    values = parse_yaml("name: x\n" + re.sub(r"(?m)^( *)#(?! )|^( *)#(?=  [a-z_#])", r"\1\2", text[start:]))
    assert validate(Recipe, values, "starter") == validate(Recipe, parse_yaml(text), "starter")
    assert sum(len(section) for section in values.values() if isinstance(section, dict)) > 60


def test_doctor_finds_what_was_tried(congrad: Command) -> None:
    result = congrad("doctor")
    assert "ray" in result.out and "2.60.0" in result.out
    assert "missing" not in result.out


def test_what_changed_is_named(congrad: Command, tmp_path: Path) -> None:
    folder = tmp_path / "old-run"
    shutil.copytree(OLD, folder)
    at = [folder / "recipe.yaml", "--run", folder / "run"]
    result = congrad("select", *at, "--set", "select.direction=mean", "--set", "select.min_pairs=2")
    assert result.code == 2
    assert "select.direction: pcgrad -> mean" in result.err and "select.min_pairs: 1 -> 2" in result.err
    assert "select.keep:" not in result.err and "fingerprint" not in result.err
    result = congrad("train", *at, "--set", "train.beta=0.7")
    assert "train.beta: 0.1 -> 0.7" in result.err
    assert "micro_batch_size" not in result.err  # which is gone since, and changed nothing


def test_two_selections_are_compared_by_language(congrad: Command, tmp_path: Path) -> None:
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
    assert result.code == 0, result.err
    lines = {line.split()[0]: line.split() for line in result.out.splitlines() if line.split()}
    # Of p0..p8 the first keeps 5..8, the second 3..7.
    assert lines["all"][1:5] == ["9", "4", "5", "3"]
    assert lines["de"][1:5] == ["6", "1", "3", "1"]
    assert "only in 1: 1 pairs, only in 2: 0 pairs" in result.out
