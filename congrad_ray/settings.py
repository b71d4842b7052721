"""Reading strict YAML settings: shared by recipes (what to do) and profiles (where to run)."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class SettingsError(ValueError):
    """A recipe or profile is wrong; the text names each key's path, its value and what is allowed."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-4 for a string; YAML 1.2, and everyone who writes a learning rate, for a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """The value in a YAML text; plain values only (SafeLoader). Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


class Settings(BaseModel):
    """Base of every settings model: unknown keys are errors, values are not coerced, nothing mutates."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


SettingsType = TypeVar("SettingsType", bound=Settings)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises SettingsError naming the file when there is none."""
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise SettingsError(f"{path} should hold a mapping of settings, found {type(value).__name__}")
    return value


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` with each `a.b=c` set, c read as YAML. Raises SettingsError for text of another form."""
    result = copy.deepcopy(values)
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise SettingsError(f"setting {override!r} should have the form section.key=value")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            raise SettingsError(f"setting {override!r}: the value is not YAML: {error}") from error
        section = result
        for key in keys[:-1]:
            if section.get(key) is None:
                section[key] = {}
            section = section[key]
            if not isinstance(section, dict):
                raise SettingsError(f"setting {override!r}: '{key}' is a value, not a section")
        section[keys[-1]] = value
    return result


def validate(model: type[SettingsType], values: dict[str, Any], source: str) -> SettingsType:
    """`values` as `model`. Raises SettingsError with one line for each wrong key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(model, problem) for problem in error.errors()]
        raise SettingsError(f"{source} has {len(lines)} wrong setting(s):\n" + "\n".join(lines)) from error


def _explain(model: type[BaseModel], problem: Any) -> str:
    location = [part for part in problem["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    path = ".".join(str(part) for part in location) or "(the whole file)"
    if problem["type"] == "extra_forbidden":
        return f"  {path}: no such setting; allowed here: {', '.join(_allowed(model, location[:-1]))}"
    if problem["type"] == "missing":
        return f"  {path}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    found = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r:.200})"
    return f"  {path}: {message}{found}"


def _allowed(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    current: Any = model
    for part in location:
        field = current.model_fields.get(part) if isinstance(part, str) else None
        nested = getattr(field, "annotation", None)
        if not (isinstance(nested, type) and issubclass(nested, BaseModel)):
            break
        current = nested
    return list(current.model_fields)


def to_yaml(settings: Settings) -> str:
    """The settings with every default written out, as YAML in the order of the models."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
