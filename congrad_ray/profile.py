"""WHERE it runs: the strict models of a profile YAML: how many actors of what size, on which devices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from congrad_ray.printable import brief
from congrad_ray.settings import Settings, SettingsError, apply_overrides, read_yaml, validate

Positive = Annotated[int, Field(ge=1)]


class Pool(Settings):
    """An autoscaling pool of actors, all of one size."""

    min_actors: Positive = 1
    max_actors: Positive = 1
    cpus: float = Field(1.0, gt=0, description="logical CPUs of one actor")
    gpus: float = Field(0.0, ge=0, description="GPUs of one actor, fractions allowed")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors ({self.min_actors}) exceeds max_actors ({self.max_actors})")
        return self


class Engines(Pool):
    """The pool of vLLM engines that generate and judge."""

    tensor_parallel_size: Positive = Field(1, description="GPUs that share one engine")
    kv_cache_gib: float = Field(1.0, gt=0, description="GiB of KV cache per engine on a CPU")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    max_num_seqs: Positive = Field(256, description="sequences decoded at once by one engine")
    batch_size: Positive = Field(64, description="rows handed to an engine together")
    enforce_eager: bool = Field(False, description="no CUDA graphs; start-up is faster")

    @model_validator(mode="after")
    def _whole_devices(self) -> Self:
        if self.tensor_parallel_size > 1 and self.gpus != self.tensor_parallel_size:
            raise ValueError(
                f"an engine of tensor_parallel_size {self.tensor_parallel_size} needs gpus: "
                f"{self.tensor_parallel_size} (found {self.gpus})"
            )
        return self


class Workers(Settings):
    """The training workers of Ray Train, one process each."""

    num_workers: Positive = 1
    cpus: float = Field(1.0, gt=0)
    gpus: float = Field(0.0, ge=0, description="GPUs of one worker: 0 or 1")
    max_failures: int = Field(2, ge=0, description="restarts from the last checkpoint before giving up")


class Profile(Settings):
    """Where a whole run runs."""

    name: str = Field(min_length=1)
    address: str | None = Field(
        None,
        description="Ray address, 'auto' for the one running here; null: $RAY_ADDRESS, else a Ray is started here",
    )
    device: Literal["cpu", "cuda"] = "cpu"
    local_cpus: Positive | None = Field(
        None,
        description="logical CPUs of a Ray started here; null: as many as the machine has or a stage needs",
    )
    object_store_gib: float | None = Field(None, gt=0, description="of a Ray started here")
    data_cpus: float = Field(1.0, gt=0, description="CPUs kept for Ray Data's reading and writing tasks")
    threads: Positive | None = Field(None, description="torch threads of an actor; null: its CPUs")
    engines: Engines = Engines()
    sketchers: Pool = Pool()
    trainers: Workers = Workers()

    @model_validator(mode="after")
    def _device(self) -> Self:
        for section in ("engines", "sketchers", "trainers"):
            gpus = getattr(self, section).gpus
            if (self.device == "cuda") != (gpus > 0):
                raise ValueError(f"device is {self.device} but {section}.gpus is {gpus}")
        return self


PROFILES = Path(__file__).resolve().parent.parent / "cluster" / "profiles"


def load_profile(name: str | Path, overrides: Sequence[str] = ()) -> Profile:
    """A profile from a YAML file, or by its name in `cluster/profiles/`. Raises SettingsError."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        known = {p.stem: p for p in sorted(PROFILES.glob("*.yaml"))}
        if str(name) not in known:
            names = ", ".join(known) or f"none in {PROFILES}"
            raise SettingsError(f"no profile '{brief(name)}': give a .yaml file or one of {names}")
        path = known[str(name)]
    return validate(Profile, apply_overrides(read_yaml(path), overrides), f"profile {name}")
