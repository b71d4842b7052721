"""Jobs on a cluster that grows from no nodes and loses some: `tests/autoscaling.py`, and what it saw."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "autoscaling.py"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_stage_and_the_loop_as_jobs_from_no_nodes_to_all_and_back(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--run", str(tmp_path / "run"), "--results", str(results)],
        capture_output=True,
        text=True,
        timeout=3500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records: list[dict[str, Any]] = [json.loads(line) for line in results.read_text().splitlines()]
    jobs = [record["job"] for record in records if record["event"] == "job"]
    assert len(jobs) == 9 + 1 + 4 and all(record.get("code", 0) == 0 for record in records)
    nodes = [record["nodes"] for record in records if record["event"] == "nodes"]
    assert nodes[0] == 0 and max(nodes) == 3 and 0 in nodes[nodes.index(3) :]
    assert sum(record["event"] == "kill" for record in records) == 2
    compared = [record for record in records if record["event"] == "compare"]
    assert {record["table"] for record in compared} == {"sketches", "scores", "selected"}
    assert not any(record["lost"] or record["doubled"] or record["differing"] for record in compared)
