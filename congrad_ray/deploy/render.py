"""The files that start a cluster, rendered from a profile: for Ray's launcher on AWS and GCP, and for KubeRay.

Pure functions: profile -> dictionary -> YAML. Nothing here talks to a cloud, and no secret goes into a file: the
launcher's nodes get Ray's token from ~/.ray/auth_token of the machine that starts them, pods get theirs from
Kubernetes Secrets, and storage is reached as `cluster.identity`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from congrad_ray.config.profile import Cluster, NodeType, Profile, node_resource
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import to_yaml

RAY_VERSION = "2.60.0"
SETTINGS_FOLDER = "/etc/congrad"  # where a job's recipe and profile are in the head's pod

# Of a node's memory. Ray gives 0.3 to its object store, which must fit in /dev/shm beside what NCCL and vLLM put
# there, and counts the rest as `memory`.
_SHARED_MEMORY = 0.4
_HEAP = 0.7
# More of a node's own custom resource than its actors can ask for, each a thousandth.
_PLENTY = 1000
_HOME = "/home/ray"
_USER, _GROUP = 1000, 100  # `ray` in cluster/Dockerfile, as in Ray's own images
_HEAD = "head"
# KubeRay makes names of pods and services out of a RayJob's; longer ones it refuses.
_LONGEST_NAME = 47
# What GKE and AKS put on spot nodes, beside the taint of GPU nodes. A toleration of a taint that is not there does
# no harm.
_SPOT_TAINTS = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")
_GPU = "nvidia.com/gpu"


class RenderError(ValueError):
    """The profile cannot be rendered; the text names the setting and the way out."""


def launcher(profile: Profile) -> dict[str, Any]:
    """The configuration for `ray up`. Raises RenderError.

    Each instance type is a node type of its own: the launcher tries the next where a cloud has no more of one.
    """
    cluster = _cluster(profile, "launcher", ("aws", "gcp"))
    for name in ("region", "zones", "host_image", *(("project",) if cluster.provider == "gcp" else ())):
        if not getattr(cluster, name):
            raise RenderError(f"profile {profile.name}: a launcher file needs cluster.{name}")
    if cluster.provider == "gcp" and len(cluster.zones) > 1:
        raise RenderError(
            f"profile {profile.name}: cluster.zones has {len(cluster.zones)} zones, and Ray's gcp launcher takes "
            "one; give the first one only, or one profile for each zone"
        )
    types: dict[str, Any] = {}
    for node in (cluster.head, *cluster.workers):
        types |= _launcher_types(cluster, node)
    spilling = profile.spill_directory
    options = ["--ulimit nofile=65536:65536", "--env RAY_AUTH_MODE=token", "--env RAY_USAGE_STATS_ENABLED=0"]
    if spilling:
        options.append(f"--volume {spilling}:{spilling}")
    start = "ulimit -n 65536; ray start --object-manager-port=8076"
    if spilling:
        start += f" --object-spilling-directory={spilling}"
    return {
        "cluster_name": _name(profile.name),
        "max_workers": sum(node.max_nodes for node in cluster.workers),
        "idle_timeout_minutes": cluster.idle_timeout_minutes,
        "provider": _provider(cluster),
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": cluster.image,
            "container_name": "congrad",
            "pull_before_run": True,
            "run_options": options,
            "head_run_options": [f"--shm-size={_shared_memory_gib(cluster.head)}g"],
        },
        "file_mounts": {f"{_HOME}/.ray/auth_token": "~/.ray/auth_token"},
        # On the host, where Docker would make the folder as root.
        "initialization_commands": [f"sudo mkdir -p {spilling} && sudo chmod 1777 {spilling}"] if spilling else [],
        "setup_commands": [],  # everything is in the image
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "available_node_types": types,
        "head_node_type": _HEAD,
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:6379"],
    }


def ray_cluster(profile: Profile) -> dict[str, Any]:
    """A RayCluster of KubeRay: a head of its own, worker groups from zero to their maximum. Raises RenderError."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(_name(profile.name)),
        "spec": _cluster_spec(profile),
    }


