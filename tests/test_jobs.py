"""A stage as a submitted job: `ray job submit` against a head started for the test."""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def dashboard(ray_head: Callable[[Path, int], AbstractContextManager[str]], tmp_path: Path) -> Iterator[str]:
    with ray_head(tmp_path, 3) as address:
        yield address


def test_filter_as_a_submitted_job(
    dashboard: str, tiny_model: Path, tmp_path: Path, ray_command: str, ray_environment: dict[str, str]
) -> None:
    rows = [
        {"prompt": f"Count {n}", "chosen": f"{n} {n + 1}", "rejected": "The dog", "language": ("en", "de")[n % 2]}
        for n in range(20)
    ]
    preferences = tmp_path / "preferences.jsonl"
    preferences.write_text("\n".join(map(json.dumps, rows)))
    submit = [
        *(ray_command, "job", "submit", "--address", dashboard, "--working-dir", str(ROOT), "--"),
        *("python", "jobs/filter.py", str(preferences), "--model", str(tiny_model), "--chat"),
        *("--out", str(tmp_path / "out"), "--width", "256", "--max-length", "128"),
    ]
    job = subprocess.run(submit, env=ray_environment, timeout=300, capture_output=True, text=True, check=False)
    assert job.returncode == 0, job.stdout + job.stderr
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["per_language"]["en"]["kept"] == 5
    failed = subprocess.run(
        [*submit[:-6], "--out", str(tmp_path / "other"), "--keep", "7"],
        env=ray_environment,
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode != 0 and "keep: Input should be less than or equal to 1" in failed.stdout
