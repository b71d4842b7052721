"""What a plan is made from beside recipe and profile: models' shapes, a run's manifests, and what there is."""

from __future__ import annotations

from dataclasses import replace

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.modeling.shape import read_shape
from congrad_ray.modeling.source import check_models
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.plan import Shapes
from congrad_ray.planning.storage import measured_row_bytes
from congrad_ray.planning.tokens import Lengths, assumed_lengths, with_measured
from congrad_ray.rundir.directory import Manifest, RunDirectory
from congrad_ray.runtime.resources import Machine, Node, cluster_machine, most_cpus
from congrad_ray.runtime.session import connect, machine, this_machine

_FOLDERS = (
    ("generate", "responses"),
    ("judge", "judgements"),
    ("pair", "pairs"),
    ("sketch", "sketches"),
    ("select", "selection"),
    ("evaluate", "evaluation"),
)


def read_shapes(recipe: Recipe) -> Shapes:
    """The shapes of a recipe's models. Raises ModelError as `check_models` and `read_shape` do."""
    check_models(recipe)
    policy = read_shape(recipe.model.name, recipe.model)
    found = {recipe.model.name: policy, "policy": policy, "start": policy}
    other = recipe.model.model_copy(update={"revision": None})
    for name in (recipe.judge.model, recipe.evaluate.judge):
        if name not in found:
            found[name] = read_shape(name, other)
    return Shapes(policy, found[recipe.judge.model], found[recipe.evaluate.judge])


def known_lengths(recipe: Recipe, assumptions: Assumptions, run: RunDirectory | None) -> Lengths:
    """Lengths, from the newest iteration of a run that has generated, and assumed where it does not know."""
    lengths = assumed_lengths(recipe, assumptions)
    if run is None:
        return lengths
    for iteration in reversed(range(recipe.iterations)):
        found = {
            stage: manifest for stage, folder in _FOLDERS if (manifest := run.stage(folder, iteration).manifest())
        }
        if "generate" in found:
            of_run = _of_one_making(found)
            known = with_measured(lengths, recipe, of_run)
            return replace(known, row_bytes=measured_row_bytes(recipe, of_run))
    return lengths


def _of_one_making(manifests: dict[str, Manifest]) -> dict[str, Manifest]:
    """Without stages whose input is not the result that is there now."""
    kept = {"generate": manifests["generate"]}
    for stage, before in (("judge", "generate"), ("pair", "generate"), ("sketch", "pair"), ("select", "sketch")):
        manifest = manifests.get(stage)
        if manifest and before in kept and kept[before].fingerprint in manifest.inputs.values():
            kept[stage] = manifest
    evaluate = manifests.get("evaluate")
    if evaluate and evaluate.inputs.get("prompts") == kept["generate"].inputs.get("prompts"):
        kept["evaluate"] = evaluate
    return kept


def where_it_runs(recipe: Recipe, profile: Profile, assumptions: Assumptions) -> Machine:
    """The profile's cluster with all its nodes, else a machine assumed, the cluster to connect to, or this one."""
    if profile.cluster is not None:
        return cluster_machine(profile.cluster)
    here = assumptions.machine_cpus is None and assumptions.machine_gpus is None
    cpus = most_cpus(recipe, profile)
    if here and profile.ray_address:
        connect(profile, cpus)
        return machine()
    found = this_machine(profile, cpus)
    if here:
        return found
    cpus = found.cpus if assumptions.machine_cpus is None else assumptions.machine_cpus
    gpus = found.gpus if assumptions.machine_gpus is None else float(assumptions.machine_gpus)
    memory = assumptions.machine_memory_gib or found.memory_gib
    return Machine(cpus, gpus, memory, "the machine assumed", (Node("the machine", cpus, gpus),))
