"""Kinds of values that sections of a recipe share."""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from congrad_ray.config.chat_template import is_jinja
from congrad_ray.config.languages import full_tag
from congrad_ray.config.settings import local_path, why_not_read


def _template_text(template: str) -> str:
    """Workers on other nodes may not have the file, and the template's text decides results: it is read here.

    A plain word that is no file is the name of one of the tokenizer's templates.
    """
    if is_jinja(template):
        return template
    try:
        path = local_path(template)
        if not path.exists() and re.fullmatch(r"[\w-]+", template):
            return template
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the chat template: {why_not_read(error)}") from error
    if not is_jinja(text):
        raise ValueError("the file of the chat template has neither {{ nor {% in it: no Jinja")
    return text


def _day(value: Any) -> Any:
    # YAML makes a date of 2024-07-26 where it is not quoted.
    return value.isoformat() if type(value) is date else value


def _iso_day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise ValueError("not a day as in 2024-07-26") from error


def regular_expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return text


def is_null(value: object) -> bool:
    return value is None


Language = Annotated[str, AfterValidator(full_tag)]
ChatTemplate = Annotated[str, AfterValidator(_template_text)]
Day = Annotated[str, BeforeValidator(_day), AfterValidator(_iso_day)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
TensorType = Literal["float32", "bfloat16"]


def batch_tokens(chosen: int | None, device: str) -> int:
    """Tokens of a micro-batch on a device: on a CPU smaller ones cost nothing and show progress."""
    return chosen or (4096 if device == "cpu" else 8192)
