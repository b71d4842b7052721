"""The command under test: `congrad run` on the demo recipe in small, as a process whose words are followed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "jobs" / "recipes" / "demo.yaml"
ENGINE_BATCH = 16
SKETCH_BATCH = 64
SAVE_STEPS = 2
# Every stage that works row by row has several batches for each of its workers.
SETTINGS = {
    "prompts.languages": "[en, de]",
    "prompts.unseen_languages": "[it]",
    "prompts.train_per_language": 150,
    "prompts.evaluation_per_language": 40,
    "generate.max_tokens": 24,
    "evaluate.max_tokens": 24,
    "judge.min_probability_mass": 0.0,
    "pair.truncated": "keep",
    "sketch.width": 1024,
    "train.batch_size": 4,
    "train.max_tokens_per_batch": 150,
    "train.save_steps": SAVE_STEPS,
    "limits.stall_timeout_s": 900,  # on a busy machine an engine takes minutes to start
}
# An engine computes one batch at a time, so that "the batch that a kill costs" means something. Ray Train counts
# every killed worker as a failure; how many there will be is the harness's choice and no property of the cluster.
PROFILE = {
    "name": "faults",
    "device": "cpu",
    "data_cpus": 1,
    "threads": 1,
    "engines": {"cpus": 1, "batch_size": ENGINE_BATCH, "max_num_seqs": ENGINE_BATCH, "enforce_eager": True},
    "sketchers": {"min_actors": 2, "max_actors": 2, "cpus": 1},
    "trainers": {"num_workers": 2, "cpus": 1, "max_failures": 100},
}
_BEGINS = re.compile(r"^\S+  (\w+)(?: \(iteration \d+\))?: (?:starting|resuming): ")
_ENDS = re.compile(r"^\S+  (\w+)(?: \(iteration \d+\))?: done: [\d,]+ rows? in ")


@dataclass(frozen=True)
class Recipe:
    """What is the same in all runs of a fault run: the model, the profile, the cluster."""

    model: Path
    profile: Path
    address: str

    @classmethod
    def make(cls, folder: Path, address: str) -> Recipe:
        """Writes the profile, and trains the built-in world's model, for seconds, where it is not there yet."""
        import torch

        from congrad_ray.world.model import world_model

        torch.set_num_threads(1)  # spinning threads would slow it down on a busy machine
        model = world_model(cache_dir=folder / "model", training_tokens=150_000)
        profile = folder / "profile.yaml"
        profile.write_text(yaml.safe_dump(PROFILE))
        return cls(model, profile, address)

    def arguments(self, run: Path, until: str | None = None) -> list[str]:
        settings = {"model.name": self.model, **SETTINGS}
        return [
            *(sys.executable, "-m", "congrad_ray", "run", str(RECIPE), "--run", str(run)),
            *("--profile", str(self.profile), *(["--until", until] if until else [])),
            *(f"--set={name}={value}" for name, value in settings.items()),
        ]

    def environment(self) -> Mapping[str, str]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return {**os.environ, "RAY_ADDRESS": self.address, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


class Command:
    """`congrad run` under way, in a session of its own; a thread reads what it says."""

    def __init__(self, recipe: Recipe, run: Path, until: str | None = None) -> None:
        self.lines: list[str] = []
        self.stage: str | None = None
        """The stage that it is in; None before the first and between two."""
        self.said_at = time.monotonic()
        self._process = subprocess.Popen(
            recipe.arguments(run, until),
            env=dict(recipe.environment()),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert self._process.stdout is not None
        log = run.parent / f"{run.name}.log"
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout, log), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            for line in stream:
                self.lines.append(line.rstrip("\n"))
                self.said_at = time.monotonic()
                if begins := _BEGINS.match(line):
                    self.stage = begins[1]
                elif _ENDS.match(line):
                    self.stage = None
                file.write(line)
                file.flush()

    @property
    def exit_code(self) -> int | None:
        """None while it runs; all it said is in `lines` afterwards."""
        code = self._process.poll()
        if code is not None:
            self._reader.join()
        return code

    def kill(self) -> None:
        """SIGKILL to the driver and whatever it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        finally:
            self._process.wait()
            self._reader.join()
