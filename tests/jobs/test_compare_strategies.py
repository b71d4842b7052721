"""Several strategies from one run's sketches: they are copied, not made again, and the originals stay."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compare_strategies import STRATEGIES, branch, compare, gather
from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe, load_recipe
from congrad_ray.pipeline.loop import run_all
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError
from heads import connect_shared

OLD = Path(__file__).resolve().parents[1] / "pipeline" / "old-run"
RECIPES = Path(__file__).resolve().parents[2] / "jobs" / "recipes"
HERE = Profile(name="test")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A folder whose run `shared` is done up to its sketches."""
    monkeypatch.chdir(shutil.copytree(OLD, tmp_path / "old"))
    shutil.move("run", "runs/shared")
    run_all(load_recipe("recipe.yaml"), HERE, RunDirectory.open("runs/shared"), until="baseline")
    for folder in ("selection", "policy", "evaluation"):
        shutil.rmtree(f"runs/shared/iteration-0/{folder}")
    return RunDirectory.open("runs")


def contents(folder: str) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_strategies_select_from_the_same_sketches(root: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    connect_shared()
    before = contents("runs/shared")
    compare(Path("recipe.yaml"), root, HERE, ["random", "consensus"], until="select")
    shared = contents("runs/shared")
    assert {name: data for name, data in shared.items() if "recipe" not in name} == {
        name: data for name, data in before.items() if "recipe" not in name
    }
    for name in ("random", "consensus"):
        made = contents(f"runs/{name}")
        assert {key: made[key] for key in shared if "sketches/" in key or "responses/" in key} == {
            key: data for key, data in shared.items() if "sketches/" in key or "responses/" in key
        }
        summary = RunDirectory.open(f"runs/{name}").stage("selection", 0).read_json("summary.json")
        settings = summary["settings"]
        chosen = {f"select.{key}={settings[key]}" for key in ("strategy", "direction", "keep_rule")}
        assert chosen >= set(STRATEGIES[name])
    assert sum("starting" in record.getMessage() for record in caplog.records) == 2, "only the selections"
    compare(Path("recipe.yaml"), root, HERE, ["random", "consensus"], until="select")
    assert sum("starting" in record.getMessage() for record in caplog.records) == 2, "a second time nothing"
    with pytest.raises(RunDirectoryError, match=r"select\.keep: "):
        compare(Path("recipe.yaml"), root, HERE, ["random"], ["select.keep=0.9"], until="select")


def test_a_copy_that_was_cut_off_is_made_again(root: RunDirectory) -> None:
    shared, run = (RunDirectory.open(f"runs/{name}") for name in ("shared", "random"))
    branch(shared, run)
    whole = contents("runs/random")
    assert whole == contents("runs/shared")
    Path("runs/random/iteration-0/sketches/summary.json").unlink()
    branch(shared, run)
    assert contents("runs/random") == whole


def test_tables_stand_side_by_side(tmp_path: Path) -> None:
    for name, text in (("all", "language,change\nde,-0.5\n"), ("random", "language,change,more\nde,0.1,x\n")):
        folder = tmp_path / name / "report" / "tables"
        folder.mkdir(parents=True)
        (folder / "benchmarks.csv").write_text(text)
    gather(RunDirectory.open(tmp_path), ["all", "random", "congrad"])
    assert (tmp_path / "tables" / "benchmarks.csv").read_text() == (
        "strategy,language,change,more\nall,de,-0.5,\nrandom,de,0.1,x\n"
    )


@pytest.mark.parametrize("recipe", ["llama3-8b", "gemma2-2b"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_one_of_the_papers_recipes(recipe: str, name: str) -> None:
    changed = load_recipe(RECIPES / f"{recipe}.yaml", STRATEGIES[name])
    assert isinstance(changed, Recipe) and len(changed.prompts.languages) == 10
    plain = load_recipe(RECIPES / f"{recipe}.yaml")
    assert (changed.select == plain.select) == (name == "congrad"), "the recipe's own is the paper's"
