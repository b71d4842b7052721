"""The true quality of a response, by program."""

import re
import unicodedata
from difflib import SequenceMatcher
from functools import cache

from congrad_ray.world.languages import ALL_LANGUAGES, vocabulary
from congrad_ray.world.tasks import task_content

CONTENT_WEIGHT = 0.4
LANGUAGE_WEIGHT = 0.2
CLOSING_WEIGHT = 0.2
ONCE_WEIGHT = 0.2

# Python's \w leaves out Hindi vowel signs, so a word is what stands between spaces and punctuation.
_WORD = re.compile(r"[^\s.,:;!?¡¿।✓\"“”„«»()]+")
_LONGEST_CONTENT = 32


@cache
def _any_closing() -> re.Pattern[str]:
    return re.compile("|".join(re.escape(vocabulary(language).sign_off()) for language in ALL_LANGUAGES))


@cache
def _any_statement() -> re.Pattern[str]:
    return re.compile("|".join(re.escape(vocabulary(language).statement + ":") for language in ALL_LANGUAGES))


@cache
def _answer_words(language: str) -> frozenset[str]:
    words = vocabulary(language)
    phrases = (words.statement, words.closing, *words.items, *words.days, *words.opposites)
    return frozenset(word for phrase in phrases for word in _WORD.findall(phrase))


def _content_part(task: str, said: list[str]) -> float:
    """1 if the content is right in any language (the language is scored apart), else at most a half."""
    best = 0.0
    for language in ALL_LANGUAGES:
        expected = task_content(task, language)
        if said == expected:
            return 1.0
        best = max(best, SequenceMatcher(None, expected, said, autojunk=False).ratio() / 2)
    return best


def _language_part(language: str, text: str) -> float:
    """The share of the words (numbers have no language) that belong to the answers of `language`."""
    words = [word for word in _WORD.findall(text) if not word.isdigit()]
    return sum(word in _answer_words(language) for word in words) / len(words) if words else 0.0


def true_score(task: str, language: str, response: str) -> float:
    """How good a response is, in [0, 1]; the best answer has 1.0 and a response that states nothing 0.0.

    The sum of four parts, each in [0, 1] times its weight:
        content (0.4): 1 if the first statement says what the task asks for, in whatever language, otherwise
            half the similarity (`difflib` ratio) of the words said to the words expected;
        language (0.2): the share of the response's words that belong to the language of the prompt;
        closing (0.2): 1 if a closing phrase stands once, at the end; a half if it is repeated or elsewhere;
        once (0.2): 1 if the answer is stated in one sentence and nothing else is said but the closing.

    Never raises on any response.

    Raises:
        ValueError: `task` is not a task of this world, or the world does not speak the language.
    """
    text = " ".join(unicodedata.normalize("NFC", response).split())
    closings = _any_closing().findall(text)
    ends_with_closing = bool(closings) and text.endswith(closings[-1])
    before, *statements = _any_statement().split(_any_closing().sub(" ", text))
    first_statement, _, rest = (statements[0] if statements else before).partition(".")
    said = _WORD.findall(first_statement)[:_LONGEST_CONTENT]
    content = _content_part(task, said)
    if not said:
        return 0.0
    stated_once = len(statements) == 1 and not _WORD.search(before) and not _WORD.search(rest)
    closing = 0.0 if not closings else 1.0 if len(closings) == 1 and ends_with_closing else 0.5
    total = (
        CONTENT_WEIGHT * content
        + LANGUAGE_WEIGHT * _language_part(language, text)
        + CLOSING_WEIGHT * closing
        + ONCE_WEIGHT * stated_once
    )
    return round(total, 6)