def ray_job(
    profile: Profile, recipe: Recipe, run: str, stage: str | None = None, iteration: int | None = None
) -> list[dict[str, Any]]:
    """A ConfigMap with recipe and profile, and a RayJob on a cluster of its own that goes when the job ends.

    `stage`: one stage, of an `iteration` where it has those; None: the whole run. `run`: a URI, a path that every
    node shares, or a name in the profile's storage. Raises RenderError or SettingsError.
    """
    where = profile.shared_run_uri(run)
    words = ["run" if stage is None else stage, *([] if iteration is None else [str(iteration)])]
    name = _name("-".join([recipe.name, *words]))
    entrypoint = ["congrad", words[0], f"{SETTINGS_FOLDER}/recipe.yaml", "--run", where]
    if iteration is not None:
        entrypoint += ["--iteration", str(iteration)]
    entrypoint += ["--profile", f"{SETTINGS_FOLDER}/profile.yaml"]
    spec = _cluster_spec(profile)
    cluster = _cluster(profile, "rayjob", ("kubernetes",))
    pod = spec["headGroupSpec"]["template"]["spec"]
    pod["containers"][0]["volumeMounts"].append(
        {"name": "settings", "mountPath": SETTINGS_FOLDER, "readOnly": True}
    )
    pod["volumes"].append({"name": "settings", "configMap": {"name": name}})
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(name),
        "data": {"recipe.yaml": to_yaml(recipe), "profile.yaml": to_yaml(profile)},
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(name),
        "spec": {
            "entrypoint": shlex.join(entrypoint),
            "submissionMode": "K8sJobMode",
            "backoffLimit": cluster.jobs.backoff_limit,
            **({"activeDeadlineSeconds": limit} if (limit := cluster.jobs.active_deadline_seconds) else {}),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": cluster.jobs.ttl_seconds_after_finished,
            "rayClusterSpec": spec,
            "submitterPodTemplate": _submitter(cluster),
        },
    }
    return [settings, job]


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as such."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
# Anchors for parts that occur twice are hard to read, and to edit.
_Dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]


def to_text(documents: Sequence[dict[str, Any]], comment: str) -> str:
    """YAML documents below a comment."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    return head + yaml.dump_all(
        documents,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=110,
        explicit_start=len(documents) > 1,
    )


def _cluster(profile: Profile, what: str, providers: Sequence[str]) -> Cluster:
    if profile.cluster is None:
        raise RenderError(
            f"profile {profile.name} has no section `cluster`, of which nodes are rendered; see "
            "congrad_ray/config/profiles/aws-spot.yaml and kubernetes.yaml"
        )
    if profile.cluster.provider not in providers:
        raise RenderError(
            f"profile {profile.name}: cluster.provider is {profile.cluster.provider}, and --what {what} is for "
            f"{' or '.join(providers)}"
        )
    return profile.cluster


def _cpus(node: NodeType) -> int:
    if node.cpus != int(node.cpus):
        raise RenderError(f"cpus of the nodes '{node.name}' is {node.cpus:g}; the autoscaler wants a whole number")
    return int(node.cpus)


def _name(text: str) -> str:
    """The text as a DNS label that starts with a letter."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (name if name[:1].isalpha() else f"congrad-{name}")[:_LONGEST_NAME].rstrip("-")


def _shared_memory_gib(node: NodeType) -> int:
    return max(1, int(node.memory_gib * _SHARED_MEMORY))


# --- AWS and GCP


def _provider(cluster: Cluster) -> dict[str, Any]:
    provider = {
        "type": cluster.provider,
        "region": cluster.region,
        "availability_zone": ",".join(cluster.zones),
        "cache_stopped_nodes": False,  # a spot node cannot be stopped, only ended
    }
    return provider | ({"project_id": cluster.project} if cluster.provider == "gcp" else {})


