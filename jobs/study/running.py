"""Running the study's cells on Ray."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe, Select
from congrad_ray.rundir.directory import RunDirectory
from study.preparation import iterate, prepare, prepare_exact, recipe_of
from study.protocol import EVERYTHING, START, Cell, Protocol
from study.results import Results

logger = logging.getLogger("congrad_ray.study")


def run_cells(
    protocol: Protocol, wanted: list[Cell], profile: Profile, root: Path, results: Results, workers: int
) -> None:
    """Runs the cells that have no result yet, in their order, on `workers` Ray actors of one CPU each."""
    import ray
    from ray.util import ActorPool

    from study.trial import Trials

    missing = [cell for cell in wanted if not _known(results, cell)]
    starts = [Cell(seed, "", START, 1.0, 0.0) for seed in dict.fromkeys(cell.seed for cell in wanted)]
    tasks = [start for start in starts if not _known(results, start)] + missing
    logger.info(f"{len(wanted)} cells, {len(missing)} of them to be run")
    if not tasks:
        return
    places = dict.fromkeys((cell.seed, cell.variant) for cell in missing)
    runs = {place: prepare(protocol, *place, profile, root) for place in places}
    recipes = {place: recipe_of(protocol, *place) for place in places}
    diagnose(protocol, recipes, runs, results)
    iterated: dict[Cell, RunDirectory] = {}
    for cell in missing:
        if cell.iterations > 1:
            place = (cell.seed, cell.variant)
            iterated[cell] = iterate(protocol, cell, runs[place], recipes[place], profile)
    actors: list[Any] = [ray.remote(Trials).options(num_cpus=1).remote(protocol) for _ in range(workers)]
    pool = ActorPool(actors)

    def submit(actor: Any, cell: Cell) -> Any:
        if cell.strategy == START:
            return actor.start.remote(cell.seed)
        if cell in iterated:
            return actor.iterated.remote(cell, iterated[cell].path)
        place = (cell.seed, cell.variant)
        return actor.run.remote(cell, recipes[place], runs[place].path)

    began = time.monotonic()
    for number, row in enumerate(pool.map_unordered(submit, tasks), 1):
        results.add(row)
        left = (time.monotonic() - began) / number * (len(tasks) - number)
        logger.info(
            f"{number}/{len(tasks)} seed {row['seed']} {row['variant']} {row['strategy']} keep {row['keep']:g} "
            f"rate {row['learning_rate']:g}: seen {row['seen']:.4f}, unseen {row['unseen']:.4f}, held out "
            f"{row['held_out']:.4f}, {row['tokens']:.1f} tokens; {left / 60:.0f} min left"
        )
    for actor in actors:  # their CPUs are needed for the next preparation
        ray.kill(actor)


def diagnose(
    protocol: Protocol,
    recipes: dict[tuple[int, str], Recipe],
    runs: dict[tuple[int, str], RunDirectory],
    results: Results,
) -> None:
    """What can be said of every strategy's selection without training, at all keep ratios of the protocol."""
    from study.trial import Trials

    keeps = sorted({keep for block in protocol.blocks for keep in block.keeps})
    trials = Trials(protocol)
    for (seed, variant), recipe in recipes.items():
        for strategy in protocol.strategies:
            for keep in [1.0] if strategy == EVERYTHING else keeps:
                cell = Cell(seed, variant, strategy, keep, 0.0)
                if not _known(results, cell, "selection"):
                    results.add(trials.selection_row(cell, recipe, runs[seed, variant].path))


def check_with_exact(protocol: Protocol, profile: Profile, root: Path, results: Results) -> None:
    """Repeats the selections of the strategies that have a direction with exact gradients."""
    from study.strategies import against_exact, prepared, select

    keep = protocol.exact.keep
    directed = {
        name: strategy
        for name, strategy in protocol.strategies.items()
        if isinstance(strategy, Select)
        and strategy.strategy in ("congrad", "no_surgery")
        and not strategy.per_block
    }
    for seed in protocol.exact.seeds:
        for variant in protocol.exact.variants:
            run = prepare(protocol, seed, variant, profile, root)
            recipe = recipe_of(protocol, seed, variant)
            exact_run, exact_recipe = prepare_exact(run, recipe, profile)
            most = protocol.variants[variant].pairs
            sketched, exact = prepared(run, most), prepared(exact_run, most)
            for name, strategy in directed.items():
                row = against_exact(
                    select(sketched, recipe, strategy, keep), select(exact, exact_recipe, strategy, keep)
                )
                results.add(
                    {"kind": "exact", "seed": seed, "variant": variant, "strategy": name, "keep": keep, **row}
                )
                logger.info(f"seed {seed} {variant} {name}: {row}")


def _known(results: Results, cell: Cell, kind: str = "cell") -> bool:
    return results.has({"kind": kind, **asdict(cell)})
