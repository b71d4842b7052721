"""One cell of the study: train from the start on a selection, sample answers, score them by the truth."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from congrad_ray.config.recipe import Recipe
from congrad_ray.modeling.source import ModelSource, named_model
from congrad_ray.rundir.directory import Folder, RunDirectory
from congrad_ray.stages.select.schema import SELECTED
from congrad_ray.stages.train.loop import TrainingJob, train_alone
from congrad_ray.stages.train.schedule import make_schedule
from congrad_ray.world.score import true_score
from congrad_ray.world.tasks import KINDS, WorldPrompt, world_prompts
from study.protocol import EVERYTHING, START, Cell, Protocol
from study.sampling import sampled_answers
from study.strategies import Choice, Prepared, facts, prepared, select

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = dict[str, Any]


class Trials:
    """Runs cells in one process (a Ray actor) with one thread; keeps the pairs that it read last."""

    def __init__(self, protocol: Protocol) -> None:
        torch.set_num_threads(1)
        self._protocol = protocol
        self._data: tuple[tuple[int, str], Prepared] | None = None

    def start(self, seed: int) -> Row:
        """The row of a seed's starting model."""
        model = self._protocol.recipe.model
        source = named_model(model.name, model, seed)
        before = time.monotonic()
        measures = self._measure(source.load_model("cpu"), source, seed)
        nothing = asdict(Cell(seed, "", START, 1.0, 0.0)) | {"pairs": 0, "kept": 0, "steps": 0}
        return {"kind": "cell", **nothing, **measures, "seconds": round(time.monotonic() - before, 1)}

    def run(self, cell: Cell, recipe: Recipe, folder: str) -> Row:
        """The row of a trained model. `folder` is what `prepare` made."""
        before = time.monotonic()
        data, choice = self.choice(cell, recipe, folder)
        source = named_model(recipe.model.name, recipe.model, cell.seed)
        train = recipe.train.model_copy(update={"learning_rate": cell.learning_rate})
        recipe = recipe.model_copy(update={"train": train})
        with tempfile.TemporaryDirectory() as scratch:
            output = RunDirectory.open(scratch)
            write_selected(output, data, choice)
            schedule = make_schedule(train, int(choice.kept.sum()))
            model: Any = train_alone(TrainingJob(recipe, source, output, output, threads=1))
        counts = {"pairs": len(data.pairs), "kept": schedule.pairs, "steps": schedule.total_steps}
        row = {"kind": "cell", **asdict(cell), **counts, **self._measure(model, source, cell.seed)}
        return {**row, "seconds": round(time.monotonic() - before, 1)}

    def iterated(self, cell: Cell, folder: str) -> Row:
        """The row of the model that `iterate` left in `folder`."""
        before = time.monotonic()
        run = RunDirectory.open(folder)
        sketches, policy = (run.stage(name, cell.iterations - 1) for name in ("sketches", "policy"))
        made, trained = sketches.manifest(), policy.manifest()
        assert made is not None and trained is not None  # `iterate` ends with both
        source = ModelSource(policy.path, self._protocol.recipe.model, policy)
        counts = {"pairs": made.rows, "kept": trained.rows, "steps": trained.counters["steps"]}
        row = {
            "kind": "cell",
            **asdict(cell),
            **counts,
            **self._measure(source.load_model("cpu"), source, cell.seed),
        }
        return {**row, "seconds": round(time.monotonic() - before, 1)}

    def choice(self, cell: Cell, recipe: Recipe, folder: str) -> tuple[Prepared, Choice]:
        """What the cell's strategy keeps."""
        key = (cell.seed, cell.variant)
        if self._data is None or self._data[0] != key:
            max_pairs = self._protocol.variants[cell.variant].pairs
            self._data = key, prepared(RunDirectory.open(Path(folder)), max_pairs)
        data = self._data[1]
        return data, select(data, recipe, self._protocol.strategies[cell.strategy], cell.keep)

    def selection_row(self, cell: Cell, recipe: Recipe, folder: str) -> Row:
        """What the results file says of a selection, without training."""
        data, choice = self.choice(cell, recipe, folder)
        named = {name: getattr(cell, name) for name in ("seed", "variant", "strategy", "keep")}
        biased = frozenset(self._protocol.variants[cell.variant].judge)
        return {"kind": "selection", **named, **facts(data, choice, biased, cell.strategy != EVERYTHING)}

    def _measure(self, model: PreTrainedModel, source: ModelSource, seed: int) -> Row:
        """Mean true scores and mean length of sampled answers to fresh prompts."""
        wanted, held_out = self._protocol.evaluation, self._protocol.held_out_kinds
        prompts = self._protocol.recipe.prompts
        trained = [kind for kind in KINDS if kind not in held_out]
        asked: list[tuple[str, WorldPrompt]] = []
        for languages, names in (
            (prompts.languages, ("seen", "held_out")),
            (prompts.unseen_languages, ("unseen", "held_out_unseen")),
        ):
            counts = (wanted.prompts_per_language, wanted.held_out_prompts_per_language)
            for name, kinds, count in zip(names, (trained, held_out), counts, strict=True):
                for language in languages:
                    asked += [(name, p) for p in world_prompts(language, count, seed, "evaluation", kinds)]
        sampling = self._protocol.recipe.generate
        answers = sampled_answers(
            model,
            source.load_tokenizer(),
            [p.prompt for _, p in asked],
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=wanted.max_tokens,
            batch_size=wanted.batch_size,
            seed=wanted.seed,
        )
        scores: dict[str, list[float]] = defaultdict(list)
        by_language: dict[str, list[float]] = defaultdict(list)
        tokens = []
        for (name, prompt), (text, count) in zip(asked, answers, strict=True):
            score = true_score(prompt.task, prompt.language, text)
            scores[name].append(score)
            if name in ("seen", "unseen"):
                by_language[prompt.language].append(score)
            if name == "seen":
                tokens.append(count)
        return {
            **{name: round(fmean(values), 5) for name, values in scores.items()},
            "tokens": round(fmean(tokens), 3),
            "by_language": {language: round(fmean(values), 5) for language, values in by_language.items()},
        }


def write_selected(folder: Folder, data: Prepared, choice: Choice) -> None:
    """Writes the kept pairs as the select stage would."""
    pairs = data.pairs.append_column("congrad_score", pa.array(choice.scores)).filter(pa.array(choice.kept))
    pairs = pairs.append_column("ref_chosen_logps", pairs["chosen_logps"])
    pairs = pairs.append_column("ref_rejected_logps", pairs["rejected_logps"])
    folder.write_table("selected.parquet", pairs.select(SELECTED.names).cast(SELECTED))
