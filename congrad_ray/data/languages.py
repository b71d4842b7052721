"""Which languages texts are in: the table of a source's languages, and the identifier of those of a text."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import langcodes
import regex

SMALL_GROUP = 10  # pairs; the mean gradient of fewer is mostly the noise of single pairs


def language_table(
    counts: Mapping[str, int], smallest: int = SMALL_GROUP, written: Mapping[str, Collection[str]] | None = None
) -> list[str]:
    """Lines for the screen: the languages with their counts, largest first, and what should be known of them.

    `written` has the names under which the rows of a tag came; they are shown where they are others than the tag.
    Named at the end: tags with fewer than `smallest`, too few for a direction of their own, and tags of one
    language that are kept apart.
    """
    width = max(map(len, [*counts, "language"]))
    lines = [f"{'language':<{width}}  {'count':>8}"]
    for tag, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        names = sorted((written or {}).get(tag, ()))
        source = f"  from {', '.join(names)}" if set(names) - {tag} else ""
        lines.append(f"{tag:<{width}}  {count:>8,}{source}")
    small = [f"{tag} ({counts[tag]})" for tag in sorted(counts) if counts[tag] < smallest]
    if small:
        lines.append(f"too few for a direction of their own, fewer than {smallest}: {', '.join(small)}")
    lines += [f"one language, kept apart: {' and '.join(tags)}" for tags in _kept_apart(counts)]
    return lines


def _kept_apart(tags: Collection[str]) -> list[list[str]]:
    """The tags that share a language, by language; Norwegian and its written forms count as one."""
    found = defaultdict(list)
    for tag in sorted(tags):
        language = tag.partition("-")[0]
        found["no" if language in ("nb", "nn") else language].append(tag)
    return [group for group in found.values() if len(group) > 1]


# Taken out of a text before its language is looked for: the order matters, fences before what is inside lines.
_NOT_PROSE = [
    re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)", re.DOTALL),  # a fence that a truncated answer left open, too
    re.compile(r"\$\$.*?\$\$|\\\[(?:(?!\\\[).)*?\\\]|\\\((?:(?!\\\().)*?\\\)", re.DOTALL),
    re.compile(r"\\begin\{(\w{1,20}\*?)\}.{0,4000}?\\end\{\1\}", re.DOTALL),
    re.compile(r"`[^`\n]*`"),
    re.compile(r"\$[^$\n]{1,200}\$"),
    re.compile(r"</?[A-Za-z][^<>\n]*>"),
    re.compile(r"(?:https?://|www\.)\S+|(?<![^\s@])[^\s@]{1,64}@\S+|[#@]\w+"),
    # Names and words that are spoken of; longer quotations are text.
    re.compile(
        r"\"[^\"\n]{1,40}\"|“[^”\n]{1,40}”|„[^“”\n]{1,40}[“”]|«[^»\n]{1,40}»|「[^」\n]{1,20}」|『[^』\n]{1,20}』"
    ),
    # Numbers with their units, paths, identifiers; \w is ASCII, or a clause without spaces would go too.
    re.compile(r"(?<![\w.])[\w.]*(?:\w[_/\\]\w|\d)[\w./\\]*", re.ASCII),
]
_SENTENCE_END = regex.compile(r"(?<=[.!?…؟।])\s+|(?<=[。！？])|\n+|\s\|\s")
_UNSPACED = regex.compile(
    r"[\p{Script=Hani}\p{Script=Hira}\p{Script=Kana}\p{Script=Thai}\p{Script=Laoo}"
    r"\p{Script=Khmr}\p{Script=Mymr}\p{Script=Tibt}]"
)
_LETTER = regex.compile(r"\p{L}")
_WORD = regex.compile(r"\p{L}[\p{L}\p{M}'’-]*")
_SYMBOL = re.compile(r"[{}\[\]()<>=;_\\^+#$|%&/~]")
_FEWEST_WORDS = 4
_FEWEST_LETTERS = 6  # where words are not spaced
_MOST_SENTENCES = 24  # of a text, from all over it: more make it slower and no surer


@dataclass(frozen=True)
class Prose:
    """What of a text is full sentences."""

    sentences: list[str]
    """At most 24, from all over the text."""
    share: float
    """Letters of all its sentences among those of the text without code, formulas and the like, 0 to 1."""


def prose(text: str) -> Prose:
    """The full sentences of a text, without code, formulas, addresses, numbers and short quotations.

    A sentence has four words or more, six letters in scripts that do not space words; and where the script has
    capitals, most of its words begin with a small letter: lists of names have no language. Lines full of symbols
    are code.
    """
    for pattern in _NOT_PROSE:
        text = pattern.sub(" ", text)
    found = [part.strip() for part in _SENTENCE_END.split(text) if part and _is_sentence(part)]
    share = sum(map(letters, found)) / max(1, letters(text))
    return Prose(found[:: max(1, -(-len(found) // _MOST_SENTENCES))], share)


def _is_sentence(text: str) -> bool:
    if 10 * len(_SYMBOL.findall(text)) > letters(text):  # code, or a formula, outside of any fence
        return False
    if len(_UNSPACED.findall(text)) >= _FEWEST_LETTERS:
        return True
    words = _WORD.findall(text)
    capitals = sum(word[0].isupper() for word in words)
    return len(words) >= _FEWEST_WORDS and 2 * capitals <= len(words)


def letters(text: str) -> int:
    """How many letters a text has."""
    return len(_LETTER.findall(text))


# Scripts that are written together count as one.
_LIKE = {"Jpan": ("Hani", "Hira", "Kana"), "Kore": ("Hang", "Hani"), "Hans": ("Hani",), "Hant": ("Hani",)}
_ALSO = {"zh": "Hans", "yue": "Hant"}  # CLDR names no script for them: either is usual


def in_other_script(text: str, language: str) -> bool:
    """Whether nine in ten letters are of scripts that the language is not written in.

    False for languages that are written in several scripts, such as sr, uz and pa, as far as CLDR knows.
    """
    tag = langcodes.Language.get(language)
    script = tag.assume_script().script or _ALSO.get(tag.language or "")
    if not script:
        return False
    own = "".join(rf"\p{{Script={name}}}" for name in _LIKE.get(script, (script,)))
    return len(regex.findall(rf"[[{own}]&&\p{{L}}]", text, flags=regex.V1)) < 0.1 * letters(text)


@dataclass(frozen=True)
class Identified:
    """What the identifier says of a text: a tag, and how sure it is, 0 to 1 over its languages."""

    tag: str
    confidence: float


class LanguageIdentifier:
    """lingua, offline, for some languages or all of the 75 it knows; of others it knows nothing."""

    def __init__(self, candidates: Collection[str] | None = None) -> None:
        """`candidates` are tags: among few languages it is far more often right on short texts than among all."""
        from lingua import Language

        known = {_code(language): language for language in Language.all()}
        wanted = known if candidates is None else {_lingua_code(tag) for tag in candidates}
        self._languages = {code: language for code, language in known.items() if code in wanted}

    def knows(self, tag: str) -> bool:
        """Whether the language is one of its candidates."""
        return self.code(tag) in self._languages

    @staticmethod
    def code(tag: str) -> str:
        """What the language of a tag is called in what `identify` returns."""
        return _lingua_code(tag)

    def identify(self, texts: Sequence[str]) -> list[Identified | None]:
        """The likeliest language of each text; None where there is none, or only one candidate."""
        if self._detector is None:
            return [None] * len(texts)
        found = self._detector.compute_language_confidence_values_in_parallel(list(texts))
        return [
            Identified(_code(values[0].language), values[0].value) if values and values[0].value > 0 else None
            for values in found
        ]

    @cached_property
    def _detector(self) -> Any:
        from lingua import LanguageDetectorBuilder

        if len(self._languages) < 2:
            return None
        return LanguageDetectorBuilder.from_languages(*self._languages.values()).build()


def _code(language: Any) -> str:
    return str(language.iso_code_639_1.name).lower()


def _lingua_code(tag: str) -> str:
    code = tag.partition("-")[0]
    return {"no": "nb", "fil": "tl"}.get(code, code)  # lingua knows the two written forms of Norwegian, and tl


def identify_languages(
    texts: Sequence[str], candidates: Collection[str] | None = None, confidence: float = 0.5
) -> list[str | None]:
    """The tag of each text's language; None where most of its sentences are in no language that is sure.

    A text's language is that of most letters of its full sentences, `confidence` as in `LanguageIdentifier`.
    """
    identifier = LanguageIdentifier(candidates)
    return [
        max(shares, key=lambda tag: shares[tag]) if shares and max(shares.values()) > 0.5 else None
        for shares in language_shares(identifier, texts, confidence)
    ]


def language_shares(
    identifier: LanguageIdentifier, texts: Sequence[str], confidence: float
) -> Iterator[dict[str, float]]:
    """For each text the shares of its sentences' letters by language, of those sure by `confidence`."""
    parts = [prose(text).sentences for text in texts]
    found = iter(identifier.identify([part for of_text in parts for part in of_text]))
    for of_text in parts:
        shares: dict[str, float] = defaultdict(float)
        for part in of_text:
            said = next(found)
            if said and said.confidence >= confidence:
                shares[said.tag] += letters(part)
        total = sum(map(letters, of_text))
        yield {tag: count / total for tag, count in shares.items()}
