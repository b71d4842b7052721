"""A recipe to start from: every setting with its default and what it is for, taken from the models themselves."""

from __future__ import annotations

import textwrap
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import Settings, validate

_WIDTH = 100
# What a first run needs that no default can know: small enough for two cores and some minutes.
_SET: dict[str, Any] = {
    "prompts.languages": ["en", "de", "fr"],
    "prompts.train_per_language": 100,
    "prompts.evaluation_per_language": 20,
    "model.dtype": "float32",
    "model.max_length": 512,
    "generate.max_tokens": 96,
    "judge.rubric": "builtin-world",
    "judge.method": "expected_score",
    "judge.max_length": 512,
    "evaluate.max_tokens": 96,
    "sketch.width": 16384,
    "train.learning_rate": 1e-4,
}


def starter_recipe(name: str, schema: str | None = None) -> str:
    """The text of a recipe of this name that loads as it is. `schema`: the file of its JSON schema, for editors.

    Settings at their defaults are commented out.
    """
    values: dict[str, Any] = {"name": name}
    for path, value in _SET.items():
        section, key = path.split(".")
        values.setdefault(section, {})[key] = value
    validate(Recipe, values, "the starter recipe")
    lines = [f"# yaml-language-server: $schema={schema}"] if schema else []
    lines += [
        "# A recipe: what to do. Where to do it is the profile's matter (congrad run --profile).",
        "# A setting with a # before it has the value shown; take the # away to set another.",
        "",
    ]
    for key, field in Recipe.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, Settings):
            lines += ["", *_section(key, nested, values.get(key, {}))]
        else:
            lines += _setting(key, field, values, 0)
    return "\n".join(lines) + "\n"


def _section(key: str, model: type[BaseModel], values: dict[str, Any]) -> list[str]:
    said = textwrap.wrap(" ".join((model.__doc__ or "").split()), _WIDTH - 2)
    if not values:  # a section needs a setting that is not commented out
        name, field = next(iter(model.model_fields.items()))
        values = {name: field.get_default(call_default_factory=True)}
    inner = [line for name, field in model.model_fields.items() for line in _setting(name, field, values, 1)]
    return [*(f"# {line}" for line in said), f"{key}:", *inner]


def _setting(key: str, field: FieldInfo, values: dict[str, Any], depth: int) -> list[str]:
    """A setting with its comment above it: `# comment`, then `#key: value` or `key: value`."""
    indent = "  " * depth
    message = "; ".join(part for part in (field.description, _choices(field.annotation)) if part)
    comment = [f"{indent}# {line}" for line in textwrap.wrap(message, _WIDTH - 2 - len(indent))]
    if key in values:
        return [*comment, f"{indent}{key}: {_yaml(values[key])}"]
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        inner = [line for name, each in type(default).model_fields.items() for line in _setting(name, each, {}, 0)]
        inner = [line.removeprefix("#") if line.startswith("#") and line[1] != " " else line for line in inner]
        return [*comment, f"{indent}#{key}:", *(f"{indent}#  {line}" for line in inner)]
    return [*comment, f"{indent}#{key}: {_yaml(default)}"]


def _choices(annotation: Any) -> str:
    """`one of a, b` for a setting that is one of a few."""
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(str(choice) for choice in get_args(annotation))}"
    return next((found for part in get_args(annotation) if (found := _choices(part))), "")


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...").strip()
