"""prompts: the training and evaluation prompts of the run, cleaned, de-duplicated, seen and unseen."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from typing import Any

import pyarrow.compute as pc

from congrad_ray.config.printable import brief
from congrad_ray.config.recipe import BUILTIN_WORLD, Prompts, Recipe, Source
from congrad_ray.data.files import source_digest
from congrad_ray.data.languages import SMALL_GROUP, language_table
from congrad_ray.data.reading import read_records
from congrad_ray.data.records import BadRow, InputError, clean_language, clean_messages
from congrad_ray.data.tables import prompt_id, quarantined, row_id, table_of
from congrad_ray.planning.volume import rows_of
from congrad_ray.rundir.directory import Folder
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.resources import driver_demand
from congrad_ray.stages.base import Stage
from congrad_ray.stages.prompts.estimate import ESTIMATE
from congrad_ray.stages.prompts.schema import PROMPTS
from congrad_ray.stages.view import Step

logger = logging.getLogger(__name__)

Row = dict[str, Any]
_MOST_NAMED = 10  # languages in one line


def run(context: Context) -> Outcome:
    """Evaluation prompts are drawn first; training prompts are drawn from the rest, so none is in both."""
    recipe = context.recipe
    wanted = recipe.prompts
    seen, unseen = set(wanted.languages), set(wanted.unseen_languages)
    bad: list[Row] = []
    written: dict[str, set[str]] = defaultdict(set)
    evaluation, skipped = _collect(wanted.evaluation, recipe, "evaluation", seen | unseen, bad, written)
    if wanted.train == wanted.evaluation and wanted.train.name != BUILTIN_WORLD:
        train = evaluation
    else:
        train, skipped_train = _collect(wanted.train, recipe, "train", seen, bad, written)
        skipped += skipped_train
    _show_others(skipped, wanted)
    context.output.write_quarantine(bad, "quarantine.parquet")
    rows: list[Row] = []
    taken: set[str] = set()
    for language in [*wanted.languages, *wanted.unseen_languages]:
        rows += _draw(
            evaluation[language],
            "evaluation",
            wanted.evaluation_per_language,
            language,
            wanted,
            taken,
            context,
        )
    for language in wanted.languages:
        rows += _draw(train[language], "train", wanted.train_per_language, language, wanted, taken, context)
    _show_languages(rows, written, recipe)
    context.output.write_table("prompts.parquet", table_of(rows, PROMPTS))
    return Outcome(
        len(rows),
        {
            "other_languages": skipped.total(),
            "train": _by_language(rows, "train"),
            "evaluation": _by_language(rows, "evaluation"),
            "quarantined": context.output.quarantine_counts(),
        },
    )


def _show_others(skipped: Counter[str], wanted: Prompts) -> None:
    """Logs which languages the sources have beside those of the run."""
    named = {*wanted.languages, *wanted.unseen_languages}
    others = [f"{tag} {count:,}" for tag, count in skipped.most_common() if tag not in named]
    if others:
        more = f" and {len(others) - _MOST_NAMED} more languages" if len(others) > _MOST_NAMED else ""
        logger.info(f"rows in languages that the recipe does not name: {', '.join(others[:_MOST_NAMED])}{more}")


def _show_languages(rows: list[Row], written: dict[str, set[str]], recipe: Recipe) -> None:
    """Logs the languages that are trained on, with how many prompts were drawn and what the sources call them."""
    counts = dict.fromkeys(recipe.prompts.languages, 0) | _by_language(rows, "train")
    logger.info("prompts to train on, by language:")
    for line in language_table(counts, max(recipe.select.min_pairs, SMALL_GROUP), written):
        logger.info(f"  {line}")


def _by_language(rows: list[Row], split: str) -> dict[str, int]:
    return dict(sorted(Counter(row["language"] for row in rows if row["split"] == split).items()))


def _collect(
    source: Source,
    recipe: Recipe,
    split: str,
    languages: set[str],
    bad: list[Row],
    written: dict[str, set[str]],
) -> tuple[dict[str, dict[str, Row]], Counter[str]]:
    """The usable prompts of a source by language and id, and how many were in each language nobody asked for.

    How the languages are called in the source is added to `written`, by their tags.
    """
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    if source.name == BUILTIN_WORLD:
        for row in _world_rows(source, recipe, split, languages):
            found[row["language"]][row["prompt_id"]] = row
        return found, Counter()
    skipped: Counter[str] = Counter()
    # The same for both splits, so that a text's group does not depend on which it is drawn for.
    groups = (*recipe.prompts.languages, *recipe.prompts.unseen_languages)
    for record in read_records(source, (source.prompt_column, source.language_column)):
        language = None
        try:
            if record.problem:
                raise BadRow(*record.problem)
            name = record.values.get(source.language_column)
            language = clean_language(name, source.language_names, groups)
            if language not in languages:
                skipped[language] += 1
                continue
            written[language].add(brief(name))
            messages = clean_messages(record.values.get(source.prompt_column), "prompt", "user")
        except BadRow as error:
            bad.append(quarantined(record.place, language, error.reason, str(error)))
            continue
        identifier = prompt_id(language, messages)
        found[language].setdefault(
            identifier, {"prompt_id": identifier, "language": language, "prompt": messages, "task": None}
        )
    return found, skipped


def _world_rows(source: Source, recipe: Recipe, split: str, languages: set[str]) -> list[Row]:
    from congrad_ray.world.tasks import KINDS, world_prompts

    wanted = recipe.prompts
    kinds = KINDS if source.kinds is None else source.kinds
    rows = []
    for language in sorted(languages):
        if split == "train":
            drawn = world_prompts(language, wanted.train_per_language, recipe.seed, "train", kinds)
        else:
            drawn = world_prompts(language, wanted.evaluation_per_language, recipe.seed, "evaluation", kinds)
        for prompt in drawn:
            messages = [{"role": "user", "content": prompt.prompt}]
            rows.append(
                {
                    "prompt_id": prompt_id(language, messages),
                    "language": language,
                    "prompt": messages,
                    "task": prompt.task,
                }
            )
    return rows


def _draw(
    candidates: dict[str, Row],
    split: str,
    count: int,
    language: str,
    wanted: Any,
    taken: set[str],
    context: Context,
) -> list[Row]:
    """`count` of the candidates, drawn by a seeded hash of their ids: the same on every machine."""
    seed = context.recipe.seed
    free = sorted((i for i in candidates if i not in taken), key=lambda i: row_id("draw", seed, i))
    if not free and (split == "train" or count):
        source = brief(getattr(wanted, split).name)
        bad = context.output.quarantine_counts()
        raise InputError(
            f"prompts.{split} ({source}) has no usable {split} prompt in '{language}'"
            + (" left after the evaluation prompts" if candidates else "")
            + ": take the language out of the recipe, name it under language_names, or add prompts"
            + (f"; quarantined rows by reason: {bad}, see {context.output.path}/quarantine" if bad else "")
        )
    if len(free) < count:
        logger.info(f"only {len(free)} {split} prompts in '{language}', {count} asked for")
    chosen = free[:count]
    taken.update(chosen)
    seen = language in wanted.languages
    return [{**candidates[i], "split": split, "seen": seen} for i in chosen]


def _settings(recipe: Recipe, iteration: int) -> Any:
    files = [source_digest(source) for source in (recipe.prompts.train, recipe.prompts.evaluation)]
    return [recipe.prompts.model_dump(mode="json"), recipe.seed, files]


def _training(folder: Folder) -> Counter[str] | None:
    if not folder.files(".parquet"):
        return None
    table = folder.read_table(["language", "split"])
    return Counter(table.filter(pc.equal(table["split"], "train"))["language"].to_pylist())


STAGE = Stage(
    name="prompts",
    folder="prompts",
    summary="Read, clean and draw the training and evaluation prompts",
    example="prompts.train.name=data.jsonl",
    inputs=lambda iteration: [],
    settings=_settings,
    run=run,
    demand=lambda recipe, profile: driver_demand("prompts", rows_of(recipe).training + rows_of(recipe).evaluation),
    schema=lambda recipe: PROMPTS,
    estimate=ESTIMATE,
    step=Step("prompts", "prompts", "training prompts", _training),
    each_iteration=False,
    uses_ray=False,
)
