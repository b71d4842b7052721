"""A few kills of the fault run: nothing lost, nothing double, what is promised equal to the last bit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KILLS = 8


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_kills_lose_nothing_double_nothing_and_change_nothing_that_is_determined(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    script = Path(__file__).parent / "faultrun.py"
    run = str(tmp_path / "faults")
    arguments = ["--run", run, "--kills", str(KILLS), "--seed", "0", "--results", str(results)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=5300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records: list[dict[str, Any]] = [json.loads(line) for line in results.read_text().splitlines()]
    assert sum(record["event"] == "kill" for record in records) == KILLS
    compared = [record for record in records if record["event"] == "compare"]
    names = {
        "prompts",
        "responses",
        "judgements",
        "pairs",
        "sketches",
        "scores",
        "selected",
        "baseline",
        "answers",
    }
    assert names <= {record["table"] for record in compared}
    assert [(record["table"], record["lost"], record["doubled"]) for record in compared] == [
        (record["table"], 0, 0) for record in compared
    ]
    assert not [record for record in compared if record["promised"] and record["differing"]]
