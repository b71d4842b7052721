"""`congrad evaluate A B`: one model against another, or against answers in a file, on a file of prompts."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from congrad_ray.config.printable import brief, without_keys
from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe, Source
from congrad_ray.config.settings import apply_overrides, local_path, validate
from congrad_ray.data.files import is_data_name, source_digest
from congrad_ray.data.reading import check_source, read_records
from congrad_ray.data.records import BadRow, InputError, Record, clean_language, clean_messages, too_many_bad
from congrad_ray.data.tables import prompt_id, quarantined, row_id, table_of
from congrad_ray.modeling.source import ModelSource, check_models, named_model, settings_of
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.engines import judge_source
from congrad_ray.runtime.lock import only_writer
from congrad_ray.runtime.pools import keeping
from congrad_ray.runtime.resources import driver_demand, pool_demand
from congrad_ray.runtime.rows import outcome_of
from congrad_ray.stages.base import Stage
from congrad_ray.stages.evaluate.answers import answer_prompts, answer_settings, mean_answer_tokens
from congrad_ray.stages.evaluate.comparing import Baseline, check_server, compare, judge_of
from congrad_ray.stages.evaluate.references import REFERENCES, References, read_references
from congrad_ray.stages.evaluate.stage import baseline_of, reference_source
from congrad_ray.stages.evaluate.stage import settings as evaluate_settings
from congrad_ray.stages.evaluate.summary import evaluated
from congrad_ray.stages.prompts.schema import PROMPTS

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What is compared, on which prompts.

    `model` and `baseline` are folders or hub names; `baseline` may be a file of answers. `language` is that of all
    prompts and answers where their files have no such column. `per_language`: prompts drawn of each; None: all.
    `recipe` has the prompts' file as `prompts.evaluation`, and as its model the baseline, or the model where the
    baseline is a file: so evaluate.judge 'start' is that one.
    """

    model: str
    baseline: str
    recipe: Recipe
    language: str | None = None
    per_language: int | None = None

    @property
    def names(self) -> tuple[str, str]:
        """What the two are called: the ends of their names, where these differ."""
        if is_answers(self.baseline):
            return _end(self.model), REFERENCES
        short = _end(self.model), _end(self.baseline)
        return short if short[0] != short[1] else (self.model, self.baseline)

    @property
    def sources(self) -> tuple[ModelSource, ModelSource | None]:
        """Both models; None where the baseline is a file."""
        recipe = self.recipe
        one, other = (
            None if name == self.baseline and is_answers(name) else judge_source(name, recipe)
            for name in (self.model, self.baseline)
        )
        assert one is not None
        return one, other


def _end(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2] or name


def is_answers(name: str) -> bool:
    """Whether a baseline is a file of answers, not a model."""
    return local_path(name).is_file() or is_data_name(name)