def _launcher_types(cluster: Cluster, node: NodeType) -> dict[str, Any]:
    """A node type of the launcher for every instance type of `node`, the preferred one first."""
    if not node.instances:
        raise RenderError(f"the nodes '{node.name}' of the cluster need `instances`, the cloud's instance types")
    configure = _aws_node if cluster.provider == "aws" else _gcp_node
    resources = {"CPU": _cpus(node), **({"GPU": node.gpus} if node.gpus else {})}
    resources["memory"] = int(node.memory_gib * _HEAP * 2**30)
    if node is cluster.head:
        config = configure(cluster, node, node.instances[0])
        return {_HEAD: {"resources": resources, "node_config": config, "min_workers": 0, "max_workers": 0}}
    return {
        f"{node.name}-{_name(instance)}": {
            "resources": resources | {node_resource(node.name): _PLENTY},
            "node_config": configure(cluster, node, instance),
            "min_workers": 0 if number else node.min_nodes,
            "max_workers": node.max_nodes,
            "priority": len(node.instances) - number,
            "docker": {"worker_run_options": [f"--shm-size={_shared_memory_gib(node)}g"]},
        }
        for number, instance in enumerate(node.instances)
    }


def _aws_node(cluster: Cluster, node: NodeType, instance: str) -> dict[str, Any]:
    """Arguments of EC2's RunInstances."""
    disk = {"VolumeSize": cluster.disk_gib, "VolumeType": "gp3", "DeleteOnTermination": True}
    config: dict[str, Any] = {
        "InstanceType": instance,
        "ImageId": cluster.host_image,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
    }
    if node.spot:
        config["InstanceMarketOptions"] = {"MarketType": "spot"}
    if cluster.identity and node is not cluster.head:  # Ray gives the head a role that may start nodes
        config["IamInstanceProfile"] = {"Name": cluster.identity}
    return config


def _gcp_node(cluster: Cluster, node: NodeType, instance: str) -> dict[str, Any]:
    """An instance of Compute Engine's instances.insert."""
    image = {"diskSizeGb": cluster.disk_gib, "sourceImage": cluster.host_image}
    image["diskType"] = f"zones/{cluster.zones[0]}/diskTypes/pd-balanced"  # the default is too slow, or not there
    config: dict[str, Any] = {
        "machineType": instance,
        "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": image}],
    }
    if node.gpus or node.spot:
        config["scheduling"] = {"onHostMaintenance": "TERMINATE", "automaticRestart": not node.spot}
    if node.spot:
        config["scheduling"] |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
    if cluster.identity and node is not cluster.head:  # Ray gives the head an account that may start nodes
        scopes = ["https://www.googleapis.com/auth/cloud-platform"]
        config["serviceAccounts"] = [{"email": cluster.identity, "scopes": scopes}]
    return config


# --- Kubernetes


def _metadata(name: str) -> dict[str, Any]:
    return {"name": name, "labels": {"app.kubernetes.io/name": "congrad"}}


def _cluster_spec(profile: Profile) -> dict[str, Any]:
    """The spec of a RayCluster."""
    cluster = _cluster(profile, "raycluster or rayjob", ("kubernetes",))
    authentication = {"mode": "token"} | ({"secretName": cluster.token_secret} if cluster.token_secret else {})
    return {
        "rayVersion": RAY_VERSION,
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": round(cluster.idle_timeout_minutes * 60),
            "upscalingMode": "Default",
            "imagePullPolicy": "IfNotPresent",
            "resources": _same_limits({"cpu": "500m", "memory": "1Gi"}),
            "securityContext": _container_security(),
        },
        "authOptions": authentication,
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": _start_parameters(profile, cluster.head, {}),
            "template": _pod(profile, cluster, cluster.head),
        },
        "workerGroupSpecs": [
            {
                "groupName": _name(node.name),
                "replicas": node.min_nodes,
                "minReplicas": node.min_nodes,
                "maxReplicas": node.max_nodes,
                "rayStartParams": _start_parameters(profile, node, {node_resource(node.name): _PLENTY}),
                "template": _pod(profile, cluster, node),
            }
            for node in cluster.workers
        ],
    }


