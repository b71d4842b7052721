"""The page in a real browser, where there is one: every chart is drawn, and nothing is fetched or refused."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.pipeline.order import LAST
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.context import Context
from pages import ATTACK

BROWSER = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_every_chart_is_drawn_and_nothing_else_runs(
    tmp_path: Path, make_run: Callable[..., tuple[RunDirectory, Recipe]]
) -> None:
    texts = {"en": (ATTACK, ATTACK + " good", ATTACK + " bad"), "de": ("Frage", "gut", "schlecht")}
    run, recipe = make_run(tmp_path / "run", texts=texts)
    LAST[-1].run(Context(recipe, Profile(name="test"), run, 0, run.stage("report", None)))
    command = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--enable-logging=stderr",
        "--virtual-time-budget=20000",
        "--dump-dom",
        f"file://{run.path}/report.html",
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    page = re.sub(r"<script.*?</script>", "", found.stdout, flags=re.DOTALL)
    # Those of charts are marked; a refusal and an error would be in the console.
    places = len(re.findall(r'<div class="chart[ "]', page))
    assert places > 8
    assert page.count("<svg") == places
    console = [line for line in found.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    assert "25 of" not in page and "54 of 54 pairs" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
