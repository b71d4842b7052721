"""The model card and the data set card that go with what a run made."""

from __future__ import annotations

import importlib.metadata

from congrad_ray.config.recipe import Recipe
from congrad_ray.data.exports.card import ExportFacts, dataset_card, keep_rule, plain_cell, plain_name
from congrad_ray.stages.report.evaluation import Interval, total_of
from congrad_ray.stages.report.facts import IterationFacts, RunFacts


def model_card(facts: RunFacts, recipe: Recipe) -> str | None:
    """The README.md of the newest policy: YAML that the hub reads, and Markdown; None before there is one.

    It says what was measured with its intervals, and what is not known.
    """
    trained = [iteration for iteration in facts.iterations if iteration.metrics]
    if not trained:
        return None
    from huggingface_hub import ModelCardData

    last = trained[-1]
    base = recipe.model.name
    data = ModelCardData(
        language=sorted({tag.partition("-")[0] for tag in recipe.prompts.languages}),
        base_model=base if _is_hub_name(base) else None,
        tags=["dpo", "congrad", "preference-optimisation", "multilingual"],
        pipeline_tag="text-generation",
    )
    lines = [
        f"# {plain_cell(recipe.name)}: M_{last.number + 1}",
        "",
        f"{plain_name(base)} after {last.number + 1} iteration{'s' if last.number else ''} of preference "
        "optimisation on its own responses, filtered by ConGrad "
        "([arXiv 2503.23777](https://arxiv.org/abs/2503.23777)): of the pairs of every language those were kept "
        "whose gradients agree across languages.",
        "",
        f"Languages trained on: {', '.join(map(plain_cell, recipe.prompts.languages))}."
        + (
            f" Only evaluated: {', '.join(map(plain_cell, recipe.prompts.unseen_languages))}."
            if recipe.prompts.unseen_languages
            else ""
        ),
        "",
        "## Training",
        "",
        "| iteration | pairs | kept | dropped in conflict | steps | final loss |",
        "|--:|--:|--:|--:|--:|--:|",
        *(_training_line(iteration) for iteration in trained),
        "",
        f"DPO with beta {recipe.train.beta:g} and a length penalty of {recipe.train.length_penalty:g}, learning "
        f"rate {recipe.train.learning_rate:g}; up to {recipe.model.max_length} tokens of a prompt with one "
        "response. Every other setting is in the run's `recipe.yaml`.",
        "",
        "## Evaluation",
        "",
        *(_evaluation_lines(last) or ["Nothing was measured of this model."]),
        "",
        "## Limits",
        "",
        "The preferences are a judge's, not people's. What was not measured above is not known: safety, facts, "
        "and languages not named. The licence is that of the model it began with.",
        "",
        f"Made with congrad_ray {importlib.metadata.version('congrad_ray')}.",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"


def pairs_card(facts: RunFacts, recipe: Recipe) -> str | None:
    """The README.md of the kept pairs of the newest selection; None before there is one."""
    selected = [(iteration.number, iteration.selection) for iteration in facts.iterations if iteration.selection]
    if not selected:
        return None
    number, selection = selected[-1]
    source = recipe.prompts.train.name
    found = ExportFacts(
        model=recipe.model.name if number == 0 else f"M_{number}",
        sources=[source],
        keep=keep_rule(recipe.select),
        direction=recipe.select.direction,
        pairs_by_language={found.language: (found.pairs, found.kept) for found in selection.languages[:-1]},
        max_length=recipe.model.max_length,
        version=importlib.metadata.version("congrad_ray"),
        settings={
            "strategy": recipe.select.strategy,
            "score": recipe.select.score,
            "sketch": f"{recipe.sketch.method}, width {recipe.sketch.width}",
            "judge": recipe.judge.model if isinstance(recipe.judge.model, str) else "a model of its own",
            "responses": f"{recipe.generate.num_generations} for a prompt, by the model itself",
        },
    )
    splits = {"train": f"iteration-{number}/selection/selected.parquet"}
    return dataset_card(found, "trl", selection.all.kept, 0, {}, splits)


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and "://" not in name


def _training_line(iteration: IterationFacts) -> str:
    of = iteration.selection.all if iteration.selection else None
    numbers = (of.pairs, of.kept, of.conflict) if of else ("", "", "")
    cells = " | ".join(f"{number:,}" if isinstance(number, int) else number for number in numbers)
    last = iteration.metrics[-1]
    return f"| {iteration.number} | {cells} | {last['step']:.0f} | {last['loss']:.4f} |"


def _evaluation_lines(iteration: IterationFacts) -> list[str]:
    rows: list[tuple[str, str, int | str, str]] = []
    evaluation, benchmarks = iteration.evaluation, iteration.benchmarks
    if evaluation:
        for decoding, scores in evaluation.scores.items():
            for row in scores:
                if row.place.total:
                    what = f"true score, {decoding} answers, change from {evaluation.baseline}"
                    rows.append((what, row.place.name, row.count, _text(row.change, "+.3f")))
        for baseline, rates in evaluation.rates.items():
            for seen in (True, False):
                rate = total_of(rates, seen)
                both = ((rate.raw, ""), (rate.length_controlled, ", length-controlled")) if rate else ()
                for value, how in both:
                    if rate and value:
                        what = f"win rate against {baseline}{how}"
                        rows.append((what, rate.place.name, rate.prompts, _text(value, ".1%")))
    if benchmarks:
        for task in benchmarks.tasks:
            what = f"{task.task}, change of {task.metric} from {benchmarks.baseline}"
            change = _text(task.change, "+.3f") if task.change else "not a number"
            rows.append((what, task.name, task.count or "", change))
        for preference in benchmarks.preferences:
            if preference.place.total and preference.accuracy:
                what = f"accuracy on held-out preferences, {preference.model}"
                rows.append((what, preference.place.name, preference.pairs, _text(preference.accuracy, ".1%")))
    if not rows:
        return []
    return [
        "On prompts that no pair was made from; in brackets 95 % intervals.",
        "",
        "| measure | languages | count | value |",
        "|---|---|--:|--:|",
        *("| " + " | ".join(plain_cell(str(cell)) for cell in row) + " |" for row in rows),
    ]


def _text(found: Interval, shape: str) -> str:
    value = format(found.value, shape)
    if found.low is None or found.high is None:
        return value
    return f"{value} [{found.low:{shape}}, {found.high:{shape}}]"
