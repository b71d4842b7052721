"""Manifests and the schemas that they are held against."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from congrad_ray.config.profile import load_profile
from congrad_ray.config.recipe import load_recipe
from congrad_ray.deploy.render import ray_cluster, ray_job
from congrad_ray.pipeline.order import STAGES

Schema = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
KEPT = Path(__file__).with_name("kuberay-fields.json")
# A profile of which everything is rendered that can be.
EVERYTHING = [
    "cluster.token_secret=my-token",
    "cluster.jobs.active_deadline_seconds=86400",
    "cluster.workers=[{name: gpu, instances: [p4de.24xlarge, p5.48xlarge], cpus: 90, memory_gib: 1000, gpus: 8, "
    "gpu_memory_gib: 79, max_nodes: 4, spot: true, node_selector: {pool: gpu}}]",
]


def _closed(schema: Schema, is_root: bool = False) -> Schema:
    """A structural schema of Kubernetes as a JSON schema that refuses the fields that a server would drop."""
    result = deepcopy({key: value for key, value in schema.items() if key not in ("properties", "items")})
    if "properties" in schema:
        result["properties"] = {name: _closed(inner) for name, inner in schema["properties"].items()}
    if "items" in schema:
        result["items"] = _closed(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = _closed(schema["additionalProperties"])
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result["additionalProperties"] = False
    if is_root:  # Kubernetes itself checks the metadata of every object
        result["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return result


_validators: dict[int, jsonschema.Draft7Validator] = {}


def _problems(document: dict[str, Any], schema: Schema) -> list[str]:
    if id(schema) not in _validators:  # the schemas live as long as the session
        _validators[id(schema)] = jsonschema.Draft7Validator(_closed(schema, is_root=True))
    errors = _validators[id(schema)].iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


def _trimmed(schema: Schema, values: Sequence[Any]) -> Schema:
    """The schema, less the optional fields that none of the values has."""
    result = {key: value for key, value in schema.items() if key not in ("properties", "items", "description")}
    if "properties" in schema:
        wanted = {name for value in values for name in value} | set(schema.get("required", ()))
        result["properties"] = {
            name: _trimmed(inner, [value[name] for value in values if name in value])
            for name, inner in schema["properties"].items()
            if name in wanted
        }
    if "items" in schema:
        result["items"] = _trimmed(schema["items"], [item for value in values for item in value])
    return result


@pytest.fixture(scope="session")
def problems() -> Callable[[dict[str, Any], Schema], list[str]]:
    """What is wrong with a document by a structural schema, unknown fields too."""
    return _problems


@pytest.fixture(scope="session")
def trimmed() -> Callable[[Schema, Sequence[Any]], Schema]:
    return _trimmed


@pytest.fixture(scope="session")
def manifests() -> dict[str, list[dict[str, Any]]]:
    """By kind: the cluster and the jobs of a whole run and of every stage, with few settings and with all."""
    recipe = load_recipe(ROOT / "jobs" / "recipes" / "llama3-8b.yaml")
    found: dict[str, list[dict[str, Any]]] = {}
    for profile in (load_profile("kubernetes"), load_profile("kubernetes", EVERYTHING)):
        documents = [ray_cluster(profile), *ray_job(profile, recipe, "mine")]
        for name, stage in STAGES.items():
            documents += ray_job(profile, recipe, "mine", name, 0 if stage.each_iteration else None)
        for document in documents:
            found.setdefault(document["kind"], []).append(document)
    return found


@pytest.fixture(scope="session")
def kept_schemas() -> dict[str, Schema]:
    """The part of KubeRay's schemas that is about what is rendered, by kind."""
    kept: dict[str, Schema] = json.loads(KEPT.read_text())
    return kept


@pytest.fixture(scope="session")
def kuberay_schemas() -> dict[str, Schema]:
    """KubeRay's own schemas of ray.io/v1, where they lie beside the repository."""
    folder = ROOT.parent / "shared" / "schemas"
    found = {}
    for kind, name in (("RayCluster", "rayclusters"), ("RayJob", "rayjobs")):
        path = folder / f"ray.io_{name}.crd.yaml"
        if not path.is_file():
            pytest.skip("no schemas of KubeRay beside the repository")
        definition = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)  # as safe, and much faster
        version = next(version for version in definition["spec"]["versions"] if version["name"] == "v1")
        found[kind] = version["schema"]["openAPIV3Schema"]
    return found
