"""The launcher's files: Ray's own checks, and what they would start on AWS and GCP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from congrad_ray.config.profile import load_profile
from congrad_ray.deploy.render import launcher


@pytest.mark.parametrize("name", ["aws-spot", "gcp-spot"])
def test_ray_takes_the_configuration(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(launcher(load_profile(name)))
    validate_config(config)
    # Nothing of Ray's own defaults, which would install another Ray.
    assert config["setup_commands"] == config["head_setup_commands"] == config["worker_setup_commands"] == []
    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert all(node["min_workers"] == 0 for node in types.values())
    assert len([kind for kind in types if kind.startswith("gpu-")]) == 2


@pytest.mark.parametrize("name", ["aws-spot", "gcp-spot"])
def test_the_token_comes_from_a_file_of_the_machine_that_starts_it(name: str) -> None:
    config = launcher(load_profile(name))
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "RAY_AUTH_TOKEN=" not in json.dumps(config)


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """moto's EC2 and IAM in this process, and a home for the key pair that Ray makes."""
    moto = pytest.importorskip("moto", reason="the extra `dev` has it")
    from ray.autoscaler._private.aws import config as of_ray

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-the-tests")
    monkeypatch.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    monkeypatch.setattr(of_ray.time, "sleep", lambda seconds: None)  # for IAM to spread the word
    with moto.mock_aws():
        yield


def test_ray_starts_spot_nodes_of_the_configuration_on_aws(aws: None) -> None:
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    profile = load_profile("aws-spot")
    assert profile.cluster is not None
    boto3.client("iam").create_instance_profile(InstanceProfileName=profile.cluster.identity)
    config = bootstrap_aws(prepare_config(launcher(profile)))
    provider = AWSNodeProvider(config["provider"], "aws-spot")
    for node_type in config["available_node_types"].values():
        provider.create_node(deepcopy(node_type["node_config"]), {}, 1)
    ec2 = boto3.client("ec2", "us-west-2")
    started = [node for answer in ec2.describe_instances()["Reservations"] for node in answer["Instances"]]
    kinds = {(node["InstanceType"], node.get("InstanceLifecycle")) for node in started}
    assert ("m6i.2xlarge", None) in kinds  # the head
    assert {kind for kind, life in kinds if life == "spot"} == {
        *("m6i.2xlarge", "m6a.2xlarge", "m5.2xlarge"),
        *("g6e.12xlarge", "g6e.24xlarge"),
    }


def test_the_profile_says_what_the_instance_types_have(aws: None) -> None:
    import boto3

    cluster = load_profile("aws-spot").cluster
    assert cluster is not None
    ec2 = boto3.client("ec2", "us-west-2")
    for node in (cluster.head, *cluster.workers):
        for kind in ec2.describe_instance_types(InstanceTypes=node.instances)["InstanceTypes"]:
            assert kind["VCpuInfo"]["DefaultVCpus"] >= node.cpus
            assert kind["MemoryInfo"]["SizeInMiB"] >= node.memory_gib * 1024
            gpus = kind.get("GpuInfo", {}).get("Gpus", [])
            assert sum(gpu["Count"] for gpu in gpus) == node.gpus
            assert all(gpu["MemoryInfo"]["SizeInMiB"] >= (node.gpu_memory_gib or 0) * 1024 for gpu in gpus)


def test_nodes_on_gcp_are_instances_of_its_api() -> None:
    """By the description of Compute Engine that comes with Google's client, from the extra `launcher`."""
    discovery = pytest.importorskip("googleapiclient.discovery_cache", reason="the extra `launcher` has it")
    schemas = json.loads(discovery.get_static_doc("compute", "v1"))["schemas"]

    def closed(part: Any) -> Any:
        """Google's own dialect of JSON schema, with references by bare name, and closed."""
        if isinstance(part, list):
            return [closed(inner) for inner in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part and isinstance(part["$ref"], str):
            return {"$ref": f"#/definitions/{part['$ref']}"}
        kept = {k: closed(v) for k, v in part.items() if k in ("type", "properties", "items", "enum")}
        for numeric in ("int64", "uint64"):
            if part.get("format") == numeric and part.get("type") == "string":
                return {"type": ["string", "integer"]}
        if isinstance(part.get("additionalProperties"), dict):
            kept["additionalProperties"] = closed(part["additionalProperties"])
        elif part.get("type") == "object":
            kept["additionalProperties"] = False
        return kept

    definitions = {}
    for name, schema in schemas.items():
        definitions[name] = closed({key: value for key, value in schema.items() if key != "properties"})
        if "properties" in schema:
            definitions[name]["properties"] = {k: closed(v) for k, v in schema["properties"].items()}
    validator = jsonschema.Draft4Validator({"$ref": "#/definitions/Instance", "definitions": definitions})
    for node_type in launcher(load_profile("gcp-spot"))["available_node_types"].values():
        assert [error.message for error in validator.iter_errors(node_type["node_config"])] == []
    wrong = {"machineType": "n2-standard-8", "scheduling": {"provisioning": "SPOT"}}
    assert not validator.is_valid(wrong)
