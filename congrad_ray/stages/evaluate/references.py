"""Answers to compare with that a file holds, such as X-AlpacaEval's: joined to the evaluation prompts."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from congrad_ray.config.recipe import Prompts, Source
from congrad_ray.data.reading import read_records
from congrad_ray.data.records import BadRow, InputError, Record, clean_language, clean_messages, clean_text
from congrad_ray.data.tables import prompt_id, row_id

Row = dict[str, Any]

REFERENCES = "references"
COLUMNS = ("response", "output", "chosen")


@dataclass(frozen=True)
class References:
    """Answers by the ids of their prompts: rows of `response` and `answer_id`; the rows of the file add up.

    `unmatched`: rows of the file whose prompt is not evaluated. `bad`: rows that cannot be used.
    """

    answers: dict[str, Row]
    unmatched: int
    bad: int
    repeated: int

    def note(self, name: str, prompts: int) -> str | None:
        """What should be known of a file that does not fit `prompts` evaluation prompts exactly; else None."""
        parts = [
            (self.unmatched, "of its rows are to other prompts"),
            (self.repeated, "answer a prompt that has one"),
            (self.bad, "cannot be read"),
        ]
        found = [f"{count:,} {what}" for count, what in parts if count]
        if prompts == len(self.answers) and not found:
            return None
        return f"references in {name}: answers to {len(self.answers):,} of {prompts:,} evaluation prompts" + (
            f"; {', '.join(found)}" if found else ""
        )


def read_references(
    source: Source, prompts: Prompts, ids: Collection[str], language: str | None = None
) -> References:
    """The answers of a file to the prompts with these ids; the first where a prompt has several.

    The file's rows are cleaned as the prompts were, by `prompts`, so that equal prompts have equal ids. `language`
    is that of all its rows where it has no such column. Raises InputError where it has no column of answers, or no
    answer to any of the prompts.
    """
    needed = [source.prompt_column, *([] if language else [source.language_column])]
    column: str | None = None
    found: dict[str, Row] = {}
    unmatched = bad = repeated = 0
    groups = (*prompts.languages, *prompts.unseen_languages)
    for record in _records(source, needed):
        column = column or next((name for name in COLUMNS if name in record.values), None)
        try:
            identifier, text = _read(record, source, prompts.clean, groups, column, language)
        except BadRow:
            bad += 1
            continue
        if identifier not in ids:
            unmatched += 1
        elif identifier in found:
            repeated += 1
        else:
            found[identifier] = {"response": text, "answer_id": row_id("reference", identifier, text)}
    if column is None:
        raise InputError(f"{source.name} has no column of answers: one of {', '.join(COLUMNS)}")
    if not found:
        raise InputError(
            f"{source.name} has no answer to any of the {len(ids):,} evaluation prompts: {unmatched:,} of its "
            f"rows are to other prompts, {bad:,} cannot be read. Its prompt and language have to be those of the "
            "evaluation prompts"
        )
    return References(found, unmatched, bad, repeated)


def _records(source: Source, needed: list[str]) -> Iterable[Record]:
    return read_records(source, needed, (*needed, *COLUMNS))


def _read(
    record: Record,
    source: Source,
    clean: bool,
    groups: Collection[str],
    column: str | None,
    language: str | None,
) -> tuple[str, str]:
    """A row's prompt id and answer. Raises BadRow."""
    if record.problem:
        raise BadRow(*record.problem)
    name = language or record.values.get(source.language_column)
    tag = clean_language(name, source.language_names, groups)
    messages = clean_messages(record.values.get(source.prompt_column), "prompt", "user", clean)
    answer = clean_messages(record.values.get(column or ""), "response", "assistant", clean=False)
    return prompt_id(tag, messages), clean_text(answer[-1]["content"], "response", clean=False)
