"""Comparing two responses by a judge: what is asked, and reading the verdict."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from congrad_ray.data.tables import Message
from congrad_ray.stages.judge.rubric import conversation_text

Order = Literal["model_first", "baseline_first"]
ORDERS: tuple[Order, ...] = ("model_first", "baseline_first")

_PLACEHOLDER = re.compile(r"\{(prompt|first|second)\}")
_VERDICT = re.compile(r"verdict[ \t]*[:=：][ \t]*([^\n]*)", re.IGNORECASE)
_CHOICE = re.compile(r"[\[(<\"']*(?:answer[ _])?(a|b|tie)[\])>\"']*[.!]?", re.IGNORECASE)


def pairwise_template() -> str:
    """The text of the built-in comparison."""
    return (Path(__file__).parent / "pairwise.txt").read_text(encoding="utf-8")


def fill_pairwise(template: str, prompt: Sequence[Message], first: str, second: str) -> str:
    """The judge's instruction; the texts are put in at once, so braces in one of them stay what they are."""
    texts = {"prompt": conversation_text(prompt), "first": first, "second": second}
    return _PLACEHOLDER.sub(lambda match: texts[match[1]], template)


def read_win(text: str, order: Order) -> float | None:
    """1 if the judge prefers the model, 0 the baseline, 0.5 a tie; None if it says none of these or two."""
    choices = [_CHOICE.fullmatch(verdict.strip()) for verdict in _VERDICT.findall(re.sub(r"[*`]", "", text))]
    found = {choice and choice[1].lower() for choice in choices}
    choice = found.pop() if len(found) == 1 else None
    if choice is None:
        return None
    return 0.5 if choice == "tie" else float((choice == "a") == (order == "model_first"))
