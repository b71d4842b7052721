"""Rows as they were read, and cleaning prompts; bad rows are reported, not fatal."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from congrad_ray.config.languages import language_group, language_tag
from congrad_ray.config.printable import shown
from congrad_ray.data.tables import Message


class InputError(ValueError):
    """An input cannot be read at all; the text names it, what was found, and the way out."""


class MissingColumn(InputError):
    """A file has not a column that is needed."""


@dataclass(frozen=True)
class Record:
    """One row as it was read: `values`, or the `problem` (reason, detail) that kept it from being read."""

    place: str
    values: dict[str, Any]
    problem: tuple[str, str] | None = None


class BadRow(ValueError):
    """A row cannot be used; `reason` is a short fixed word for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


_FEW = 10


def too_many_bad(bad: int, rows: int, failed_share: float) -> bool:
    """Whether so many bad rows are more than a share of all, and more than a few, which never stop anything."""
    return bad > max(_FEW, failed_share * rows)


def clean_text(value: Any, what: str, clean: bool = True) -> str:
    """A text in NFC without surrounding white space; as it is unless `clean`.

    Raises BadRow when it is none, or blank, or not Unicode, or to be cleaned and with a NUL character.
    """
    if not isinstance(value, str):
        raise BadRow(f"{what}_not_text", f"{what} is {type(value).__name__}: {shown(value)}")
    check_unicode(value, what)
    if not value.strip():
        raise BadRow(f"{what}_empty", f"{what} is empty")
    if not clean:
        return value
    if "\x00" in value:
        raise BadRow(f"{what}_control_characters", f"{what} holds a NUL character")
    return unicodedata.normalize("NFC", value).strip()


def joined_parts(parts: list[Any], what: str) -> str:
    """The text of parts as in [{"type": "text", "text": "..."}]. Raises BadRow for what is no text."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise BadRow(f"{what}_not_text", f"a part of {what} is no text: {shown(part)}")
        texts.append(text)
    return "".join(texts)


def check_unicode(text: str, what: str) -> None:
    """Raises BadRow for lone surrogates, which no tokenizer and no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{what}_not_unicode", f"{what}: {error}") from error


def clean_messages(value: Any, what: str, default_role: str, clean: bool = True) -> list[Message]:
    """Chat messages from a text (one message of `default_role`) or a list of messages. Raises BadRow."""
    if not isinstance(value, list):
        return [{"role": default_role, "content": clean_text(value, what, clean)}]
    messages = []
    for item in value:
        if not isinstance(item, dict) or not isinstance(item.get("role"), str):
            raise BadRow(f"{what}_not_messages", f"{what} should hold role and content, found {shown(item)}")
        check_unicode(item["role"], what)
        content = item.get("content")
        content = joined_parts(content, what) if isinstance(content, list) else content
        messages.append({"role": item["role"], "content": clean_text(content, what, clean)})
    if not messages:
        raise BadRow(f"{what}_empty", f"{what} has no messages")
    if messages[-1]["role"] != default_role:
        raise BadRow(
            f"{what}_last_role",
            f"the last message of {what} is of {shown(messages[-1]['role'])}, not {default_role}",
        )
    return messages


def clean_language(
    value: Any, names: Mapping[str, str], groups: Collection[str] = (), keep_scripts: bool = False
) -> str:
    """The tag of a row's language, by `language_tag`; with `groups` the one of them that it belongs to.

    `names` are the source's own names of languages and their tags. Raises BadRow.
    """
    text = clean_text(value, "language")
    try:
        return language_group(text, groups, names) if groups else language_tag(text, names, keep_scripts)
    except ValueError as error:
        raise BadRow("unknown_language", f"{error}; map it to a tag with language_names") from error
