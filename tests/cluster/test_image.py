"""The image: its Dockerfile, the lock files, and the CPU target's installation without a container engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, with continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def pins(target: str) -> dict[str, str]:
    lines = (ROOT / f"requirements-{target}.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_hadolint_finds_nothing() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.is_file() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint; the extra `dev` has it")
    lint = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert lint.returncode == 0, lint.stdout + lint.stderr


def test_the_image_ends_as_another_user_than_root_and_holds_no_secret() -> None:
    found = instructions()
    assert {argument.split()[-1] for name, argument in found if name == "FROM"} == {"base", "cpu", "gpu"}
    assert [argument for name, argument in found if name == "USER"] == ["1000:100"]
    secret = re.compile("token|secret|password|credential|api_?key", re.IGNORECASE)
    assert [argument for _, argument in found if secret.search(argument)] == []


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [argument.split()[-2] for name, argument in instructions() if name == "COPY"]
    for source in {*sources, *allowed} - {"."}:
        assert (ROOT / source).exists() and source in allowed


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_target_installs_by_the_script_that_the_makefile_uses(target: str) -> None:
    runs = [argument for name, argument in instructions() if name == "RUN"]
    for step in ("packages", "project"):
        assert f"cluster/install {target} {step} /home/ray/venv" in runs
    assert "cluster/install cpu packages .venv" in (ROOT / "Makefile").read_text()


def test_the_lock_files_agree_where_both_have_a_package() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    assert (gpu["vllm"], gpu["torch"], gpu["ray"]) == ("0.29.0", "2.13.0", "2.60.0")
    # vLLM for GPUs and CUDA's packages ask for other versions of these.
    different = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert different == {"apache-tvm-ffi", "protobuf", "torch"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_cpu_target_installs_in_a_clean_environment(tmp_path: Path) -> None:
    for source in ("cluster", "congrad_ray", "jobs"):
        shutil.copytree(ROOT / source, tmp_path / source, ignore=shutil.ignore_patterns("__pycache__"))
    for source in ("LICENSE", "README.md", "pyproject.toml", "requirements-cpu.lock"):
        shutil.copy(ROOT / source, tmp_path / source)
    venv = tmp_path / "venv"
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("PYTHONPATH", None)
    for step in ("packages", "project"):
        command = ["cluster/install", "cpu", step, str(venv)]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    message = subprocess.run(
        [str(venv / "bin" / "congrad"), "render", "kubernetes"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert message.returncode == 0 and "kind: RayCluster" in message.stdout, message.stderr
