"""prompts: the training and evaluation prompts of the run, cleaned, de-duplicated, seen and unseen."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow.compute as pc

from congrad_ray.config.printable import brief
from congrad_ray.config.recipe import BUILTIN_WORLD, Prompts, Recipe, Source
from congrad_ray.data.files import source_digest
from congrad_ray.data.languages import SMALL_GROUP, language_table
from congrad_ray.data.reading import read_records
from congrad_ray.data.records import BadRow, InputError, clean_language, clean_messages, too_many_bad
from congrad_ray.data.tables import quarantined, table_of
from congrad_ray.planning.volume import rows_of
from congrad_ray.rundir.directory import Folder, RunDirectoryError, StageFolder
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.resources import driver_demand
from congrad_ray.stages.base import Stage
from congrad_ray.stages.prompts.drawing import Candidates, Collected
from congrad_ray.stages.prompts.estimate import ESTIMATE
from congrad_ray.stages.prompts.schema import PROMPTS, ROWS_PER_PART
from congrad_ray.stages.view import Step

logger = logging.getLogger(__name__)

Row = dict[str, Any]
_MOST_NAMED = 10  # languages in one line


def run(context: Context) -> Outcome:
    """Evaluation prompts are drawn first; training prompts are drawn from the rest, so none is in both.

    Beside 16 bytes a row, what is held does not grow with the sources: only the prompts that are drawn.
    """
    recipe, output = context.recipe, context.output
    wanted = recipe.prompts
    for path in output.files(".parquet"):  # of a try before, whatever they are called
        output.filesystem.delete_file(path)
    output.quarantine.delete()
    seen, unseen = set(wanted.languages), set(wanted.unseen_languages)
    evaluation = _collect(context, wanted.evaluation, "evaluation", seen | unseen)
    if wanted.train == wanted.evaluation and wanted.train.name != BUILTIN_WORLD:
        train = evaluation
    else:
        train = _collect(context, wanted.train, "train", seen)
    sources = [evaluation] if train is evaluation else [evaluation, train]
    _show_others(sources, wanted)
    taken: set[int] = set()
    draws = []
    for language in [*wanted.languages, *wanted.unseen_languages]:
        count = wanted.evaluation_per_language
        draws.append(_draw(evaluation.candidates[language], "evaluation", count, language, taken, context))
    for language in wanted.languages:
        count = wanted.train_per_language
        draws.append(_draw(train.candidates[language], "train", count, language, taken, context))
    by_split = {split: _by_language(draws, split) for split in ("train", "evaluation")}
    _show_languages(by_split["train"], sources, recipe)
    drawn = {split: sum(by_language.values()) for split, by_language in by_split.items()}
    if train is evaluation:
        counts = Counter(evaluation.counts(sum(drawn.values())))
    else:
        counts = Counter(evaluation.counts(drawn["evaluation"]))
        counts.update(train.counts(drawn["train"]))
    quarantined_rows = output.quarantine_counts()
    if sum(quarantined_rows.values()) != counts.pop("bad"):
        raise RunDirectoryError(f"rows are missing in {output.quarantine.path}: run the stage again")
    rows = _rows(draws, seen)
    for number, part in enumerate(iter(lambda: list(islice(rows, ROWS_PER_PART)), [])):
        output.write_table(f"prompts-{number:06}.parquet", table_of(part, PROMPTS))
    return Outcome(counts.pop("drawn"), {**counts, **by_split, "quarantined": quarantined_rows})


def _show_others(sources: Sequence[Collected], wanted: Prompts) -> None:
    """Logs which languages the sources have beside those of the run."""
    named = {*wanted.languages, *wanted.unseen_languages}
    skipped: Counter[str] = Counter()
    for source in sources:
        skipped.update(source.others)
    others = [f"{tag} {count:,}" for tag, count in skipped.most_common() if tag not in named]
    if others:
        more = f" and {len(others) - _MOST_NAMED} more languages" if len(others) > _MOST_NAMED else ""
        logger.info(f"rows in languages that the recipe does not name: {', '.join(others[:_MOST_NAMED])}{more}")


def _show_languages(drawn: dict[str, int], sources: Sequence[Collected], recipe: Recipe) -> None:
    """Logs the languages that are trained on, with how many prompts were drawn and what the sources call them."""
    counts = dict.fromkeys(recipe.prompts.languages, 0) | drawn
    written: defaultdict[str, set[str]] = defaultdict(set)
    for source in sources:
        for tag, names in source.written.items():
            written[tag] |= names
    logger.info("prompts to train on, by language:")
    for line in language_table(counts, max(recipe.select.min_pairs, SMALL_GROUP), written):
        logger.info(f"  {line}")


@dataclass(frozen=True)
class _Draw:
    """The prompts of a language for one split."""

    split: str
    language: str
    candidates: Candidates
    keys: list[int]


def _by_language(draws: Sequence[_Draw], split: str) -> dict[str, int]:
    return {
        draw.language: len(draw.keys)
        for draw in sorted(draws, key=lambda draw: draw.language)
        if draw.split == split and draw.keys
    }


def _rows(draws: Sequence[_Draw], seen: set[str]) -> Iterator[Row]:
    for draw in draws:
        for key in draw.keys:
            yield {**draw.candidates.row(key), "split": draw.split, "seen": draw.language in seen}


def _collect(context: Context, source: Source, split: str, languages: set[str]) -> Collected:
    """Looks at every row of a source; bad ones go to quarantine as they come."""
    wanted, seed = context.recipe.prompts, context.recipe.seed
    train = set(wanted.languages)
    found = Collected(
        {
            language: wanted.evaluation_per_language + wanted.train_per_language * (language in train)
            for language in languages
        },
        seed,
    )
    if source.name == BUILTIN_WORLD:
        _add_world(found, source, context.recipe, split)
        return found
    # The same for both splits, so that a text's group does not depend on which it is drawn for.
    groups = (*wanted.languages, *wanted.unseen_languages)
    with _set_apart(context.output, split) as bad:
        for record in read_records(source, (source.prompt_column, source.language_column)):
            found.read += 1
            language = None
            try:
                if record.problem:
                    raise BadRow(*record.problem)
                name = record.values.get(source.language_column)
                language = clean_language(name, source.language_names, groups)
                if language not in languages:
                    found.others[language] += 1
                    continue
                found.written[language].add(brief(name))
                prompt = record.values.get(source.prompt_column)
                messages = clean_messages(prompt, "prompt", "user", wanted.clean)
            except BadRow as error:
                found.bad += 1
                bad(quarantined(record.place, language, error.reason, str(error)))
                continue
            found.add(language, messages)
    share = context.recipe.limits.failed_share
    if too_many_bad(found.bad, found.read, share):
        raise InputError(
            f"{brief(source.name)}: {found.bad:,} of {found.read:,} rows cannot be used, more than "
            f"limits.failed_share ({share:g}) of them: {context.output.quarantine_counts()}, see "
            f"{context.output.quarantine.path}. Fix the rows, or raise limits.failed_share"
        )
    return found


@contextmanager
def _set_apart(output: StageFolder, split: str) -> Iterator[Callable[[Row], None]]:
    """A function that takes rows for quarantine, and writes them a part at a time."""
    rows: list[Row] = []
    parts = 0

    def write() -> None:
        nonlocal parts
        output.write_quarantine(rows, f"{split}-{parts:06}.parquet")
        parts += 1
        rows.clear()

    def add(row: Row) -> None:
        rows.append(row)
        if len(rows) == ROWS_PER_PART:
            write()

    yield add
    write()


def _add_world(found: Collected, source: Source, recipe: Recipe, split: str) -> None:
    from congrad_ray.world.tasks import KINDS, world_prompts

    wanted = recipe.prompts
    kinds = KINDS if source.kinds is None else source.kinds
    for language in sorted(found.room):
        if split == "train":
            drawn = world_prompts(language, wanted.train_per_language, recipe.seed, "train", kinds)
        else:
            drawn = world_prompts(language, wanted.evaluation_per_language, recipe.seed, "evaluation", kinds)
        for prompt in drawn:
            found.read += 1
            found.add(language, [{"role": "user", "content": prompt.prompt}], prompt.task)


def _draw(
    candidates: Candidates, split: str, count: int, language: str, taken: set[int], context: Context
) -> _Draw:
    """`count` of the candidates, drawn by a seeded hash of their ids: the same on every machine."""
    held = candidates.in_order()
    free = [key for key in held if key not in taken]
    if not free and (split == "train" or count):
        source = brief(getattr(context.recipe.prompts, split).name)
        bad = context.output.quarantine_counts()
        raise InputError(
            f"prompts.{split} ({source}) has no usable {split} prompt in '{language}'"
            + (" left after the evaluation prompts" if held else "")
            + ": take the language out of the recipe, name it under language_names, or add prompts"
            + (f"; quarantined rows by reason: {bad}, see {context.output.path}/quarantine" if bad else "")
        )
    if len(free) < count:
        logger.info(f"only {len(free)} {split} prompts in '{language}', {count} asked for")
    taken.update(free[:count])
    return _Draw(split, language, candidates, free[:count])


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
