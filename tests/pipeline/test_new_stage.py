"""The stage of docs/how-to/add-a-stage.md: run on an old run directory, and shown in status, plan and report."""

import re
import shutil
import types
from pathlib import Path

import pytest

from congrad_ray.cli import display
from congrad_ray.config.profile import load_profile
from congrad_ray.config.recipe import recipe_of_run
from congrad_ray.modeling.shape import read_shape
from congrad_ray.pipeline import order
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.estimate import Planned
from congrad_ray.planning.plan import make_plan
from congrad_ray.planning.shapes import Shapes
from congrad_ray.planning.volume import assumed_lengths, pairs_of
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.context import Context
from congrad_ray.runtime.resources import Machine
from congrad_ray.stages.base import Stage
from congrad_ray.stages.report.stage import report_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how-to" / "add-a-stage.md"


@pytest.fixture
def stage() -> Stage:
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    module = types.ModuleType("lengths")
    exec(compile(block[1], str(PAGE), "exec"), module.__dict__)
    found: Stage = module.STAGE
    return found


def test_it_runs_and_is_shown(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "tests" / "pipeline" / "old-run" / "run", tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    recipe = recipe_of_run(run.read_bytes("recipe.yaml"), "recipe.yaml")
    profile = load_profile("local")
    assert run_stage(stage, recipe, profile, run).rows == 8
    table = run.stage("lengths", 0).read_table()
    assert table.schema.names == ["pair_id", "language", "characters"]
    assert min(table["characters"].to_pylist()) > 0

    iterated = [*order.ITERATED[:3], stage, *order.ITERATED[3:]]
    monkeypatch.setattr(order, "ITERATED", iterated)
    display.show_run(run, recipe)
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("lengths")).split()[2:4] == ["done", "8"]

    shape = read_shape("builtin-world", recipe.model)
    lengths = assumed_lengths(recipe, Assumptions())
    planned = Planned(recipe, profile, Shapes(shape, shape, shape), lengths, Assumptions())
    plan = make_plan([*order.FIRST, *iterated], planned, Machine(8, 0, 24, "here"))
    row = next(row for row in plan.stages if row.stage == "lengths")
    assert row.rows == recipe.iterations * pairs_of(recipe, lengths)
    assert row.stored > 0

    report_of([*order.FIRST, *iterated]).run(Context(recipe, profile, run, 0, run.stage("report", None)))
    assert "measured<small>of pairs</small>" in run.read_bytes("report.html").decode()
