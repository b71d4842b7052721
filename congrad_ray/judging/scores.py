"""Reading a judge's score from its text or from the distribution of its first token. Unreadable is None."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence

MAXIMUM = 5

# "Score" in the languages of the rubrics and some more; a judge may answer in either language.
_LABELS = (
    "score", "rating", "total score", "final score",
    "punktzahl", "bewertung", "gesamtpunktzahl", "punkte", "note",
    "puntuación", "puntaje", "calificación", "puntos", "nota", "pontuação", "pontos",
    "points", "évaluation", "punteggio", "voto", "wynik", "ocena", "puan", "điểm", "skor",
    "оценка", "балл", "баллы", "评分", "得分", "分数", "總分", "总分", "評分", "分數",
    "得点", "点数", "スコア", "評価", "점수", "अंक", "स्कोर", "الدرجة", "النتيجة", "النقاط", "التقييم",
)  # fmt: skip
_LABELLED = re.compile(
    r"(?<!\w)(?:" + "|".join(sorted(_LABELS, key=len, reverse=True)) + r")[ \t]*[:=][ \t]*(?=[-+]?\d)([^\n]*)",
    re.IGNORECASE,
)
_OUT_OF = re.compile(rf"(?<=\d)\s*(?:/|out of|of|von|de|sur|из|من|में से|中)\s*{MAXIMUM}(?![\d.,]*\d)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)?")
_BARE = re.compile(r"\d+(?:[.,]\d+)?(?:\s*/\s*5)?\.?")


def read_score(text: str) -> float | None:
    """The score in 0..5 that a judge's text ends with, or None where it is missing or in doubt.

    The last labelled number ("Score: 4", also in other languages and digits) decides; without one, a text that
    is a number and nothing else does. "7/5", "4/10", "4 or 5" and "3-4" are None: a statement must hold one number
    of the right range, "/5" aside.
    """
    plain = _plain(text)
    statements = _LABELLED.findall(plain)
    if statements:
        return _single_number(statements[-1])
    return _single_number(plain) if _BARE.fullmatch(plain.strip()) else None


def expected_score(
    logprobs: Mapping[int, float], score_tokens: Sequence[Sequence[int]]
) -> tuple[float | None, float]:
    """E[score] over the tokens of '0'..'5', and the probability mass (0..1) of these tokens together.

    `logprobs`: natural log-probabilities of the first generated token by token id. `score_tokens`: for each score
    from 0 the ids that spell it. E = sum_k k p_k / sum_k p_k; None where the mass is 0 or not a number.
    """
    masses = [
        math.fsum(math.exp(min(logprobs[token], 0.0)) for token in tokens if token in logprobs)
        for tokens in score_tokens
    ]
    mass = math.fsum(masses)
    if not mass > 0:
        return None, 0.0
    return math.fsum(score * part for score, part in enumerate(masses)) / mass, mass


def score_token_ids(vocabulary: Mapping[str, int]) -> list[list[int]]:
    """For each score 0..5 the ids of the tokens that spell it, with or without the mark of a space before.

    `vocabulary`: token text to id, a tokenizer's `get_vocab()`. Raises ValueError if a digit is no token.
    """
    found = [
        sorted({vocabulary[mark + str(score)] for mark in ("", "Ġ", "▁", " ") if mark + str(score) in vocabulary})
        for score in range(MAXIMUM + 1)
    ]
    missing = [str(score) for score, tokens in enumerate(found) if not tokens]
    if missing:
        raise ValueError(
            f"the judge's tokenizer has no token for {', '.join(missing)}, so its scores cannot be read off "
            "one token: set judge.method: sampled"
        )
    return found


def _plain(text: str) -> str:
    """The text with half-width ASCII digits and punctuation and without Markdown emphasis."""
    text = unicodedata.normalize("NFKC", text)
    text = "".join(str(unicodedata.digit(c)) if c.isdigit() and not c.isascii() else c for c in text)
    return re.sub(r"[*_`]", "", text)


def _single_number(statement: str) -> float | None:
    numbers = _NUMBER.findall(_OUT_OF.sub("", statement))
    if len(numbers) != 1:
        return None
    value = float(numbers[0].replace(",", "."))
    return value if 0 <= value <= MAXIMUM else None
