"""A stage as a submitted job: `ray job submit` against a head started for the test, and what is seen of it."""

import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from congrad_ray.runtime.metrics import COUNTERS, GAUGES
from heads import Head, ray_head

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "cluster" / "grafana-dashboard.json"
PROFILE = "{name: test, log_format: json}"


@pytest.fixture
def head(ray_environment: dict[str, str], tmp_path: Path) -> Iterator[Head]:
    with ray_head(tmp_path, 3, ray_environment) as started:
        yield started


@pytest.mark.slow
def test_filter_as_a_submitted_job(
    head: Head, tiny_model: Path, tmp_path: Path, ray_command: str, ray_environment: dict[str, str]
) -> None:
    rows = [
        {"prompt": f"Count {n}", "chosen": f"{n} {n + 1}", "rejected": "The dog", "language": ("en", "de")[n % 2]}
        for n in range(20)
    ]
    preferences, profile = tmp_path / "preferences.jsonl", tmp_path / "profile.yaml"
    preferences.write_text("\n".join(map(json.dumps, rows)))
    profile.write_text(PROFILE)
    submit = [
        *(ray_command, "job", "submit", "--address", head.dashboard, "--working-dir", str(ROOT), "--"),
        *("python", "jobs/run_filter.py", str(preferences), "--model", str(tiny_model), "--chat"),
        *("--profile", str(profile), "--width", "256", "--max-length", "128"),
    ]
    out = tmp_path / "out"
    job = run([*submit, "--out", str(out)], ray_environment)
    assert job.returncode == 0, job.stdout + job.stderr
    assert json.loads((out / "summary.json").read_text())["per_language"]["en"]["kept"] == 5
    lines = [json.loads(line) for line in job.stdout.splitlines() if line.startswith('{"time"')]
    assert {line["run"] for line in lines if line.get("stage") == "sketch"} == {f"{out}/work"}, lines
    sketched = [line["message"] for line in lines if line.get("stage") == "sketch" and line["iteration"] == 0]
    assert any(message.startswith("20/20 rows") for message in sketched), lines
    seen = scraped(head.metrics, "ray_congrad_kept_share")
    sketch_rows = [
        value for name, labels, value in seen if name == "ray_congrad_rows_total" and "sketch" in labels
    ]
    assert sketch_rows == [20.0]
    shares = {labels: value for name, labels, value in seen if name == "ray_congrad_kept_share"}
    assert sorted(value for labels, value in shares.items() if 'language="en"' in labels) == [0.5], shares
    failed = run([*submit, "--out", str(tmp_path / "other"), "--keep", "7"], ray_environment)
    assert failed.returncode != 0 and "keep: must be at most 1" in failed.stdout


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    exported = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
    assert {name for text in expressions for name in re.findall(r"ray_congrad_\w+", text)} == exported
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in dashboard["panels"]})


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, timeout=300, capture_output=True, text=True, check=False)


def scraped(url: str, until: str) -> list[tuple[str, str, float]]:
    """The metrics at `url` as (name, labels, value), as soon as one has the name `until`."""
    end = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        found = re.findall(r"^(\w+)\{(.*)\} (\S+)", text, re.MULTILINE)
        if any(name == until for name, _, _ in found):
            return [(name, labels, float(value)) for name, labels, value in found]
        assert time.monotonic() < end, sorted({name for name, _, _ in found})
        time.sleep(1)
