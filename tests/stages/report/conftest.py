"""A finished run of six languages whose gradients conflict: synthetic tables, a real selection."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from congrad_ray.config.evaluation import Evaluate
from congrad_ray.config.recipe import Model, Prompts, Recipe
from congrad_ray.config.settings import to_yaml
from congrad_ray.data.tables import pair_id, prompt_id, response_id, table_of
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.evaluate.statistics import score_changes, summarise_answers, win_rates
from congrad_ray.stages.generate.schema import RESPONSES
from congrad_ray.stages.judge.schema import JUDGEMENTS
from congrad_ray.stages.pair.schema import PAIRS
from congrad_ray.stages.prompts.schema import PROMPTS
from congrad_ray.stages.select.selection import select_pairs
from congrad_ray.stages.sketch.schema import sketch_bytes, sketches_schema
from congrad_ray.stages.train.metrics import MetricsWriter

TEXTS = {
    "en": ("Why is the sky blue?", "Air scatters blue light more than red.", "It just is."),
    "de": ("Warum ist der Himmel blau?", "Luft streut blaues Licht stärker als rotes.", "Ist halt so."),
    "ar": ("لماذا السماء زرقاء؟", "لأن الهواء يشتت الضوء الأزرق أكثر من الأحمر.", "لا أعرف."),
    "he": ("מדוע השמיים כחולים?", "האוויר מפזר אור כחול יותר מאור אדום.", "ככה זה."),
    "ru": ("Почему небо голубое?", "Воздух рассеивает синий свет сильнее красного.", "Просто так."),
    "sw": ("Kwa nini anga ni buluu?", "Hewa hutawanya mwanga wa buluu zaidi.", "Sijui."),
}
WIDTH = 64


def make_recipe(languages: list[str], name: str = "six languages") -> Recipe:
    return Recipe(
        name=name,
        model=Model(dtype="float32"),
        prompts=Prompts(languages=languages, unseen_languages=["is"]),
        evaluate=Evaluate(),
    )


def _write(run: RunDirectory, folder: str, iteration: int | None, table: Any, name: str = "part.parquet") -> None:
    run.stage(folder, iteration).write_table(name, table)


def _commit(run: RunDirectory, folder: str, iteration: int | None, rows: int, seconds: float) -> None:
    run.stage(folder, iteration).commit(folder, iteration, f"{folder}-print", {}, {}, rows, seconds, {})


def _selection(run: RunDirectory, recipe: Recipe) -> None:
    """What the select stage writes, by the same code in this process."""
    sketches = run.stage("sketches", 0).read_table()
    selection = select_pairs(recipe.select, sketches)
    output = run.stage("selection", 0)
    output.write_table("scores.parquet", selection.scores)
    output.write_table("selected.parquet", selection.scores.filter(pa.array(selection.kept)).select(["pair_id"]))
    output.write_json("summary.json", {"expected_overlap": None, **selection.summary()})


@pytest.fixture
def make_run() -> Callable[..., tuple[RunDirectory, Recipe]]:
    """Builds a run in `folder` up to and with the stage folder `until`; `texts` may be hostile."""

    def make(
        folder: Path, until: str = "evaluation", texts: dict[str, tuple[str, str, str]] = TEXTS, name: str = "six"
    ) -> tuple[RunDirectory, Recipe]:
        run, recipe = RunDirectory.open(folder), make_recipe(list(texts), name)
        run.write_bytes("recipe.yaml", to_yaml(recipe).encode())
        steps = ["prompts", "responses", "judgements", "pairs", "sketches", "selection", "policy", "evaluation"]
        seconds = dict(zip(steps, (0.4, 95.0, 61.0, 2.0, 48.0, 1.5, 83.0, 72.0), strict=True))
        done = steps[: steps.index(until) + 1]
        tables = _tables(texts)
        for step in done:
            if step in tables:
                _write(run, step, None if step == "prompts" else 0, tables[step])
            elif step == "selection":
                _selection(run, recipe)
            elif step == "policy":
                _curves(run)
            else:
                _answers(run, list(texts))
            rows = tables[step].num_rows if step in tables else 100
            _commit(run, step, None if step == "prompts" else 0, rows, seconds[step])
        return run, recipe

    return make


def _tables(texts: dict[str, tuple[str, str, str]]) -> dict[str, Any]:
    random = np.random.default_rng(0)
    common = random.normal(size=WIDTH)
    prompts, responses, judgements, pairs, sketches = [], [], [], [], []
    for number, (language, (question, good, bad)) in enumerate(texts.items()):
        # The last language pulls against the others.
        own = random.normal(size=WIDTH) * 1.2 + (common if number < len(texts) - 1 else -0.5 * common)
        for row in range(30):
            message = [{"role": "user", "content": question}]
            identifier = prompt_id(language, [*message, {"role": "user", "content": str(row)}])
            base = {"prompt_id": identifier, "language": language, "prompt": message}
            prompts.append({**base, "split": "train", "seen": True, "task": None})
            prompts.append(
                {**base, "prompt_id": identifier[::-1], "split": "evaluation", "seen": True, "task": None}
            )
            for sample in range(4):
                key = {"response_id": response_id(identifier, 0, sample), **base}
                numbers = {"sample": sample, "seed": 1, "prompt_tokens": 9, "response_tokens": 12}
                responses.append({**key, **numbers, "response": good, "truncated": False})
                unread = (row + sample) % 11 == 0
                score = None if unread else float(random.integers(0, 6))
                read = {"score": score, "readable": 0 if unread else 1, "asked": 1, "outputs": [""]}
                judgements.append({**key, **read})
            if row % 9 == 8:
                continue
            pair = {"pair_id": pair_id(identifier, 0), **base}
            pairs.append(
                {
                    **pair,
                    "chosen": [{"role": "assistant", "content": good}],
                    "rejected": [{"role": "assistant", "content": bad}],
                    "chosen_score": 4.5,
                    "rejected_score": 1.25,
                    "chosen_response_id": response_id(identifier, 0, 0),
                    "rejected_response_id": response_id(identifier, 0, 1),
                }
            )
            sketch = own + random.normal(size=WIDTH) * 3
            values = {
                "sketch": sketch_bytes(sketch[None].astype(np.float32))[0],
                "sketch_scale": 1.0,
                "norm": float(np.linalg.norm(sketch)),
                "coefficient": 0.05,
                "positions": 26,
                "attention_padding": 0,
                "audit_exact": None,
                "audit_sketched": None,
            }
            logps = {"chosen_logps": -30.0, "rejected_logps": -20.0}
            tokens = {"prompt_tokens": 9, "chosen_tokens": 12, "rejected_tokens": 5}
            sketches.append({**pair, **values, **logps, **tokens})
    return {
        "prompts": table_of(prompts, PROMPTS),
        "responses": table_of(responses, RESPONSES),
        "judgements": table_of(judgements, JUDGEMENTS),
        "pairs": table_of(pairs, PAIRS),
        "sketches": table_of(sketches, sketches_schema(WIDTH, "float32")),
    }


def _curves(run: RunDirectory) -> None:
    writer = MetricsWriter(run.stage("policy", 0), 0)
    random = np.random.default_rng(1)
    for step in range(1, 25):
        gain = 1 - math.exp(-step / 8)
        noise = float(random.normal()) * 0.01
        writer.add(
            {
                "step": step,
                "epoch": step / 24,
                "learning_rate": 1e-5,
                "loss": 0.6931 - 0.31 * gain + noise,
                "rewards/chosen": 0.4 * gain,
                "rewards/rejected": -0.5 * gain + noise,
                "rewards/accuracies": min(1.0, 0.5 + 0.45 * gain + noise),
                "rewards/margins": 0.9 * gain + noise,
                "grad_norm": 3.2 - 1.4 * gain + 10 * noise,
            }
        )
    writer.close()


def _answers(run: RunDirectory, languages: list[str]) -> None:
    """Greedy true scores 0.25 before and 0.50 after (0.20 unseen); of 8 4 won, 2 tied, 1 lost, 1 unread."""
    answers = []
    for language in [*languages, "is"]:
        seen = language != "is"
        for row in range(8):
            base = {"prompt_id": f"{language} {row}", "language": language, "seen": seen}
            for model, score in (("M_0", 0.25), ("M_1", 0.5 if seen else 0.2)):
                text = {"response_tokens": 10 if model == "M_0" else 13, "truncated": False}
                text |= {"wrong_language": False, "repeated": False}
                answers.append({"model": model, **base, **text, "decoding": "greedy", "true_score": score})
    every_seen, seen_one, *unseen = _rates(len(languages))
    totals = [row for row in (every_seen, *unseen) if row["language"] == "*"]
    ones = [{**seen_one, "language": language} for language in languages]
    summary = {
        "model": "M_1",
        "baseline": "M_0",
        "answers": [asdict(row) for row in summarise_answers(answers)],
        "score_changes": [asdict(row) for row in score_changes(answers, "M_0", "M_1")],
        "win_rates": [*totals, *ones, *(row for row in unseen if row["language"] != "*")],
        "warnings": [],
    }
    run.stage("evaluation", 0).write_json("summary.json", summary)


@functools.cache
def _rates(seen: int) -> list[dict[str, Any]]:
    """Win rates over so many seen languages, of one of them, and of the unseen one: all have the same answers.

    Made once: the intervals of length-controlled rates take a second each.
    """
    comparisons, lengths = [], {}
    for number in range(seen + 1):
        language = "is" if number == seen else f"l{number}"
        for row in range(8):
            base = {"prompt_id": f"{number} {row}", "language": language, "seen": number < seen}
            win = None if row == 7 else (0.0 if row == 0 else 0.5 if row in (1, 2) else 1.0)
            compared = {"model": "M_1", "baseline": "M_0", "order": "model_first", "win": win}
            comparisons.append({**base, **compared, "unreadable": "truncated" if win is None else None})
            lengths |= {("M_0", base["prompt_id"]): 40, ("M_1", base["prompt_id"]): 50 + row}
    merged = [row | {"language": "l"} if row["seen"] else row for row in comparisons]
    of_one = [row for row in comparisons if row["language"] == "l0"]
    every = [asdict(row) for row in win_rates(merged, lengths)]
    one = next(asdict(row) for row in win_rates(of_one, lengths) if row.language == "l0")
    total = next(row for row in every if row["language"] == "*" and row["seen"])
    return [total, one, *(row for row in every if not row["seen"])]