def compared_recipe(
    model: str,
    baseline: str,
    prompts: str,
    judge: str | None = None,
    endpoint: dict[str, str | None] | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """The settings of a comparison; `overrides` are a.b=c as of --set. Raises SettingsError."""
    values: dict[str, Any] = {
        "name": "evaluate",
        "model": {"name": model if is_answers(baseline) else baseline},
        "prompts": {"evaluation": {"name": prompts}, "languages": ["und"]},  # rows have the languages
        "generate": {"max_tokens": 1},  # nothing is generated or judged but answers
        "judge": {"max_tokens": 1},
        "evaluate": {"sampled": False},
    }
    if judge is not None:
        values["evaluate"]["judge"] = judge
    if endpoint is not None:
        values["evaluate"]["endpoint"] = endpoint
    return validate(Recipe, apply_overrides(values, overrides), "the comparison's settings")


def run_comparison(comparison: Comparison, out: str, profile: Profile, redo: bool = False) -> dict[str, Any]:
    """Answers, compares, and returns the summary, as summary.json of the stage `evaluate` has it.

    Written to the folder `out`: answers.parquet, comparisons.parquet, summary.json, and work/, from which an
    interrupted one is resumed. Both models and the prompts are looked at before anything is written.
    Raises InputError, SettingsError, RunDirectoryError, ModelError, MissingChatTemplate.
    """
    recipe = comparison.recipe
    if comparison.model == comparison.baseline:
        raise InputError(f"{brief(comparison.model)} is named twice: give two models, or a model and answers")
    source = recipe.prompts.evaluation
    check_source(source, _needed(comparison))
    rows = _read_prompts(comparison)
    for name in (comparison.model, comparison.baseline):
        if not is_answers(name):
            model = recipe.model.model_copy(update={"name": name})
            check_models(recipe.model_copy(update={"model": model}), chats=True, present=True)
            named_model(name, settings_of(name, recipe)).check_files()
    check_server(recipe.evaluate)
    target = RunDirectory.open(out, "--out")
    work = RunDirectory(target.filesystem, f"{target.path}/work")
    stages = [
        _prompts_stage(comparison, rows),
        _answers_stage(comparison, len(rows.good)),
        _evaluate_stage(comparison, len(rows.good)),
    ]
    with only_writer(work), keeping():
        for stage in stages:
            run_stage(stage, recipe, profile, work, redo=redo)
        return _write(work, target)


def _write(work: RunDirectory, target: RunDirectory) -> dict[str, Any]:
    evaluation = work.stage("evaluation", None)
    target.write_table("answers.parquet", work.stage("answers", None).read_table())
    if (evaluation / "comparisons").files(".parquet"):  # none where no prompt has two answers
        target.write_table("comparisons.parquet", (evaluation / "comparisons").read_table())
    summary: dict[str, Any] = evaluation.read_json("summary.json")
    target.write_json("summary.json", summary)
    return summary


@dataclass(frozen=True)
class _Prompts:
    good: list[Row]
    bad: list[Row]
    repeated: int


def _needed(comparison: Comparison) -> list[str]:
    source = comparison.recipe.prompts.evaluation
    return [source.prompt_column, *([] if comparison.language else [source.language_column])]


def _read_prompts(comparison: Comparison) -> _Prompts:
    """The prompts to be answered. Raises InputError where there is none, or too many rows are bad."""
    recipe = comparison.recipe
    source = recipe.prompts.evaluation
    found: dict[str, Row] = {}
    bad: list[Row] = []
    read = 0
    for record in read_records(source, _needed(comparison)):
        read += 1
        try:
            row = _prompt_of(record, source, comparison.language, recipe.prompts.clean)
        except BadRow as error:
            bad.append(quarantined(record.place, None, error.reason, str(error)))
            continue
        found.setdefault(row["prompt_id"], row)
    reasons = dict(Counter(row["reason"] for row in bad))
    if not found or too_many_bad(len(bad), read, recipe.limits.failed_share):
        first = f", the first: {bad[0]['row_id']}: {bad[0]['detail']}" if bad else ""
        raise InputError(
            f"{brief(without_keys(source.name))}: {len(bad):,} of {read:,} rows cannot be used "
            f"({reasons}{first}). Fix the rows, or raise limits.failed_share with --set"
        )
    by_language: dict[str, list[Row]] = defaultdict(list)
    for row in found.values():
        by_language[row["language"]].append(row)
    drawn = [
        row
        for rows in by_language.values()
        for row in sorted(rows, key=lambda row: row_id("draw", recipe.seed, row["prompt_id"]))[
            : comparison.per_language
        ]
    ]
    return _Prompts(drawn, bad, read - len(bad) - len(found))


def _prompt_of(record: Record, source: Source, language: str | None, clean: bool) -> Row:
    """A row of PROMPTS. Raises BadRow."""
    if record.problem:
        raise BadRow(*record.problem)
    tag = clean_language(language or record.values.get(source.language_column), source.language_names)
    messages = clean_messages(record.values.get(source.prompt_column), "prompt", "user", clean)
    values = {"prompt_id": prompt_id(tag, messages), "language": tag, "prompt": messages}
    return {**values, "split": "evaluation", "seen": True, "task": None}


def _prompts_stage(comparison: Comparison, rows: _Prompts) -> Stage:
    source = comparison.recipe.prompts.evaluation

    def run(context: Context) -> Outcome:
        context.output.write_quarantine(rows.bad, "prompts.parquet")
        context.output.write_table("prompts.parquet", table_of(rows.good, PROMPTS))
        by_language = dict(Counter(row["language"] for row in rows.good))
        counters = {"repeated": rows.repeated, "quarantined": context.output.quarantine_counts()}
        return Outcome(len(rows.good), {**counters, "prompts": by_language})

    return Stage(
        name="prompts",
        folder="prompts",
        summary=f"reading {brief(without_keys(source.name))}",
        inputs=lambda iteration: [],
        settings=lambda recipe, iteration: {
            "prompts": recipe.prompts.model_dump(mode="json"),
            "digest": source_digest(source),
            "language": comparison.language,
            "per_language": comparison.per_language,
            "seed": recipe.seed,
        },
        run=run,
        demand=lambda recipe, profile: driver_demand("prompts", len(rows.good)),
        each_iteration=False,
        uses_ray=False,
    )


def _answers_stage(comparison: Comparison, prompts: int) -> Stage:
    """The new model first: the baseline's engine then goes on to compare."""

    def run(context: Context) -> Outcome:
        expected = 0
        for name, source in zip(comparison.names, comparison.sources, strict=True):
            expected += answer_prompts(context, source, name) if source else 0
        counters = {"mean_answer_tokens": mean_answer_tokens(context.output)}
        return outcome_of(context.output, "answer_id", counters, expected)

    models = [name for name in (comparison.model, comparison.baseline) if not is_answers(name)]
    return Stage(
        name="answers",
        folder="answers",
        summary=f"answers of {' and '.join(comparison.names[: len(models)])}",
        inputs=lambda iteration: [("prompts", None)],
        settings=lambda recipe, iteration: {**answer_settings(recipe), "models": models},
        run=run,
        demand=lambda recipe, profile: pool_demand("answers", prompts, "vLLM engines", "engines", profile),
        each_iteration=False,
        chats=True,
        parts=("",),
    )


def _evaluate_stage(comparison: Comparison, prompts: int) -> Stage:
    model, other = comparison.names
    from_file = is_answers(comparison.baseline)

    def run(context: Context) -> Outcome:
        recipe = comparison.recipe
        judge = judge_of(context)
        assert judge is not None  # no prompt has a task
        answers = context.run.stage("answers", None).read_table().to_pylist()
        references = _references(comparison, context) if from_file else None
        baseline = Baseline(REFERENCES, references.answers) if references else baseline_of(other, answers)
        note = references.note(comparison.baseline, prompts) if references else None
        own = [row for row in answers if row["model"] == model]
        comparisons = compare(context, judge, own, [baseline])
        found = evaluated(recipe, model, other, answers, [baseline], comparisons, [note] if note else [])
        context.output.write_json("summary.json", found.summary)
        return Outcome(len(comparisons), found.counters)

    def settings(recipe: Recipe, iteration: int) -> Any:
        answers = source_digest(reference_source(recipe, comparison.baseline)) if from_file else None
        found = {"compared": comparison.model, "baseline": answers or comparison.baseline}
        return {**evaluate_settings(recipe, 0), **found, "language": comparison.language}

    return Stage(
        name="evaluate",
        folder="evaluation",
        summary=f"comparing {model} with {other}",
        inputs=lambda iteration: [("prompts", None), ("answers", None)],
        settings=settings,
        run=run,
        demand=lambda recipe, profile: pool_demand("evaluate", prompts, "vLLM engines", "engines", profile),
        each_iteration=False,
        chats=True,
        parts=("comparisons",),
    )


def _references(comparison: Comparison, context: Context) -> References:
    ids = set(context.prompts.read_table(["prompt_id"])["prompt_id"].to_pylist())
    source = reference_source(comparison.recipe, comparison.baseline)
    return read_references(source, comparison.recipe.prompts, ids, comparison.language)
