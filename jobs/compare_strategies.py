"""One recipe under several ways to select, from the same responses, judgements and sketches.

    python jobs/compare_strategies.py jobs/recipes/llama3-8b.yaml --run runs/llama3-8b --profile node-8gpu

RUN/shared gets iteration 0 up to its sketches. The run of every strategy, RUN/all, RUN/random, ..., begins as a
copy of that and goes on to the recipe's end by itself. RUN/tables has the numbers of their reports, side by side.
Run the same command again to resume. docs/how-to/reproduce-the-paper.md says more.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.fs as pafs

from congrad_ray.config.printable import without_keys
from congrad_ray.config.profile import Profile, load_profile
from congrad_ray.config.recipe import load_recipe
from congrad_ray.pipeline.loop import run_all
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.logs import configure

logger = logging.getLogger("congrad_ray.jobs")

STRATEGIES: Mapping[str, Sequence[str]] = {
    "all": ["select.strategy=all"],
    "random": ["select.strategy=random"],
    "reward_gap": ["select.strategy=reward_gap"],
    "no_surgery": ["select.strategy=no_surgery"],
    "congrad": ["select.strategy=congrad"],
    "consensus": ["select.strategy=congrad", "select.direction=consensus", "select.keep_rule=overall"],
}


def main() -> None:
    arguments = parser().parse_args()
    try:
        profile = load_profile(arguments.profile)
        root = RunDirectory.open(profile.run_uri(arguments.run))
        configure(profile.log_format, run=without_keys(arguments.run))
        compare(arguments.recipe, root, profile, arguments.strategies, arguments.set, arguments.until)
    except ValueError as error:
        sys.exit(f"error: {error}")


def parser() -> argparse.ArgumentParser:
    """The script's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a recipe YAML")
    parser.add_argument("--run", required=True, help="folder or URI for the runs of all strategies")
    parser.add_argument("--profile", default="local", help="a profile YAML or its name")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a setting for all")
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--until", help="the last stage of every strategy's run")
    return parser


def compare(
    recipe: Path,
    root: RunDirectory,
    profile: Profile,
    strategies: Sequence[str],
    overrides: Sequence[str] = (),
    until: str | None = None,
) -> None:
    """Runs all strategies in `root`, one after another. Raises ValueError as `run_all` does."""
    recipes = {name: load_recipe(recipe, [*overrides, *STRATEGIES[name]]) for name in strategies}
    shared = _inside(root, "shared")
    run_all(load_recipe(recipe, [*overrides, "iterations=1"]), profile, shared, until="sketch")
    for name, changed in recipes.items():
        logger.info(f"strategy {name}")
        branch(shared, _inside(root, name))
        run_all(changed, profile, _inside(root, name), until)
    gather(root, strategies)


def branch(shared: RunDirectory, run: RunDirectory) -> None:
    """Copies a run; a copy that was cut off is made again, one whose selection has begun is left alone."""
    if run.exists("iteration-0/selection"):
        return
    pafs.copy_files(
        shared.path, run.path, source_filesystem=shared.filesystem, destination_filesystem=run.filesystem
    )


def gather(root: RunDirectory, strategies: Sequence[str]) -> None:
    """Writes RUN/tables: every table of the reports, of all strategies that have it, with a column `strategy`."""
    found: dict[str, list[dict[str, str]]] = {}
    for strategy in strategies:
        tables = _inside(root, f"{strategy}/report/tables")
        for path in tables.files(".csv"):
            name = path.rpartition("/")[2]
            read = csv.DictReader(io.StringIO(tables.read_bytes(name).decode()))
            found.setdefault(name, []).extend({"strategy": strategy, **row} for row in read)
    for name, rows in found.items():
        sink = io.StringIO()
        writer = csv.DictWriter(sink, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        _inside(root, "tables").write_bytes(name, sink.getvalue().encode())
    if found:
        logger.info(f"tables of {', '.join(strategies)}: {root.path}/tables")


def _inside(root: RunDirectory, name: str) -> RunDirectory:
    return RunDirectory(root.filesystem, f"{root.path}/{name}")


if __name__ == "__main__":
    main()
