"""The words of the world's languages, read from `vocabulary.json`."""

import json
import unicodedata
from dataclasses import dataclass
from functools import cache
from importlib import resources

# Preferences are collected in the seen languages; the unseen ones only show whether alignment transfers.
SEEN_LANGUAGES: tuple[str, ...] = ("en", "de", "fr", "es", "ru", "hi", "tr", "el")
UNSEEN_LANGUAGES: tuple[str, ...] = ("it", "pt", "uk", "sw")
ALL_LANGUAGES: tuple[str, ...] = SEEN_LANGUAGES + UNSEEN_LANGUAGES

CLOSING_SIGN = "✓"


@dataclass(frozen=True)
class Vocabulary:
    """What can be said in one language. Words at the same index mean the same in every language."""

    name: str
    openers: tuple[str, ...]
    statement: str
    closing: str
    items: tuple[str, ...]
    days: tuple[str, ...]
    opposites: tuple[str, ...]
    """Adjectives; the words 2k and 2k + 1 are opposites of each other."""
    templates: dict[str, tuple[str, ...]]
    """Task kind to its question templates."""

    def state(self, content: list[str]) -> str:
        """The sentence that answers a prompt with `content`."""
        return f"{self.statement}: {', '.join(content)}."

    def sign_off(self) -> str:
        """The closing phrase; its sign is the same in every language."""
        return f"{CLOSING_SIGN} {self.closing}"


@cache
def _vocabularies() -> dict[str, Vocabulary]:
    text = resources.files("congrad_ray.world").joinpath("vocabulary.json").read_text(encoding="utf-8")
    tables = json.loads(unicodedata.normalize("NFC", text))
    return {
        language: Vocabulary(
            name=table["name"],
            openers=tuple(table["openers"]),
            statement=table["statement"],
            closing=table["closing"],
            items=tuple(table["items"]),
            days=tuple(table["days"]),
            opposites=tuple(word for pair in table["opposites"] for word in pair),
            templates={kind: tuple(templates) for kind, templates in table["templates"].items()},
        )
        for language, table in tables.items()
    }


def vocabulary(language: str) -> Vocabulary:
    """The vocabulary of a language, by BCP-47 tag.

    Raises:
        ValueError: the world does not speak the language.
    """
    if language not in ALL_LANGUAGES:
        raise ValueError(f"the world has no language {language!r}; it has {', '.join(ALL_LANGUAGES)}")
    return _vocabularies()[language]
