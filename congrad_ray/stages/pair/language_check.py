"""Is a text in the language it should be in? Right, wrong or unknown, by its full sentences; offline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import langcodes

from congrad_ray.data.languages import Identified, LanguageIdentifier, Prose, in_other_script, letters, prose

Verdict = Literal["right", "wrong", "unknown"]

_MOST = 0.75  # of the letters of full sentences; a text with less of either is mixed
_ENOUGH = 0.5  # of a text's letters are in full sentences: a list with a sentence in it has no wrong language
_CLOSE = 20  # CLDR's distance of tags: id and ms, nb and da, hr and sr are nearer


class LanguageCheck:
    """Checks texts against the languages of a run.

    The identifier chooses among the run's languages and English only: on short texts that is far more often
    right than choosing among all the languages there are. Of a language that it does not know a text can be
    wrong only by its script.
    """

    def __init__(self, languages: Sequence[str], confidence: float, min_characters: int) -> None:
        """`confidence`, 0 to 1, is asked of each sentence; texts of fewer than `min_characters` are unknown."""
        self._identifier = LanguageIdentifier([*languages, "en"])
        self._confidence = confidence
        self._min_characters = min_characters

    def verdicts(self, texts: Sequence[str], languages: Sequence[str]) -> list[Verdict]:
        """For each text what can be said of its being in the language (tag) that it should be in.

        wrong: it is full sentences for the most part, and three quarters of their letters are surely of other
        languages; right: as many are surely of this one. Everything else is unknown: code, formulas, names, short
        and mixed text, and languages that can hardly be told apart.
        """
        parts = [prose(text if len(text.strip()) >= self._min_characters else "") for text in texts]
        found = iter(self._identifier.identify([sentence for part in parts for sentence in part.sentences]))
        return [
            self._verdict(part, [next(found) for _ in part.sentences], language)
            for part, language in zip(parts, languages, strict=True)
        ]

    def _verdict(self, text: Prose, found: Sequence[Identified | None], language: str) -> Verdict:
        counts = dict.fromkeys(("right", "wrong", "unknown"), 0)
        for sentence, said in zip(text.sentences, found, strict=True):
            counts[self._of_sentence(sentence, said, language)] += letters(sentence)
        total = sum(counts.values())
        if total and counts["wrong"] >= _MOST * total:
            return "wrong" if text.share >= _ENOUGH else "unknown"
        return "right" if total and counts["right"] >= _MOST * total else "unknown"

    def _of_sentence(self, sentence: str, said: Identified | None, language: str) -> Verdict:
        if in_other_script(sentence, language):
            return "wrong"
        if not self._identifier.knows(language) or said is None or said.confidence < self._confidence:
            return "unknown"
        if said.tag == self._identifier.code(language):
            return "right"
        return "unknown" if _close(language, said.tag) else "wrong"


@lru_cache
def _close(one: str, other: str) -> bool:
    # With the same script: Serbian in Latin letters is what is like Croatian.
    first, second = (f"{tag.partition('-')[0]}-Latn" for tag in (one, other))
    return min(langcodes.tag_distance(first, second), langcodes.tag_distance(second, first)) < _CLOSE
