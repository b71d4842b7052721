"""A small study from beginning to end, with every real engine, and again after a kill."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from congrad_ray.world.model import world_model

ROOT = Path(__file__).resolve().parents[3]


def protocol(model: Path) -> dict[str, Any]:
    block = {"seeds": [1], "variants": ["plain", "few"], "keeps": [0.5], "learning_rates": [1e-4]}
    return {
        "recipe": {
            "name": "study",
            "model": {"name": str(model), "dtype": "float32", "max_length": 256},
            "prompts": {
                "languages": ["en", "de"],
                "unseen_languages": ["it"],
                "train_per_language": 12,
                "evaluation_per_language": 1,
            },
            "generate": {"max_tokens": 24, "temperature": 1.0},
            "judge": {"rubric": "builtin-world", "method": "expected_score", "min_probability_mass": 0.0},
            "pair": {"truncated": "keep"},
            "sketch": {"width": 16384, "groups": 4, "audit_pairs": 0},
            "train": {"batch_size": 4, "max_steps": 3, "zero_stage": 0},
            "evaluate": {"max_tokens": 24},
        },
        "held_out_kinds": ["minus", "reverse"],
        "evaluation": {"prompts_per_language": 6, "held_out_prompts_per_language": 4, "max_tokens": 24},
        "variants": {"plain": {}, "few": {"pairs": {"de": 3}}},
        "strategies": {
            "all": {"strategy": "all"},
            "congrad": {"per_block": True},
            "mean": {"strategy": "no_surgery"},
            "oracle": "oracle",
        },
        "tuning": {**block, "seeds": [9], "strategies": ["all"]},
        "blocks": [
            {**block, "strategies": ["all", "congrad", "oracle"]},
            {**block, "variants": ["plain"], "strategies": ["mean"], "iterations": 2},
        ],
        "exact": {"seeds": [1], "variants": ["plain"]},
    }


@pytest.mark.slow
def test_a_study_runs_goes_on_and_reports(tmp_path: Path) -> None:
    model = world_model(0, tmp_path / "world", 100_000)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(protocol(model)))
    results, report = tmp_path / "results.jsonl", tmp_path / "report.html"
    command = [
        *(sys.executable, str(ROOT / "jobs" / "run_study.py"), str(tmp_path / "study.yaml")),
        *("--run", str(tmp_path / "run"), "--results", str(results), "--report", str(report)),
    ]
    first = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    trained = {(row["variant"], row["strategy"]): row for row in rows if row["kind"] == "cell"}
    assert len(trained) == 8  # a start, three strategies in two variants, and one of two iterations
    assert trained["plain", "mean"]["iterations"] == 2 and trained["plain", "mean"]["steps"] == 3
    for row in trained.values():
        assert all(0.0 <= row[name] <= 1.0 for name in ("seen", "unseen", "held_out", "held_out_unseen"))
        assert set(row["by_language"]) == {"en", "de", "it"}
    whole, half = trained["plain", "all"], trained["plain", "congrad"]
    assert whole["steps"] == half["steps"] == 3 and half["kept"] < whole["kept"] == whole["pairs"]
    assert trained["few", "all"]["pairs"] < whole["pairs"]
    assert whole["seen"] != trained["", "start"]["seen"], "training changed the model"
    assert "congrad" in report.read_text()

    # A kill that cut off the last two lines costs those two, and nothing else is done again.
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:-2]) + "\n" + lines[-1][:20])
    again = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    after = [json.loads(line) for line in results.read_text().splitlines()]
    assert after[: len(lines) - 2] == rows[:-2] and len(after) == len(rows)
    known = {name: value for name, value in rows[-2].items() if name != "seconds"}
    assert any(known == {n: v for n, v in row.items() if n != "seconds"} for row in after), "the same numbers"
    assert "starting: sample responses" not in again.stdout

    exact = subprocess.run([*command, "--exact"], capture_output=True, text=True, timeout=900, check=False)
    assert exact.returncode == 0, exact.stdout + exact.stderr
    last = json.loads(results.read_text().splitlines()[-1])
    assert (last["kind"], last["strategy"]) == ("exact", "mean")
    assert last["rank_correlation"] > 0.9
