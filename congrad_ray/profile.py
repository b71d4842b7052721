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


class NodeType(Settings):
    """Nodes of one kind. On an autoscaling cluster there are `min_nodes` to `max_nodes` of them."""

    name: str = Field(min_length=1, description="of the node group, such as gpu")
    instances: list[str] = Field(
        default_factory=list, description="the cloud's instance types that will do, the preferred one first"
    )
    cpus: float = Field(ge=0, description="CPUs that Ray may use on one node; 0 on a head that only coordinates")
    memory_gib: float = Field(gt=0, description="GiB of memory of one node")
    gpus: int = Field(0, ge=0, description="GPUs of one node")
    gpu_memory_gib: float | None = Field(None, gt=0, description="GiB of memory of one GPU")
    gpu_teraflops: float | None = Field(None, gt=0, description="dense bfloat16 TFLOP/s of one GPU by its maker")
    min_nodes: int = Field(0, ge=0)
    max_nodes: Positive = 1
    spot: bool = Field(False, description="cheaper nodes that the cloud may take back at any time")
    price_per_hour: float | None = Field(None, ge=0, description="US dollars for one node, as you pay them")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes ({self.min_nodes}) exceeds max_nodes ({self.max_nodes})")
        if self.gpus and self.gpu_memory_gib is None:
            raise ValueError("nodes with gpus need gpu_memory_gib")
        return self


class Cluster(Settings):
    """The cluster that launcher files and manifests are rendered from, and that a plan reckons with."""

    provider: Literal["aws", "gcp", "kubernetes"]
    region: str | None = Field(None, description="aws: us-west-2; gcp: us-central1")
    zones: list[str] = Field(default_factory=list, description="availability zones that may be used")
    image: str = Field(min_length=1, description="the container image, built from cluster/Dockerfile")
    idle_timeout_minutes: float = Field(5.0, gt=0, description="an idle node is given back after this")
    head: NodeType
    workers: list[NodeType] = Field(min_length=1)


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
    cluster: Cluster | None = Field(None, description="null: one machine, or a cluster that is there already")

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
