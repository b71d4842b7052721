"""The KubeRay manifests: KubeRay's own schemas, and Ray's own reading of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from congrad_ray.pipeline.order import STAGES

Schema = dict[str, Any]
Problems = Callable[[dict[str, Any], Schema], list[str]]
KINDS = ("RayCluster", "RayJob")


@pytest.mark.parametrize("kind", KINDS)
def test_every_manifest_has_only_fields_and_values_of_the_kept_schema(
    kind: str, manifests: dict[str, list[dict[str, Any]]], kept_schemas: dict[str, Schema], problems: Problems
) -> None:
    for document in manifests[kind]:
        assert problems(document, kept_schemas[kind]) == []
    assert len(manifests["RayJob"]) == 2 * (1 + len(STAGES))


@pytest.mark.parametrize("kind", KINDS)
def test_every_manifest_is_valid_by_kuberays_schemas(
    kind: str, manifests: dict[str, list[dict[str, Any]]], kuberay_schemas: dict[str, Schema], problems: Problems
) -> None:
    for document in manifests[kind]:
        assert problems(document, kuberay_schemas[kind]) == []


def test_the_kept_schema_is_a_part_of_kuberays(
    manifests: dict[str, list[dict[str, Any]]],
    kuberay_schemas: dict[str, Schema],
    kept_schemas: dict[str, Schema],
    trimmed: Callable[[Schema, Sequence[Any]], Schema],
    tmp_path: Path,
) -> None:
    now = {kind: trimmed(kuberay_schemas[kind], manifests[kind]) for kind in KINDS}
    (tmp_path / "kuberay-fields.json").write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    assert now == kept_schemas, f"other fields are rendered: copy {tmp_path}/kuberay-fields.json to tests/cluster"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "autoscalerOptions", "version"], "v3"),
        (["spec", "autoscalerOptions", "idleTimeoutSeconds"], 2.5),
        (["spec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (["spec", "headGroupSpec", "template", "spec", "volumes", 0, "emptyDir", "sizeLimit"], "much"),
        (["spec", "headGroupSpec", "template", "spec", "containers", 0, "imagePolicy"], "Always"),
    ],
)
def test_the_kept_schema_refuses_what_kubernetes_would(
    path: list[Any],
    value: Any,
    manifests: dict[str, list[dict[str, Any]]],
    kept_schemas: dict[str, Schema],
    problems: Problems,
) -> None:
    document = deepcopy(manifests["RayCluster"][0])
    part = document
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    assert len(problems(document, kept_schemas["RayCluster"])) == 1


def test_rays_autoscaler_reads_the_manifests(manifests: dict[str, list[dict[str, Any]]]) -> None:
    from ray.autoscaler._private.kuberay import autoscaling_config

    specs = [job["spec"]["rayClusterSpec"] for job in manifests["RayJob"]]
    specs += [cluster["spec"] for cluster in manifests["RayCluster"]]
    for spec in specs:
        custom_resource = {"metadata": {"name": "x", "namespace": "default"}, "spec": spec}
        read = autoscaling_config._derive_autoscaling_config_from_ray_cr(custom_resource)
        assert read["idle_timeout_minutes"] == 5
        types = read["available_node_types"]
        assert types["headgroup"]["resources"]["CPU"] == 0
        gpus = types["gpu"]
        assert gpus["min_workers"] == 0 and gpus["max_workers"] == 4
        assert gpus["resources"]["nodes_gpu"] == 1000
        assert gpus["resources"]["GPU"] == int(gpus_of(spec))


def gpus_of(spec: dict[str, Any]) -> str:
    group = next(group for group in spec["workerGroupSpecs"] if group["groupName"] == "gpu")
    limit: str = group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    return limit


def test_no_pod_runs_as_root_or_may_become_it(manifests: dict[str, list[dict[str, Any]]]) -> None:
    for job in manifests["RayJob"]:
        spec = job["spec"]["rayClusterSpec"]
        templates = [spec["headGroupSpec"]["template"], job["spec"]["submitterPodTemplate"]]
        templates += [group["template"] for group in spec["workerGroupSpecs"]]
        for template in templates:
            assert template["spec"]["securityContext"]["runAsNonRoot"] is True
            for container in template["spec"]["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
