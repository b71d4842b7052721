"""Real models and real text, where a machine has them or a tool beside the checkout that makes them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.cluster import kill, left_over

Row = dict[str, Any]
Prepare = Callable[[str], Path]
Rows = Callable[[str, str, int], list[Row]]

MODELS = Path(os.environ.get("CONGRAD_REAL_MODELS", "~/.cache/congrad_ray/real")).expanduser()


@pytest.fixture(scope="session")
def real_model(shared: Path) -> Prepare:
    """The folder of a model by its name: smollm2 or gemma3-270m. It is made where it is missing."""

    def prepare(name: str) -> Path:
        folder, tool = MODELS / name, shared / "tools" / "real_models.py"
        if not ((folder / "config.json").exists() and (folder / "model.safetensors").exists()):
            if not tool.exists():
                pytest.skip(
                    f"no model in {folder} (CONGRAD_REAL_MODELS), and no {tool} (CONGRAD_SHARED) to make it"
                )
            made = subprocess.run(
                [sys.executable, str(tool), name, str(folder)], capture_output=True, text=True, check=False
            )
            assert made.returncode == 0, made.stdout + made.stderr
        return folder

    return prepare


@pytest.fixture(scope="session")
def gemma_template(shared: Path) -> Path:
    """A chat template for the base model, which has none."""
    path = shared / "tools" / "gemma_chat_template.jinja"
    if not path.exists():
        pytest.skip(f"no {path} (CONGRAD_SHARED)")
    return path


@pytest.fixture(scope="session")
def short_rows(shared_data: Path) -> Rows:
    """So many rows of a file in a language: those with the fewest characters, the shortest first."""

    def rows(file: str, language: str, count: int) -> list[Row]:
        found = [json.loads(line) for line in (shared_data / file).read_text().splitlines()]
        found = [row for row in found if row["language"] == language]
        found.sort(key=lambda row: sum(len(row.get(name, "")) for name in ("prompt", "chosen", "rejected")))
        return found[:count]

    return rows


@pytest.fixture
def own_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Commands started in the test have a Ray in a folder of its own; what is left of it at the end is killed."""
    # Ray's sockets lie there, and the path of a socket may have 107 characters.
    folder = tempfile.mkdtemp(prefix="real-")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    try:
        yield folder
    finally:
        for process in left_over(folder):
            kill(process)
        shutil.rmtree(folder, ignore_errors=True)
