"""Rubrics: what a judge is asked, one text file per language."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from congrad_ray.config.judging import Ending
from congrad_ray.config.printable import brief
from congrad_ray.config.recipe import BUILTIN_WORLD
from congrad_ray.config.settings import local_path
from congrad_ray.data.tables import Message

_PACKAGE = Path(__file__).resolve().parents[2]
_BUILT_IN = Path(__file__).resolve().parent / "rubrics"
_FALLBACK = "en"
_PLACEHOLDER = re.compile(r"\{(prompt|response)\}")
_ENDING = re.compile(r"^=== (\w+)[ \t]*\n", re.MULTILINE)
_ENDINGS: tuple[str, ...] = ("expected_score", "sampled", "structured")


class RubricError(ValueError):
    """A rubric cannot be used; the text names it, what is wrong and where."""


@dataclass(frozen=True)
class Rubric:
    """`templates`: language tag (or its primary subtag) to the file's text."""

    name: str
    templates: Mapping[str, str]

    def language_of(self, language: str) -> str:
        """Which template a language gets: its own, its primary subtag's, or English."""
        return next(tag for tag in (language, language.split("-")[0], _FALLBACK) if tag in self.templates)

    def fill(self, language: str, ending: Ending, prompt: Sequence[Message], response: str) -> str:
        """The judge's instruction. The texts are put in at once, so braces in one of them stay what they are."""
        body, endings = _split(self.templates[self.language_of(language)])
        texts = {"prompt": conversation_text(prompt), "response": response}
        if ending == "structured" and ending not in endings:
            endings[ending] = f"\n{_structured(self.language_of(language))}"
        return _PLACEHOLDER.sub(lambda match: texts[match[1]], body + endings.get(ending, ""))

    def digest(self) -> str:
        """Hash of all templates: changes when a rubric file does."""
        text = "\x1f".join(f"{tag}\x1e{self.templates[tag]}" for tag in sorted(self.templates))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_rubric(name: str) -> Rubric:
    """A built-in rubric by name, the built-in world's, or that of a folder of `<language>.txt` files.

    A file holds the placeholders {prompt} and {response}. Its end may differ: what follows a line
    `=== sampled`, `=== expected_score` or `=== structured` (`judge.structured`) is added for that method only; a
    rubric without the last one ends with a sentence of ours.

    Raises RubricError: no such rubric, no English file (the fallback), a placeholder that is missing.
    """
    built_in = {path.name: path for path in sorted(_BUILT_IN.iterdir()) if path.is_dir()}
    built_in[BUILTIN_WORLD] = _PACKAGE / "world" / "rubric"
    folder = built_in.get(name)
    if folder is None:
        folder = local_path(name)
    if not folder.is_dir():
        raise RubricError(f"judge.rubric {brief(name)}: no such folder; built in are {', '.join(built_in)}")
    try:
        templates = {p.stem: p.read_text(encoding="utf-8").strip("\n") for p in sorted(folder.glob("*.txt"))}
    except (OSError, UnicodeDecodeError) as error:
        raise RubricError(f"judge.rubric {name}: cannot read a text of {folder} as UTF-8: {error}") from error
    if _FALLBACK not in templates:
        raise RubricError(f"judge.rubric {name}: {folder} needs {_FALLBACK}.txt, for languages without their own")
    for tag, template in templates.items():
        body, endings = _split(template)
        missing = {"prompt", "response"} - set(_PLACEHOLDER.findall(body))
        if missing:
            raise RubricError(f"judge.rubric {name}: {tag}.txt lacks {{{'} and {'.join(sorted(missing))}}}")
        unknown = sorted(set(endings) - set(_ENDINGS))
        if unknown:
            raise RubricError(
                f"judge.rubric {name}: {tag}.txt has endings for {', '.join(unknown)}; known are "
                f"{', '.join(_ENDINGS)}"
            )
    return Rubric(name, templates)


def structured_endings() -> dict[str, str]:
    """What a rubric that says nothing of `structured` ends with, by the language of its text."""
    texts: dict[str, str] = json.loads((Path(__file__).parent / "structured.json").read_text(encoding="utf-8"))
    return texts


def _structured(language: str) -> str:
    texts = structured_endings()
    return texts.get(language, texts[_FALLBACK])


def conversation_text(messages: Sequence[Message]) -> str:
    """The text of a single message, or every message of a conversation under its role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)


def _split(template: str) -> tuple[str, dict[str, str]]:
    """A file's common part and its endings by method."""
    body, *rest = _ENDING.split(template)
    return body, dict(zip(rest[::2], rest[1::2], strict=True))
