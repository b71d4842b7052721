"""The study on a real model: what selection keeps of real pairs in several languages, and what that is worth.

    python jobs/run_real_study.py sketch PROTOCOL --data DATA --model MODEL --run RUN --results FILE
    python jobs/run_real_study.py select ...    what every strategy keeps where labels are wrong, without training
    python jobs/run_real_study.py train ...     training on the selections (--tuning: for the learning rate alone;
                                                one cell: --seeds 121 --variants clean --strategies congrad)
    python jobs/run_real_study.py report ...    the results as tables in docs/results/real-model.md

PROTOCOL is jobs/real_study/protocol.yaml, or one of your own. DATA is a folder with preferences.jsonl,
eval_prompts.jsonl, tata.jsonl and xcopa.jsonl; MODEL a Hugging Face folder. Every verb needs the ones before it
and takes the same arguments. What is known is kept in RUN and FILE at once: run the same command again to resume.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from congrad_ray.config.fields import TensorType
from congrad_ray.config.recipe import Recipe
from congrad_ray.modeling.source import ModelSource, named_model
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.logs import configure
from real_study.protocol import DATASETS, KEYS, cells, load_protocol, recipe_for, tuning_cells
from study.results import Results

logger = logging.getLogger("congrad_ray.real_study")

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "results" / "real-model.md"
VERBS = ("sketch", "select", "train", "report")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("protocol", type=Path, help="a protocol YAML; see jobs/real_study/protocol.yaml")
    parser.add_argument("--data", type=Path, help="folder of the preference files; not for select and report")
    parser.add_argument("--model", help="folder of the model; not for select and report")
    parser.add_argument(
        "--chat-template",
        type=Path,
        default=HERE / "real_study" / "open_answer.jinja",
        help="Jinja file; by default one without turns and ends, since answers are cut",
    )
    parser.add_argument("--run", type=Path, help="folder for pairs and sketches; not for report")
    parser.add_argument("--results", type=Path, required=True, help="the results file, one JSON object a line")
    parser.add_argument("--threads", type=int, default=2, help="sketch: of torch")
    parser.add_argument(
        "--datasets", nargs="+", choices=DATASETS, default=DATASETS, help="sketch, select: these alone"
    )
    parser.add_argument("--workers", type=int, default=2, help="train: models at once, one CPU each")
    only: tuple[tuple[str, str, type], ...] = (
        ("seed", "--seeds", int),
        ("variant", "--variants", str),
        ("strategy", "--strategies", str),
    )
    for name, option, kind in only:
        parser.add_argument(
            option, dest=name, type=kind, nargs="+", help=f"train: only the cells of a {name} named"
        )
    parser.add_argument("--tuning", action="store_true", help="train: only the cells for the learning rate")
    parser.add_argument("--page", type=Path, default=PAGE, help="report: the page whose tables are written")
    arguments = parser.parse_args()
    for name in {"sketch": ("data", "model", "run"), "train": ("data", "model", "run"), "select": ("run",)}.get(
        arguments.verb, ()
    ):
        if getattr(arguments, name) is None:
            parser.error(f"{arguments.verb} needs --{name}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    configure()
    protocol = load_protocol(arguments.protocol)
    results = Results(arguments.results, KEYS)
    if arguments.verb == "report":
        from real_study.report import write_tables

        write_tables(results.rows, protocol, arguments.page)
        return
    run = RunDirectory.open(arguments.run, "--run")
    if arguments.verb == "select":
        from real_study.selecting import run_selection

        run_selection(protocol, run, results, arguments.datasets)
        return

    def recipe_in(dtype: TensorType) -> tuple[Recipe, ModelSource]:
        recipe = recipe_for(protocol, arguments.model, arguments.chat_template, dtype)
        return recipe, named_model(recipe.model.name, recipe.model)

    if arguments.verb == "sketch":
        from real_study.sketching import embedding_sketches, exact_gram, sketch_dataset, write_pairs

        for dataset in arguments.datasets:
            recipe, source = recipe_in(getattr(protocol, dataset).dtype)
            write_pairs(dataset, protocol, source, arguments.data, run)
            sketch_dataset(dataset, protocol, recipe, source, run, arguments.threads)
            if dataset == "alpaca":
                exact_gram(protocol, recipe, source, run, arguments.threads)
                embedding_sketches(protocol, source, run, arguments.threads)
        return
    from real_study.training import Trial, run_training

    wanted = list(tuning_cells(protocol.training) if arguments.tuning else cells(protocol))
    for name, option, _ in only:
        if named := getattr(arguments, name):
            known = {getattr(cell, name) for cell in wanted}
            if unknown := [value for value in named if value not in known]:
                parser.error(f"{option}: no cell has {unknown[0]}; there are {', '.join(map(str, sorted(known)))}")
            wanted = [cell for cell in wanted if getattr(cell, name) in named]
    recipe, _ = recipe_in(protocol.training.dtype)
    run_training(Trial(protocol, recipe, arguments.data.resolve(), run), results, wanted, arguments.workers)


if __name__ == "__main__":
    main()
