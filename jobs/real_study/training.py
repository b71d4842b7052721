"""What a selection is worth: the same start trained on each strategy's pairs, each model in its own process."""

from __future__ import annotations

import io
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from congrad_ray.config.profile import load_profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.modeling.source import ModelSource, named_model
from congrad_ray.rundir.directory import Folder, RunDirectory
from congrad_ray.runtime.progress import duration
from congrad_ray.stages.select.schema import SELECTED
from real_study.measuring import Question, fingerprint, log_probabilities, measured, over, questions
from real_study.pairs import StudyDataError
from real_study.protocol import Cell, Protocol
from real_study.selecting import Choice, can_select, choose, own_rule
from real_study.sketches import Draw, draw, read_sketched
from study.results import Results

Row = dict[str, Any]

logger = logging.getLogger("congrad_ray.real_study")

_TOKENS = 1024  # padded, of a forward pass when measuring


@dataclass(frozen=True)
class Trial:
    """What a process needs to know that trains and measures one model, with one thread; travels to it by Ray."""

    protocol: Protocol
    recipe: Recipe
    data: Path
    run: Folder

    def asked(self) -> str:
        """What models are asked, as `fingerprint` says it."""
        asked = self._questions(named_model(self.recipe.model.name, self.recipe.model))
        return fingerprint(asked, self.recipe.model.dtype)

    def start(self) -> Row:
        """The starting model's row; its log-probabilities are written to the run."""
        before = time.monotonic()
        source = named_model(self.recipe.model.name, self.recipe.model)
        asked = self._questions(source)
        of = fingerprint(asked, self.recipe.model.dtype)
        logps = log_probabilities(source.load_model("cpu"), asked, _TOKENS)
        buffer = io.BytesIO()
        np.save(buffer, logps)
        self.run.write_bytes(start_file(of), buffer.getvalue())
        return {
            "kind": "start",
            "asked": of,
            **measured(asked, logps, logps, self.protocol.training.train.beta),
            "questions": len(asked),
            "seconds": round(time.monotonic() - before, 1),
        }

    def cell(self, cell: Cell) -> Row:
        """The row of a trained model; the start must have been measured."""
        from congrad_ray.stages.sketch.layers import base_causal_model
        from congrad_ray.stages.train.loop import TrainingJob, train_alone

        before = time.monotonic()
        training = self.protocol.training
        source = named_model(self.recipe.model.name, self.recipe.model)
        asked = self._questions(source)
        of = fingerprint(asked, self.recipe.model.dtype)
        start: NDArray[np.float64] = np.load(io.BytesIO(self.run.read_bytes(start_file(of))))
        drawn, choice, kept = selected(self.protocol, self.run, cell)
        train = training.train.model_copy(update={"learning_rate": cell.learning_rate, "seed": cell.seed})
        recipe = self.recipe.model_copy(update={"train": train})
        with tempfile.TemporaryDirectory() as scratch:
            output = RunDirectory.open(scratch)
            output.write_table("selected.parquet", training_table(drawn, choice, kept))
            model: Any = train_alone(TrainingJob(recipe, source, output, output, threads=1))
        trained = time.monotonic()
        logps = log_probabilities(base_causal_model(model).eval(), asked, _TOKENS)
        return {
            "kind": "cell",
            **asdict(cell),
            "asked": of,
            "pairs": len(kept),
            "kept": int(kept.sum()),
            "kept_by_language": dict(sorted(Counter(drawn.data.languages[kept].tolist()).items())),
            "flipped": round(float(drawn.flipped.mean()), 4),
            "flipped_kept": round(float(drawn.flipped[kept].mean()), 4),
            "planted": list(drawn.planted),
            "steps": train.max_steps,
            **measured(asked, logps, start, train.beta),
            "train_seconds": round(trained - before, 1),
            "seconds": round(time.monotonic() - before, 1),
        }

    def _questions(self, source: ModelSource) -> list[Question]:
        import torch

        torch.set_num_threads(1)
        return questions(self.protocol, self.data, self.run, source.load_tokenizer())


