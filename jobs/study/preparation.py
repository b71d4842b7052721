"""The shared part of the study: one start per seed, and one generate, judge, pair and sketch per variant."""

from __future__ import annotations

import shutil
from pathlib import Path

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.generate import stage as generate
from congrad_ray.stages.judge import stage as judge
from congrad_ray.stages.pair import stage as pair
from congrad_ray.stages.prompts import stage as prompts
from congrad_ray.stages.select import stage as select
from congrad_ray.stages.sketch import stage as sketch
from congrad_ray.stages.train import stage as train
from congrad_ray.world.model import biased_judge
from congrad_ray.world.tasks import KINDS
from study.protocol import Cell, Protocol

_SHARED = ("prompts", "iteration-0/responses")
_SHARED_PAIRS = (*_SHARED, "iteration-0/judgements", "iteration-0/pairs")


def recipe_of(protocol: Protocol, seed: int, variant: str) -> Recipe:
    """The recipe of one seed's start in one variant; trains the variant's judge if it is not in the cache."""
    biases = protocol.variants[variant].judge
    changes: dict[str, object] = {"seed": seed}
    if biases:
        path = biased_judge(seed, biases)
        changes["judge"] = protocol.recipe.judge.model_copy(update={"model": str(path)})
    kinds = [kind for kind in KINDS if kind not in protocol.held_out_kinds]
    source = protocol.recipe.prompts.train.model_copy(update={"kinds": kinds})
    changes["prompts"] = protocol.recipe.prompts.model_copy(update={"train": source})
    return protocol.recipe.model_copy(update=changes)


def prepare(protocol: Protocol, seed: int, variant: str, profile: Profile, root: Path) -> RunDirectory:
    """The run directory with the pairs and sketches of a seed and variant; what is there already is kept.

    Variants whose judgements are the same share a directory, and all variants of a seed share the responses.
    """
    biases = protocol.variants[variant].judge
    same = next(name for name, other in protocol.variants.items() if other.judge == biases)
    recipe = recipe_of(protocol, seed, same)
    shared, folder = root / f"seed-{seed}", root / f"seed-{seed}-{same}"

    for stage in (prompts.STAGE, generate.STAGE):
        run_stage(stage, recipe, profile, RunDirectory.open(shared))
    _share(shared, folder, _SHARED)
    run = RunDirectory.open(folder)
    for stage in (judge.STAGE, pair.STAGE, sketch.STAGE):
        run_stage(stage, recipe, profile, run)
    return run


def prepare_exact(prepared: RunDirectory, recipe: Recipe, profile: Profile) -> tuple[RunDirectory, Recipe]:
    """The pairs of `prepared` with exact gradients in the place of sketches, and the recipe of those."""
    sketched = Path(prepared.path)
    exact = recipe.sketch.model_copy(update={"method": "exact", "groups": 1})
    recipe = recipe.model_copy(update={"sketch": exact})
    folder = sketched.with_name(f"{sketched.name}-exact")
    _share(sketched, folder, _SHARED_PAIRS)
    run = RunDirectory.open(folder)
    run_stage(sketch.STAGE, recipe, profile, run)
    return run, recipe


def iterate(
    protocol: Protocol, cell: Cell, prepared: RunDirectory, recipe: Recipe, profile: Profile
) -> RunDirectory:
    """The run directory of a cell of several iterations: the pipeline itself, stage by stage, without evaluation.

    The first iteration starts from what `prepare` gave, with `recipe_of` its seed and variant. Raises ValueError
    for what the pipeline cannot do: a strategy that knows the truth, a variant that leaves out pairs.
    """
    strategy, variant = protocol.strategies[cell.strategy], protocol.variants[cell.variant]
    if isinstance(strategy, str) or variant.pairs:
        raise ValueError(f"{cell.strategy} in {cell.variant} cannot have {cell.iterations} iterations")
    recipe = recipe.model_copy(
        update={
            "iterations": cell.iterations,
            "select": strategy.model_copy(update={"keep": cell.keep}),
            "train": recipe.train.model_copy(update={"learning_rate": cell.learning_rate}),
        }
    )
    source = Path(prepared.path)
    folder = source.with_name(f"{source.name}-{cell.strategy}-{cell.keep:g}-{cell.learning_rate:g}")
    _share(source, folder, (*_SHARED_PAIRS, "iteration-0/sketches"))
    run = RunDirectory.open(folder)
    for iteration in range(cell.iterations):
        for stage in (generate.STAGE, judge.STAGE, pair.STAGE, sketch.STAGE, select.STAGE, train.STAGE):
            run_stage(stage, recipe, profile, run, iteration)
    return run


def _share(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copies what is not there yet; a copy that was cut off is made again."""
    for name in names:
        if not (target / name).exists():
            partial = target / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source / name, partial)
            partial.rename(target / name)
