"""Plans and demands of all stages, and what there is for them."""

from __future__ import annotations

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.pipeline.order import ITERATED, wanted_stages
from congrad_ray.planning import lengths, plan
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.planning.estimate import Planned
from congrad_ray.planning.volume import Lengths
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.resources import Demand, Machine, Node, cluster_machine
from congrad_ray.runtime.session import connect, machine, this_machine


def demands(recipe: Recipe, profile: Profile) -> list[Demand]:
    """What every stage asks for, in order."""
    return [stage.demand(recipe, profile) for stage in wanted_stages(recipe)]


def max_cpus(recipe: Recipe, profile: Profile) -> float:
    """CPUs of the hungriest stage with its full pool: what a Ray started for this run is given."""
    return max(demand.max_cpus for demand in demands(recipe, profile))


def known_lengths(recipe: Recipe, assumptions: Assumptions, run: RunDirectory | None) -> Lengths:
    """As `planning.lengths.known_lengths`, of the stages of an iteration."""
    return lengths.known_lengths(ITERATED, recipe, assumptions, run)


def make_plan(planned: Planned, there_is: Machine) -> plan.Plan:
    """The plan of all stages and iterations. Runs nothing."""
    return plan.make_plan(wanted_stages(planned.recipe), planned, there_is)


def where_it_runs(recipe: Recipe, profile: Profile, assumptions: Assumptions) -> Machine:
    """The profile's cluster with all its nodes, else a machine assumed, the cluster to connect to, or this one."""
    if profile.cluster is not None:
        return cluster_machine(profile.cluster)
    here = assumptions.machine_cpus is None and assumptions.machine_gpus is None
    cpus = max_cpus(recipe, profile)
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
