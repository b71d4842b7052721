"""WHERE it runs: the strict models of a profile YAML: how many actors of what size, on which devices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from congrad_ray.config.printable import brief
from congrad_ray.config.settings import Settings, SettingsError, apply_overrides, did_you_mean, read_yaml, validate

Positive = Annotated[int, Field(ge=1)]

# Arguments of vLLM's that have a place of their own, where the rest of the program knows them.
_NOT_PASSED_ON = {
    "model": "model.name in the recipe",
    "max_model_len": "model.max_length, judge.max_length or evaluate.judge_max_length in the recipe",
    "tensor_parallel_size": "tensor_parallel_size beside it",
    "max_num_seqs": "max_num_seqs beside it",
}
PoolName = Literal["engines", "judge_engines"]

# Tokens that an engine on a CPU may have to generate for a batch.
_CPU_BATCH_TOKENS = 4096


def node_resource(name: str) -> str:
    """The custom resource of Ray that nodes of this name in `cluster.workers` have, and no others."""
    return f"nodes_{name}"


class Placement(Settings):
    """Where the actors or workers of a stage may be, beside the CPUs and GPUs that they hold."""

    memory_gib: float | None = Field(
        None, gt=0, description="GiB of memory of each: Ray places it by that, and does not enforce it"
    )
    nodes: str | None = Field(
        None, description="only on nodes of this name in cluster.workers, such as those not on spot; null: on any"
    )

    @property
    def memory_bytes(self) -> int | None:
        """`memory_gib` as Ray's `memory`."""
        return None if self.memory_gib is None else round(self.memory_gib * 2**30)

    @property
    def resources(self) -> dict[str, float]:
        """What each asks for of its nodes' custom resource, of which they have more than can be used."""
        return {} if self.nodes is None else {node_resource(self.nodes): 0.001}


class Pool(Placement):
    """An autoscaling pool of actors of one size."""

    min_actors: Positive = Field(1, description="actors that a stage needs to start")
    max_actors: Positive = Field(1, description="actors that a stage grows to")
    cpus: float = Field(1.0, gt=0, description="logical CPUs of one actor")
    gpus: float = Field(0.0, ge=0, description="GPUs of one actor, fractions allowed")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors ({self.min_actors}) exceeds max_actors ({self.max_actors})")
        return self


