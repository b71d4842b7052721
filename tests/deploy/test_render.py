"""Files made of profiles: the committed ones are up to date, and what cannot be rendered is reported."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from congrad_ray.cli import main as cli
from congrad_ray.config.profile import load_profile
from congrad_ray.config.recipe import Recipe, load_recipe
from congrad_ray.config.settings import SettingsError, parse_yaml, validate
from congrad_ray.deploy.render import RenderError, launcher, ray_cluster, ray_job, to_text

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "jobs/recipes/llama3-8b.yaml"
MADE = ["aws.yaml", "gcp.yaml", *(f"kubernetes/{name}.yaml" for name in ("raycluster", "rayjob", "rayjob-sketch"))]


@pytest.mark.parametrize("name", MADE)
def test_a_committed_file_is_what_its_first_line_says_makes_it(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    committed = (ROOT / "cluster" / name).read_text(encoding="utf-8")
    command = committed.splitlines()[0].removeprefix("# Made by: congrad ")
    cli.app([*shlex.split(command), "--out", str(tmp_path / "made.yaml")], standalone_mode=False)
    assert (tmp_path / "made.yaml").read_text(encoding="utf-8") == committed, (
        f"congrad {command} --out cluster/{name}"
    )


def test_text_is_yaml_that_reads_as_the_same_again() -> None:
    documents = ray_job(load_profile("kubernetes"), load_recipe(ROOT / RECIPE), "mine")
    assert list(yaml.safe_load_all(to_text(documents, "two\nlines"))) == documents


def test_a_job_carries_its_recipe_and_profile_and_reads_them_where_they_are_mounted() -> None:
    profile, recipe = load_profile("kubernetes"), load_recipe(ROOT / RECIPE, ["iterations=2"])
    settings, job = ray_job(profile, recipe, "mine", "sketch", 1)
    assert validate(Recipe, parse_yaml(settings["data"]["recipe.yaml"]), "again") == recipe
    assert job["spec"]["entrypoint"] == (
        "congrad sketch /etc/congrad/recipe.yaml --run s3://my-bucket/congrad/mine --iteration 1 "
        "--profile /etc/congrad/profile.yaml"
    )
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert head["containers"][0]["volumeMounts"][-1]["mountPath"] == "/etc/congrad"
    assert head["volumes"][-1]["configMap"]["name"] == settings["metadata"]["name"] == "llama3-8b-sketch-1"
    assert job["spec"]["backoffLimit"] == 2 and job["spec"]["shutdownAfterJobFinishes"] is True


def test_pods_of_gpus_on_spot_may_be_where_others_may_not() -> None:
    groups = ray_cluster(load_profile("kubernetes"))["spec"]["workerGroupSpecs"]
    keys = {
        group["groupName"]: [toleration["key"] for toleration in group["template"]["spec"]["tolerations"]]
        for group in groups
    }
    assert "nvidia.com/gpu" in keys["gpu"] and "nvidia.com/gpu" not in keys["cpu"]
    assert "cloud.google.com/gke-spot" in keys["gpu"]


def test_pods_share_memory_and_get_secrets_by_name() -> None:
    pod = ray_cluster(load_profile("kubernetes"))["spec"]["workerGroupSpecs"][1]["template"]["spec"]
    assert pod["volumes"][0]["emptyDir"] == {"medium": "Memory", "sizeLimit": "192Gi"}
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "congrad"}}]


@pytest.mark.parametrize(
    ("profile", "overrides", "message"),
    [
        ("local", [], "profile local has no section `cluster`"),
        ("kubernetes", [], "cluster.provider is kubernetes, and --what launcher is for aws or gcp"),
        ("aws-spot", ["cluster.host_image=null"], "a launcher file needs cluster.host_image"),
        ("gcp-spot", ["cluster.project=null"], "a launcher file needs cluster.project"),
        ("gcp-spot", ["cluster.zones=[us-central1-a, us-central1-b]"], "2 zones"),
        ("aws-spot", ["cluster.head.instances=[]"], "the nodes 'head' of the cluster need `instances`"),
        ("aws-spot", ["cluster.head.cpus=0.5"], "cpus of the nodes 'head' is 0.5"),
    ],
)
def test_what_cannot_be_rendered_names_the_setting(profile: str, overrides: list[str], message: str) -> None:
    with pytest.raises(RenderError, match=message):
        launcher(load_profile(profile, overrides))


def test_a_run_directory_that_pods_do_not_share_is_refused() -> None:
    profile, recipe = load_profile("kubernetes", ["storage=null"]), load_recipe(ROOT / RECIPE)
    with pytest.raises(SettingsError, match="a cluster's nodes share no such folder"):
        ray_job(profile, recipe, "runs/mine")


def test_names_are_those_that_kubernetes_takes() -> None:
    recipe = load_recipe(ROOT / RECIPE, ["name='My Very Long Name of a Recipe_with.Everything in It'"])
    name = ray_job(load_profile("kubernetes"), recipe, "mine", "evaluate", 0)[1]["metadata"]["name"]
    assert name == "my-very-long-name-of-a-recipe-with-everything-i"