def start_file(asked: str) -> str:
    """The name of the file in the run that has the start's log-probabilities of these questions."""
    return f"start-{asked}.npy"


def selected(protocol: Protocol, run: Folder, cell: Cell) -> tuple[Draw, Choice, NDArray[np.bool_]]:
    """The pairs of a cell's draw, its strategy's scores, and the mask (N,) of those that it keeps.

    The draw depends on seed and variant alone: strategies of a seed choose among the same pairs.
    """
    training = protocol.training
    data = read_sketched(run, "alpaca", protocol.sketch.groups).of_languages(training.languages)
    drawn = draw(data, protocol.plantings[cell.variant], training.share, cell.seed)
    strategy = protocol.strategies[cell.strategy]
    if not can_select(strategy, data):
        raise ValueError(
            f"strategy {cell.strategy} goes by scores, which nobody gave the pairs that are trained on"
        )
    choice = choose(strategy, drawn, cell.seed)
    return drawn, choice, choice.kept(drawn.data.pairs, own_rule(strategy), training.keep)


def training_table(drawn: Draw, choice: Choice, kept: NDArray[np.bool_]) -> pa.Table:
    """The kept pairs as the select stage writes them, flipped labels as they are now; schema SELECTED."""
    pairs = drawn.data.pairs
    columns: Row = {name: pairs[name] for name in SELECTED.names if name in pairs.column_names}
    columns |= {f"ref_{side}_logps": pairs[f"{side}_logps"] for side in ("chosen", "rejected")}
    columns["congrad_score"] = pa.array(choice.scores)
    nothing = {name: pa.nulls(len(pairs), SELECTED.field(name).type) for name in SELECTED.names}
    table = pa.table([(nothing | columns)[name] for name in SELECTED.names], schema=SELECTED)
    return table.filter(pa.array(kept))


def run_training(trial: Trial, results: Results, wanted: Sequence[Cell], workers: int) -> None:
    """Trains the cells that have no result yet, `workers` at a time; the start is measured first.

    Raises StudyDataError where the results have models that were asked something else.
    """
    import ray

    from congrad_ray.runtime.session import connect

    missing = [cell for cell in wanted if not results.has({"kind": "cell", **asdict(cell)})]
    logger.info(f"{len(wanted)} cells, {len(missing)} of them to be run")
    if not missing:
        return
    asked = trial.asked()
    if any(row.get("asked", asked) != asked for row in results.rows):
        raise StudyDataError(
            "the results have models that were asked other questions, or in another dtype: the protocol's "
            "measures, the data or the tokenizer have changed; give other --run and --results"
        )
    connect(load_profile("local"), workers)
    # Each in a process of its own, which ends with it: what DeepSpeed keeps of a model is freed.
    in_a_process: Any = ray.remote(num_cpus=1, max_calls=1)
    if not results.has({"kind": "start"}) or not trial.run.exists(start_file(asked)):
        results.add(ray.get(in_a_process(Trial.start).remote(trial)))
    task = in_a_process(Trial.cell)
    began, waiting = time.monotonic(), list(missing)
    running: list[Any] = []
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(task.remote(trial, waiting.pop(0)))
        [ended], running = ray.wait(running)
        row = ray.get(ended)
        results.add(row)
        number = len(missing) - len(waiting) - len(running)
        left = (time.monotonic() - began) / number * (len(missing) - number)
        accuracy = over(row["held_out_accuracy"], trial.protocol.training.languages)
        logger.info(
            f"{number}/{len(missing)} {row['variant']} {row['strategy']} seed {row['seed']} rate "
            f"{row['learning_rate']:g}: held-out accuracy {accuracy:.3f}, {row['seconds']:.0f} s; "
            f"{duration(left)} left"
        )