class Engines(Pool):
    """The pool of vLLM engines that generate and judge. An engine serves all stages that ask its model."""

    tensor_parallel_size: Positive = Field(1, description="GPUs that share one engine")
    placement: Literal["STRICT_PACK", "PACK"] = Field(
        "STRICT_PACK", description="an engine's GPUs are on one node (STRICT_PACK), or on more where they must be"
    )
    kv_cache_gib: float = Field(1.0, gt=0, description="GiB of KV cache per engine on a CPU")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of a GPU's memory that vLLM takes")
    max_num_seqs: Positive = Field(256, description="sequences decoded at once by one engine")
    batch_size: Positive | None = Field(
        None,
        description="rows handed to an engine and written together; null: 64, on a CPU fewer of long answers",
    )
    enforce_eager: bool = Field(False, description="no CUDA graphs; start-up is faster")
    engine_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="further arguments of vLLM's AsyncEngineArgs, which go before ours: {quantization: fp8}",
    )

    @field_validator("engine_kwargs")
    @classmethod
    def _have_no_other_place(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given.keys() & _NOT_PASSED_ON.keys():
            raise ValueError(f"{name} is not taken from here: set {_NOT_PASSED_ON[name]}")
        return given

    def rows_per_batch(self, max_tokens: int) -> int:
        """`batch_size` for answers of up to this many tokens.

        A batch is written when all of it is there, and what a kill costs is the batches in flight. A GPU is done
        with 64 long answers in a minute; a CPU would be at them for ten.
        """
        if self.batch_size:
            return self.batch_size
        return 64 if self.gpus else min(64, max(4, _CPU_BATCH_TOKENS // max_tokens))

    @model_validator(mode="after")
    def _whole_devices(self) -> Self:
        if self.tensor_parallel_size > 1 and self.gpus != self.tensor_parallel_size:
            raise ValueError(
                f"an engine of tensor_parallel_size {self.tensor_parallel_size} needs gpus: "
                f"{self.tensor_parallel_size} (found {self.gpus})"
            )
        return self


class Workers(Placement):
    """The training workers of Ray Train, one process each."""

    num_workers: Positive = Field(1, description="training workers of DeepSpeed")
    cpus: float = Field(1.0, gt=0, description="logical CPUs of one worker")
    gpus: float = Field(0.0, ge=0, description="GPUs of one worker: 0 or 1")
    min_workers: Positive | None = Field(
        None,
        description="training goes on with as few where nodes are lost and do not come back; null: num_workers",
    )
    max_failures: int = Field(2, ge=0, description="restarts from the last checkpoint before giving up")

    @model_validator(mode="after")
    def _at_most_all(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers ({self.min_workers}) exceeds num_workers ({self.num_workers})")
        return self


class NodeType(Settings):
    """Nodes of one kind. On an autoscaling cluster there are `min_nodes` to `max_nodes` of them."""

    name: str = Field(min_length=1, description="of the node group, such as gpu")
    instances: list[str] = Field(
        default_factory=list, description="the cloud's instance types that will do, the preferred one first"
    )
    cpus: float = Field(ge=0, description="CPUs that Ray may use on one node; 0 on a head that only coordinates")
    pod_cpus: float | None = Field(
        None, gt=0, description="Kubernetes: CPUs that a pod asks for; null: cpus, and 2 for a head of 0"
    )
    memory_gib: float = Field(gt=0, description="GiB of memory of one node")
    gpus: int = Field(0, ge=0, description="GPUs of one node")
    gpu_memory_gib: float | None = Field(None, gt=0, description="GiB of memory of one GPU")
    gpu_teraflops: float | None = Field(None, gt=0, description="dense bfloat16 TFLOP/s of one GPU by its maker")
    min_nodes: int = Field(0, ge=0, description="nodes that are up even when idle")
    max_nodes: Positive = Field(1, description="nodes that the autoscaler may start")
    spot: bool = Field(False, description="cheaper nodes that the cloud may reclaim at any time")
    price_per_hour: float | None = Field(None, ge=0, description="US dollars for one node, as you pay them")
    node_selector: dict[str, str] = Field(
        default_factory=dict, description="Kubernetes: labels of the nodes that pods of this kind may run on"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes ({self.min_nodes}) exceeds max_nodes ({self.max_nodes})")
        if self.gpus and self.gpu_memory_gib is None:
            raise ValueError("nodes with gpus need gpu_memory_gib")
        return self


class Retries(Settings):
    """What Kubernetes does with a job that fails, and with what is left when it ends (the fields of a RayJob)."""

    backoff_limit: int = Field(2, ge=0, description="retries, each on a new cluster; finished stages are kept")
    ttl_seconds_after_finished: int = Field(
        600, ge=0, description="seconds from the end until the cluster is deleted"
    )
    active_deadline_seconds: Positive | None = Field(None, description="a job that takes longer has failed")


class Cluster(Settings):
    """The cluster that launcher files and manifests are rendered from, and that a plan reckons with."""

    provider: Literal["aws", "gcp", "kubernetes", "other"] = Field(
        description="other: an autoscaling cluster that somebody else starts; `congrad render` has no file for it"
    )
    region: str | None = Field(None, description="aws: us-west-2; gcp: us-central1")
    zones: list[str] = Field(default_factory=list, description="availability zones that may be used")
    image: str = Field("", description="the container image, built from cluster/Dockerfile; other: none needed")
    idle_timeout_minutes: float = Field(5.0, gt=0, description="an idle node is removed after this")
    project: str | None = Field(None, description="gcp: the project id")
    host_image: str | None = Field(
        None, description="aws, gcp: machine image with Docker, NVIDIA's driver and its container toolkit"
    )
    disk_gib: Positive = Field(200, description="aws, gcp: a node's disk, for images, models, spilled objects")
    identity: str | None = Field(
        None,
        description="what nodes reach the storage as, without keys: an AWS instance profile, a GCP service "
        "account's e-mail, a Kubernetes service account",
    )
    secrets: list[str] = Field(
        default_factory=list,
        description="Kubernetes: Secrets that become environment variables, such as HF_TOKEN",
    )
    token_secret: str | None = Field(
        None, description="Kubernetes: the Secret with Ray's token as auth_token; null: KubeRay makes one"
    )
    jobs: Retries = Retries()
    head: NodeType
    workers: list[NodeType] = Field(min_length=1, description="the kinds of nodes that do the work")

    @model_validator(mode="after")
    def _has_image(self) -> Self:
        if self.provider != "other" and not self.image:
            raise ValueError(f"provider {self.provider} needs an image")
        return self


class Profile(Settings):
    """Where a whole run runs."""

    name: str = Field(min_length=1, description="of the profile, for people")
    address: str | None = Field(
        None,
        description="Ray address, 'auto' for the one running here; null: $RAY_ADDRESS, else a Ray is started here",
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="what models run on")
    local_cpus: Positive | None = Field(
        None,
        description="logical CPUs of a Ray started here; null: as many as the machine has or a stage needs",
    )
    object_store_gib: float | None = Field(None, gt=0, description="of a Ray started here")
    storage: str | None = Field(
        None, description="path or URI of a folder: a --run that is only a name is a run directory in it"
    )
    spill_directory: str | None = Field(
        None, description="a node's folder for objects that do not fit in memory; null: Ray's, below /tmp/ray"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="json: a line of JSON for each line of the log, with run, stage and iteration"
    )
    data_cpus: float = Field(1.0, gt=0, description="CPUs kept for Ray Data's reading and writing tasks")
    threads: Positive | None = Field(
        None,
        description="torch threads of an actor; null: its CPUs on a cluster, and where Ray is started here this "
        "machine's cores, shared by the actors that a stage runs at once",
    )
    engines: Engines = Engines()
    judge_engines: Engines | None = Field(
        None, description="engines of a judge that is not the policy; null: as engines"
    )
    sketchers: Pool = Pool()
    trainers: Workers = Workers()
    cluster: Cluster | None = Field(None, description="null: one machine, or a cluster that is there already")

    @model_validator(mode="after")
    def _device(self) -> Self:
        for section, pool in self._pools().items():
            gpus = pool.gpus
            if (self.device == "cuda") != (gpus > 0):
                raise ValueError(f"device is {self.device} but {section}.gpus is {gpus}")
        return self

    @model_validator(mode="after")
    def _nodes_are_there(self) -> Self:
        there = [node.name for node in self.cluster.workers] if self.cluster else []
        for section, pool in self._pools().items():
            nodes = pool.nodes
            if nodes is not None and nodes not in there:
                names = ", ".join(there) or "none: the profile has no section cluster"
                raise ValueError(f"{section}.nodes is {nodes}, which is not in cluster.workers ({names})")
        return self

    def _pools(self) -> dict[str, Pool | Workers]:
        found: dict[str, Pool | Workers] = {"engines": self.engines}
        if self.judge_engines is not None:
            found["judge_engines"] = self.judge_engines
        return found | {"sketchers": self.sketchers, "trainers": self.trainers}

    def engines_of(self, pool: PoolName) -> Engines:
        """The engines of a section; those of `engines` where it is null."""
        return (self.judge_engines if pool == "judge_engines" else None) or self.engines

    def threads_of(self, pool: Pool | Workers) -> int:
        """Torch threads of each actor or worker of a stage."""
        if self.threads:
            return self.threads
        if self.cluster or self.ray_address:
            return max(1, int(pool.cpus))
        at_once = pool.num_workers if isinstance(pool, Workers) else pool.max_actors
        return max(1, len(os.sched_getaffinity(0)) // at_once)

    @property
    def ray_address(self) -> str | None:
        """The cluster to use; None where a Ray is to be started here."""
        return self.address or os.environ.get("RAY_ADDRESS")

    def run_uri(self, run: str) -> str:
        """The run directory that `run` means: a name is a folder in `storage` if there is one; else as it is."""
        is_name = "/" not in run and run not in ("", ".", "..")
        return f"{self.storage.rstrip('/')}/{run}" if self.storage and is_name else run

    def shared_run_uri(self, run: str, option: str = "--run") -> str:
        """`run_uri` where the run is on a cluster. Raises SettingsError for a path that only this machine has."""
        where = self.run_uri(run)
        if "://" not in where and not where.startswith("/"):
            raise SettingsError(
                f"{option} {brief(run)}: a cluster's nodes share no such folder; give a URI (s3://, gs://), a "
                "path from / on that all of them share, or a name where the profile has `storage`"
            )
        return where


PROFILES = Path(__file__).resolve().parent / "profiles"


def load_profile(name: str | Path, overrides: Sequence[str] = ()) -> Profile:
    """A profile from a YAML file, or by its name in `congrad_ray/config/profiles/`. Raises SettingsError."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        known = {p.stem: p for p in sorted(PROFILES.glob("*.yaml"))}
        if str(name) not in known:
            names = ", ".join(known) or f"none in {PROFILES}"
            hint = did_you_mean(str(name), known)
            raise SettingsError(f"no profile '{brief(name)}'{hint}: give a .yaml file or one of {names}")
        path = known[str(name)]
    return validate(Profile, apply_overrides(read_yaml(path, "profile"), overrides), f"profile {name}")
