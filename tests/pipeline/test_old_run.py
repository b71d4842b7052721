"""A run directory made before the package had its present folders is still a finished one."""

import shutil
import subprocess
import sys
from pathlib import Path

from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.evaluate.schema import ANSWERS

OLD = Path(__file__).parent / "old-run"


def test_every_stage_of_an_older_run_is_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "old-run"
    shutil.copytree(OLD, folder)
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    command = [sys.executable, "-m", "congrad_ray", "run", "recipe.yaml", "--run", "run"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("done already") == 8  # the report is written each time
    # What M_0 answered is in the evaluation, where it was made: the stage that came since takes it over.
    assert result.stdout.count("taken over from an older version's result (2 rows)") == 1
    assert "starting vLLM" not in result.stdout + result.stderr
    made = RunDirectory.open(folder / "run").stage("baseline", None)
    assert made.manifest() is not None and made.read_table().schema.equals(ANSWERS)
    assert set(made.read_table()["model"].to_pylist()) == {"M_0"}
    changed = {path for path, data in before.items() if path.read_bytes() != data}
    # The resolved recipe is written with the settings that came since, and without those that went.
    names = {str(path.relative_to(folder / "run").parts[0]) for path in changed}
    assert names <= {"recipe.yaml", "report", "report.html"}
