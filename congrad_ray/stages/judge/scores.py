"""Reading a judge's score from its text or from the distribution of its first token. Unreadable is None."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

MAXIMUM = 5

# The noughts of scripts that are written with digits of their own; vLLM takes no more than 128 tokens to look at.
_ZEROS = "0０٠۰०০๐"
_SPACES = ("", "Ġ", "▁", " ")

# By language, words that name the score itself, and words that as often count points for one part of the rubric or
# begin a remark ("Nota: ..."). What is a score in one language is a remark in another ("note"), so a judgement is
# read by its own language's words, and by the English ones: that is the rubric of languages without their own.
_PRIMARY: dict[str, tuple[str, ...]] = {
    "en": ("score", "rating", "grade"),
    "ar": ("الدرجة", "الدرجة النهائية", "النتيجة", "التقييم"),
    "de": ("punktzahl", "gesamtpunktzahl", "bewertung", "gesamtbewertung"),
    "es": ("puntuación", "puntuación final", "puntuación total", "puntaje", "calificación"),
    "fr": ("note", "note finale", "note globale", "score final", "évaluation"),
    "hi": ("अंक", "कुल अंक", "स्कोर"),
    "it": ("punteggio", "punteggio finale", "voto", "valutazione"),
    "ja": ("得点", "点数", "スコア", "評価", "最終スコア"),
    "ko": ("점수", "총점", "평점"),
    "pl": ("wynik", "ocena"),
    "pt": ("pontuação", "pontuação final", "pontuação total", "classificação"),
    "ru": ("оценка", "итоговая оценка", "общая оценка"),
    "tr": ("puan", "skor"),
    "vi": ("điểm", "điểm số"),
    "zh": ("评分", "得分", "分数", "总分", "最终评分", "評分", "分數", "總分"),
}
_SECONDARY: dict[str, tuple[str, ...]] = {
    "en": ("points", "total"),
    "ar": ("النقاط",),
    "de": ("punkte",),
    "es": ("puntos", "nota"),
    "it": ("punti",),
    "pt": ("pontos", "nota"),
    "ru": ("балл", "баллы"),
}
_QUALIFIED = r"(?:(?:the|my|your|this|final|total|overall|assigned)[ ]+)*"
_RANGE = r"(?:\s?\((?:0\s?[-–]\s?5|(?:/|out of)\s?5)\))?"
# A label is the first word of its line or sentence: "Relevance score: 1" is a part's.
_BEGINNING = r"(?:^|[.!?;,|。।])[ \t>#•\"'\-]*"
_VALUE = re.compile(
    r"[\[(<{\"'“”«]*(?P<value>\d(?:[.,]\d{1,2})?)(?!\d)[\])>}\"'“”»]*"
    rf"(?:\s*\(?\s*(?:/|out of|of|von|de|sur|su|из|中|में से|من|üzerinden)\s*{MAXIMUM}(?:[.,]0+)?(?!\d)\)?)?"
    r"(?:\s*(?:points?|stars?|punkte?n?|puntos?|pontos?|punti|балл\w*|分|点|점|अंक|puan|điểm))?"
    r"(?P<rest>.*)",
    re.IGNORECASE,
)
_REST = re.compile(r"\s*(?:[.!,;:()|\-–—][^\d]*)?")
_END = re.compile(r"[\s.!]*")
_MARKED = re.compile(r"\[\[\s*([-+]?\d[^\[\]\n]*)\]\]")


def read_score(text: str, language: str) -> float | None:
    """The score in 0..5 that a judge states in `language` or in English, or None where none is stated for certain.

    A statement is a line or sentence "Score: 4", also with [[4]], <4>, "4/5" or "4 out of 5"; a [[4]] by itself;
    or the entry "score" of a JSON object. All statements have to agree, whatever their labels: a judge that says 3
    and then 4 is in doubt. Labels such as "Points" count only where there is no other, once, and with nothing
    behind the number. Without any label a text that is a number and nothing else is a score.
    """
    try:
        found = list(_statements(text, language))
    except RecursionError:  # JSON as deep as the stack
        return None
    if found:
        return found[0] if len(set(found)) == 1 else None
    plain = _plain(text)
    secondary = [match[1] for match in _labelled(language, primary=False).finditer(plain)]
    if secondary:
        return _number(secondary[0], _END) if len(secondary) == 1 else None
    return _number(plain.strip(), _END)


def expected_score(
    logprobs: Mapping[int, float], score_tokens: Sequence[Sequence[int]]
) -> tuple[float | None, float]:
    """E[score] over the tokens of '0'..'5', and the probability mass (0..1) of these tokens together.

    `logprobs`: natural log-probabilities of the first generated token by token id. `score_tokens`: for each score
    from 0 the ids that spell it. E = sum_k k p_k / sum_k p_k; None where no score token has a probability.
    """
    known = [[logprobs[token] for token in tokens if token in logprobs] for tokens in score_tokens]
    largest = max((value for values in known for value in values), default=-math.inf)
    if not math.isfinite(largest) or any(math.isnan(value) for values in known for value in values):
        return None, 0.0
    # Relative to the largest: the mass itself may be too small for a number, the shares of it are not.
    shares = [math.fsum(math.exp(value - largest) for value in values) for values in known]
    total = math.fsum(shares)
    score = math.fsum(score * share for score, share in enumerate(shares)) / total
    return score, min(1.0, total * math.exp(min(largest, 0.0)))


def score_token_ids(vocabulary: Mapping[str, int]) -> list[list[int]]:
    """For each score 0..5 the ids of the tokens that spell it with or without the mark of a space before.

    `vocabulary`: token text to id, a tokenizer's `get_vocab()`. Raises ValueError if a digit is no token.
    """
    found = [
        sorted(
            {
                vocabulary[text]
                for zero in _ZEROS
                for mark in _SPACES
                if (text := mark + chr(ord(zero) + score)) in vocabulary
            }
        )
        for score in range(MAXIMUM + 1)
    ]
    missing = [str(score) for score, tokens in enumerate(found) if not tokens]
    if missing:
        raise ValueError(
            f"the judge's tokenizer has no token for {', '.join(missing)}, so its scores cannot be read off "
            "one token: set judge.method: sampled"
        )
    return found


def score_texts() -> list[list[str]]:
    """For each score 0..5 the texts of tokens that spell it, for servers whose vocabulary nobody knows."""
    return [
        [mark + chr(ord(zero) + score) for zero in _ZEROS for mark in ("", " ")] for score in range(MAXIMUM + 1)
    ]


def _statements(text: str, language: str) -> Iterator[float | None]:
    """What all statements say that have a primary label, are in [[...]] or in a JSON object; None: no score."""
    labels = {*_labels(language, primary=True), "final score", "total score", "overall score", "overall rating"}
    start, end = text.find("{"), text.rfind("}") + 1
    try:
        entries = json.loads(text[start:end]) if 0 <= start < end else {}
    except ValueError:  # braces of another kind
        entries = {}
    if isinstance(entries, dict) and entries:
        text = f"{text[:start]}\n{text[end:]}"
        for name, value in entries.items():
            if name.lower().replace("_", " ").strip() in labels:
                yield _number(_plain(str(value)).strip(), _END)
    plain = _plain(text)
    for match in _labelled(language, primary=True).finditer(plain):
        yield _number(match[1], _REST)
    for match in _MARKED.finditer(plain):
        yield _number(match[1].strip(), _END)


def _labels(language: str, primary: bool) -> set[str]:
    words = _PRIMARY if primary else _SECONDARY
    return {*words["en"], *words.get(language.split("-")[0].lower(), ())}


@cache
def _labelled(language: str, primary: bool) -> re.Pattern[str]:
    """A label with a number after it; the group is the number and what follows it on its line."""
    words = "|".join(sorted(map(re.escape, _labels(language, primary)), key=len, reverse=True))
    return re.compile(
        rf"{_BEGINNING}{_QUALIFIED}(?:{words})[\"']?{_RANGE}\s?[:=][ \t]*(?=[\[(<{{\"'“”«]*[-+]?[.,]?\d)([^\n]*)",
        re.IGNORECASE | re.MULTILINE,
    )


def _plain(text: str) -> str:
    """The text with ASCII digits, decimal points and punctuation, and without Markdown emphasis."""
    text = unicodedata.normalize("NFKC", text).replace("\N{ARABIC DECIMAL SEPARATOR}", ".")
    text = "".join(str(unicodedata.digit(c)) if c.isdigit() and not c.isascii() else c for c in text)
    return re.sub(r"[*_`]", "", text)


def _number(statement: str, rest: re.Pattern[str]) -> float | None:
    """The score that the statement begins with, if what follows it is `rest`."""
    match = _VALUE.match(statement)
    if match is None or not rest.fullmatch(match["rest"]):
        return None
    value = float(match["value"].replace(",", "."))
    return value if value <= MAXIMUM else None
