"""The study: does filtering by gradient agreement help, and where? Selection strategies on the built-in world.

    python jobs/study.py jobs/recipes/study.yaml --run runs/study --results runs/study/results.jsonl

Every row of results is appended when it is known; the same command again goes on with what is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python puts a script's own folder first, where select.py would stand in for the standard library's module.
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import argparse
import json
import time
from typing import Any

from congrad_ray.plan import most_cpus
from congrad_ray.profile import Profile, load_profile
from congrad_ray.session import connect
from congrad_ray.study.analysis import cut_torn_line, read_results, without_seeds
from congrad_ray.study.preparation import iterate, prepare, recipe_of
from congrad_ray.study.protocol import START, Cell, Protocol, cells, load_protocol
from congrad_ray.study.report import write_report

_WHAT = ("seed", "variant", "strategy", "keep", "learning_rate", "iterations")


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a results row is about."""
    return (row["kind"], *(row.get(name) for name in _WHAT))


class Results:
    """The results file: what it holds, and one more line whenever something is known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            cut_torn_line(path)  # left by a kill; the next row would be glued to it
        self.rows = read_results(path) if path.exists() else []
        self._known = {key_of(row) for row in self.rows}

    def has(self, cell: Cell, kind: str = "cell") -> bool:
        names = _WHAT if kind == "cell" else _WHAT[:4]
        values = {name: getattr(cell, name) for name in names}
        return key_of({"kind": kind, **values}) in self._known

    def add(self, row: dict[str, Any]) -> None:
        if key_of(row) in self._known:
            return
        self._known.add(key_of(row))
        self.rows.append(row)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", type=Path, help="a protocol YAML; see jobs/recipes/study.yaml")
    parser.add_argument("--run", type=Path, required=True, help="folder for models, pairs and sketches")
    parser.add_argument("--results", type=Path, required=True, help="the results file, one JSON object a line")
    parser.add_argument("--report", type=Path, help="write the report, an HTML file, at the end")
    parser.add_argument("--tuning", action="store_true", help="run the tuning block only")
    parser.add_argument("--only-report", action="store_true", help="run nothing, write the report")
    parser.add_argument("--seeds", type=int, nargs="+", help="only cells of these seeds")
    parser.add_argument("--exact", action="store_true", help="run the check with exact gradients only")
    parser.add_argument("--workers", type=int, default=2, help="cells at once, one CPU each")
    parser.add_argument("--profile", default="local", help="a profile YAML or its name")
    arguments = parser.parse_args()
    protocol, profile = load_protocol(arguments.protocol), load_profile(arguments.profile)
    results = Results(arguments.results)
    if not arguments.only_report:
        blocks = [protocol.tuning] if arguments.tuning else protocol.blocks
        connect(profile, max(arguments.workers, most_cpus(protocol.recipe, profile)))
        if arguments.exact:
            check_with_exact(protocol, profile, arguments.run.resolve(), results)
        for number, block in enumerate([] if arguments.exact else blocks, 1):
            wanted = [cell for cell in cells(block) if not arguments.seeds or cell.seed in arguments.seeds]
            log(f"block {number} of {len(blocks)}")
            run_cells(protocol, wanted, profile, arguments.run.resolve(), results, arguments.workers)
    if arguments.report:
        compared = without_seeds(results.rows, protocol.tuning.seeds)
        write_report(compared, arguments.report, arguments.protocol.read_text(encoding="utf-8"))
        log(f"report: {arguments.report}")


def run_cells(
    protocol: Protocol, wanted: list[Cell], profile: Profile, root: Path, results: Results, workers: int
) -> None:
    """Runs the cells that have no result yet, in their order, on `workers` Ray actors of one CPU each."""
    import ray
    from ray.util import ActorPool

    from congrad_ray.study.trial import Trials

    missing = [cell for cell in wanted if not results.has(cell)]
    log(f"{len(wanted)} cells, {len(missing)} of them to be run")
    if not missing:
        return
    places = dict.fromkeys((cell.seed, cell.variant) for cell in missing)
    folders = {place: str(prepare(protocol, *place, profile, root, log).path) for place in places}
    several = [cell for cell in missing if cell.iterations > 1]
    iterated = {cell: str(iterate(protocol, cell, profile, root, log).path) for cell in several}
    recipes = {place: recipe_of(protocol, *place, log) for place in folders}
    seeds = dict.fromkeys(cell.seed for cell in wanted)
    starts = [Cell(seed, "", START, 1.0, 0.0) for seed in seeds]
    tasks = [start for start in starts if not results.has(start)] + missing
    actors: list[Any] = [ray.remote(Trials).options(num_cpus=1).remote(protocol) for _ in range(workers)]
    pool = ActorPool(actors)

    def submit(actor: Any, cell: Cell) -> Any:
        if cell.strategy == START:
            return actor.start.remote(cell.seed)
        if cell in iterated:
            return actor.iterated.remote(cell, iterated[cell])
        place = (cell.seed, cell.variant)
        return actor.run.remote(cell, recipes[place], folders[place])

    began = time.monotonic()
    for number, found in enumerate(pool.map_unordered(submit, tasks), 1):
        rows = found if isinstance(found, tuple) else (found,)
        for row in rows:
            results.add(row)
        row, left = rows[0], (time.monotonic() - began) / number * (len(tasks) - number)
        log(
            f"{number}/{len(tasks)} seed {row['seed']} {row['variant']} {row['strategy']} keep {row['keep']:g} "
            f"rate {row['learning_rate']:g}: seen {row['seen']:.4f}, unseen {row['unseen']:.4f}, held out "
            f"{row['held_out']:.4f}, {row['tokens']:.1f} tokens; {left / 60:.0f} min left"
        )
    for actor in actors:  # their CPUs are needed for the next preparation
        ray.kill(actor)


def check_with_exact(protocol: Protocol, profile: Profile, root: Path, results: Results) -> None:
    """Repeats the selections of the strategies that have a direction with exact gradients."""
    from congrad_ray.recipe import Select
    from congrad_ray.study.preparation import prepare_exact
    from congrad_ray.study.strategies import against_exact, prepared, select

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
            run, recipe = prepare_exact(protocol, seed, variant, profile, root, log)
            most = protocol.variants[variant].pairs
            exact = prepared(run, most)
            sketched = prepared(prepare(protocol, seed, variant, profile, root, log), most)
            for name, strategy in directed.items():
                row = against_exact(
                    select(sketched, recipe_of(protocol, seed, variant, log), strategy, keep),
                    select(exact, recipe, strategy, keep),
                )
                results.add(
                    {"kind": "exact", "seed": seed, "variant": variant, "strategy": name, "keep": keep, **row}
                )
                log(f"seed {seed} {variant} {name}: {row}")


if __name__ == "__main__":
    main()
