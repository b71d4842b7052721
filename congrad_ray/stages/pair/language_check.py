"""Is a text in the language it should be in? An offline identifier (lingua) that may say it does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import langcodes


class LanguageCheck:
    """Checks texts against the languages of a run; languages that lingua does not know are never wrong.

    The identifier chooses among the run's languages and English only: on short texts that is far more often
    right than choosing among all the languages there are.
    """

    def __init__(self, languages: Sequence[str], confidence: float, min_characters: int) -> None:
        from lingua import IsoCode639_1, LanguageDetectorBuilder

        known = {}
        for tag in [*languages, "en"]:
            code = langcodes.get(tag).language or ""
            if code == "no":  # lingua knows the two written forms of Norwegian
                code = "nb"
            iso = getattr(IsoCode639_1, code.upper(), None)
            if iso is not None:
                known[code] = iso
        self._codes = {iso: code for code, iso in known.items()}
        self._confidence = confidence
        self._min_characters = min_characters
        self._detector: Any = None
        if len(known) > 1:
            self._detector = LanguageDetectorBuilder.from_iso_codes_639_1(*known.values()).build()

    def wrong(self, texts: Sequence[str], languages: Sequence[str]) -> list[bool]:
        """For each text whether it is in another language than it should, with the confidence asked for.

        Never wrong: texts shorter than the minimum, languages that the identifier does not know.
        """
        if self._detector is None:
            return [False] * len(texts)
        found = self._detector.compute_language_confidence_values_in_parallel(list(texts))
        return [
            self._is_wrong(text, language, values)
            for text, language, values in zip(texts, languages, found, strict=True)
        ]

    def _is_wrong(self, text: str, language: str, values: Sequence[Any]) -> bool:
        code = langcodes.get(language).language
        code = "nb" if code == "no" else code
        if code not in self._codes.values() or len(text.strip()) < self._min_characters or not values:
            return False
        best = values[0]
        return self._codes[best.language.iso_code_639_1] != code and best.value >= self._confidence