def _start_parameters(profile: Profile, node: NodeType, custom: dict[str, int]) -> dict[str, str]:
    """Options of `ray start`, for which Kubernetes wants texts."""
    parameters = {"num-cpus": str(_cpus(node))}
    if custom:
        # A shell reads it, and Ray's autoscaler, which expects it in just these quotes.
        parameters["resources"] = '"' + json.dumps(custom).replace('"', '\\"') + '"'
    if profile.spill_directory:
        parameters["object-spilling-directory"] = profile.spill_directory
    return parameters


def _same_limits(resources: dict[str, str]) -> dict[str, Any]:
    """Ray counts on what it sees when it starts, so nothing is shared beyond what was asked for."""
    return {"requests": dict(resources), "limits": dict(resources)}


def _container_security() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _pod_security() -> dict[str, Any]:
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER,
        "runAsGroup": _GROUP,
        "fsGroup": _GROUP,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _pod(profile: Profile, cluster: Cluster, node: NodeType) -> dict[str, Any]:
    """The pod template of the head or of a worker group."""
    is_head = node is cluster.head
    resources = {"cpu": f"{node.pod_cpus or node.cpus or 2:g}", "memory": f"{node.memory_gib:g}Gi"}
    if node.gpus:
        resources[_GPU] = str(node.gpus)
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{_shared_memory_gib(node)}Gi"}}
    ]
    mounts: list[dict[str, Any]] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    if profile.spill_directory:
        volumes.append({"name": "spilled-objects", "emptyDir": {}})
        mounts.append({"name": "spilled-objects", "mountPath": profile.spill_directory})
    container: dict[str, Any] = {
        "name": "ray-head" if is_head else "ray-worker",
        "image": cluster.image,
        "imagePullPolicy": "IfNotPresent",
        "env": [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
        "resources": _same_limits(resources),
        "securityContext": _container_security(),
        "volumeMounts": mounts,
    }
    if cluster.secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in cluster.secrets]
    if is_head:
        ports = {"gcs": 6379, "dashboard": 8265, "client": 10001}
        container["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    spec: dict[str, Any] = {
        "restartPolicy": "Never",  # the autoscaler replaces pods, and takes one that restarts for another node
        "securityContext": _pod_security(),
        "containers": [container],
        "volumes": volumes,
    }
    if not is_head:
        spec["automountServiceAccountToken"] = False  # only the head's autoscaler talks to Kubernetes
    if cluster.identity:
        spec["serviceAccountName"] = cluster.identity
    spec |= _scheduling(node)
    return {"metadata": {"labels": {"app.kubernetes.io/name": "congrad"}}, "spec": spec}


def _scheduling(node: NodeType) -> dict[str, Any]:
    """On which nodes of Kubernetes the pods of this kind may be."""
    scheduling: dict[str, Any] = {}
    taints = [*([_GPU] if node.gpus else []), *(_SPOT_TAINTS if node.spot else [])]
    if taints:
        scheduling["tolerations"] = [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in taints]
    if node.node_selector:
        scheduling["nodeSelector"] = dict(node.node_selector)
    if node.instances:
        of_types = {"key": "node.kubernetes.io/instance-type", "operator": "In", "values": list(node.instances)}
        terms = {"nodeSelectorTerms": [{"matchExpressions": [of_types]}]}
        scheduling["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    return scheduling


def _submitter(cluster: Cluster) -> dict[str, Any]:
    """The pod that hands the job to the head and follows its log; KubeRay gives it its command and the token."""
    return {
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": _pod_security(),
            "containers": [
                {
                    "name": "ray-job-submitter",
                    "image": cluster.image,
                    "resources": _same_limits({"cpu": "500m", "memory": "512Mi"}),
                    "securityContext": _container_security(),
                }
            ],
        }
    }
