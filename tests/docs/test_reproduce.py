"""docs/how-to/reproduce-the-paper.md: its commands work, its figures are the plan's, its settings the recipes'."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import Ended
from compare_strategies import STRATEGIES, parser
from congrad_ray.config.profile import load_profile
from congrad_ray.config.recipe import load_recipe
from congrad_ray.pipeline.order import STAGES

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "how-to" / "reproduce-the-paper.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    for line in block.replace("\\\n", " ").splitlines()
]
MODELS = {"Llama-3-8B": "llama3-8b", "Gemma-2-2B": "gemma2-2b"}


@pytest.mark.parametrize("model", MODELS)
def test_the_plan_says_what_the_page_says(
    congrad: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """With the model's configuration from a folder: there is no hub here."""
    monkeypatch.chdir(ROOT)
    (words,) = (words for words in COMMANDS if words[:2] == ["congrad", "plan"])
    shown = words[1:]
    shown[1] = f"jobs/recipes/{MODELS[model]}.yaml"
    ended = congrad(*shown, "--set", f"model.name=tests/planning/configs/{MODELS[model]}", "--json")
    assert ended.code == 0, ended.err
    plan = json.loads(ended.out)
    (row,) = re.findall(rf"^\| {model}, `node-8gpu`, H100 \|(.*)\|$", TEXT, re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")]
    amount, unit = cells[6].split()
    seconds, half = {"h": (3600, 0.05), "min": (60, 0.5)}[unit]
    assert float(amount) == pytest.approx(plan["seconds"] / seconds, abs=half)
    assert float(cells[7].removeprefix("$")) == pytest.approx(plan["dollars"], abs=0.5)
    (sketch,) = (stage for stage in plan["stages"] if stage["stage"] == "sketch")
    assert f"{sketch['needed']['peak'] / 2**30:.1f} / 79 GiB" == cells[8]


def test_the_scripts_arguments_are_right() -> None:
    found = [words for words in COMMANDS if "jobs/compare_strategies.py" in words]
    assert len(found) >= 5
    for words in found:
        given = parser().parse_args(words[words.index("jobs/compare_strategies.py") + 1 :])
        load_profile(given.profile)
        assert given.until is None or given.until in STAGES
        for name in given.strategies:
            recipe = load_recipe(ROOT / given.recipe, [*given.set, *STRATEGIES[name]])
            assert len(recipe.prompts.languages) == 10


def test_the_strategies_are_the_scripts() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", TEXT[TEXT.index("## What to compare") :], re.MULTILINE)
    named = dict(rows[: len(STRATEGIES)])
    assert list(named) == list(STRATEGIES)
    for name, settings in named.items():
        given = re.findall(r"`(select\.[^`]+)`", settings)
        recipes = [load_recipe(ROOT / "jobs/recipes/llama3-8b.yaml", more) for more in (given, STRATEGIES[name])]
        assert recipes[0] == recipes[1], name


@pytest.mark.parametrize("recipe", MODELS.values())
def test_the_settings_are_the_recipes(recipe: str) -> None:
    loaded = load_recipe(ROOT / "jobs" / "recipes" / f"{recipe}.yaml")
    rows = re.findall(r"^\| `([a-z_.]+)` \| ([^|]*?) \|", TEXT[TEXT.index("## What is not known") :], re.MULTILINE)
    assert len(rows) == 15
    for name, text in rows:
        value: object = loaded
        for part in name.split("."):
            value = getattr(value, part)
        shown = ", ".join(value) if isinstance(value, list) else str(value)
        assert shown == text or (isinstance(value, float) and value == float(text)), name
