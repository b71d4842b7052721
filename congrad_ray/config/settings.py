"""Reading strict YAML settings: shared by recipes (what to do) and profiles (where to run)."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from congrad_ray.config.printable import brief, printable, shown


class SettingsError(ValueError):
    """A recipe or profile is wrong; the text names each key's path, its value and what is allowed."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-4 for a string; YAML 1.2, and everyone who writes a learning rate, for a number.

    Refuses what PyYAML lets pass: a key that is there twice, of which all but the last would be lost without a
    word, lone surrogates, and integers of more than 64 bits, which nothing here can hold.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        None, None, f"the key {shown(key.value)} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise yaml.MarkedYAMLError(None, None, "a lone surrogate is no Unicode text", node.start_mark)
        return node

    def construct_integer(self, node: Any) -> int:
        value = int(self.construct_yaml_int(node))
        if not -(2**63) <= value < 2**63:
            raise yaml.MarkedYAMLError(None, None, "an integer of more than 64 bits", node.start_mark)
        return value


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def parse_yaml(text: str) -> Any:
    """The value in a YAML text; plain values only (SafeLoader). Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML lets out what int, datetime and its own recursion raise
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


class Settings(BaseModel):
    """Base of every settings model: unknown keys are errors, values are not coerced, numbers are finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


SettingsType = TypeVar("SettingsType", bound=Settings)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises SettingsError naming the file when there is none."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read {brief(path)}: {brief(error)}") from error
    return settings_in(data, str(path))


def settings_in(data: bytes, source: str) -> dict[str, Any]:
    """The mapping in the bytes of a YAML file. Raises SettingsError naming the `source`."""
    try:
        value = parse_yaml(data.decode("utf-8-sig"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"cannot read {printable(source)}: {printable(error, lines=True)}") from error
    if not isinstance(value, dict):
        raise SettingsError(f"{printable(source)} should hold a mapping of settings, found {type(value).__name__}")
    return value


def local_path(name: str) -> Path:
    """The path that a setting names, whether or not it exists. Raises SettingsError for text that can be none."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a folder one may not look into, an unknown ~user
        why = getattr(error, "strerror", None) or error
        raise SettingsError(f"{brief(name)} cannot be used as a path: {why}") from error
    return path


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` with each `a.b=c` set, c read as YAML. Raises SettingsError for text of another form."""
    result = copy.deepcopy(values)
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise SettingsError(f"setting {shown(override)} should have the form section.key=value")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            raise SettingsError(
                f"setting {shown(override)}: the value is not YAML: {printable(error, lines=True)}"
            ) from error
        section = result
        for key in keys[:-1]:
            if section.get(key) is None:
                section[key] = {}
            section = section[key]
            if not isinstance(section, dict):
                raise SettingsError(f"setting {shown(override)}: {shown(key)} is a value, not a section")
        section[keys[-1]] = value
    return result


def validate(model: type[SettingsType], values: dict[str, Any], source: str) -> SettingsType:
    """`values` as `model`. Raises SettingsError with one line for each wrong key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(model, problem) for problem in error.errors()]
        raise SettingsError(
            f"{printable(source)} has {len(lines)} wrong setting(s):\n" + "\n".join(lines)
        ) from error


def _explain(model: type[BaseModel], problem: Any) -> str:
    location = [part for part in problem["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    path = brief(".".join(str(part) for part in location)) or "(the whole file)"
    if problem["type"] == "extra_forbidden":
        return f"  {path}: no such setting; allowed here: {', '.join(_allowed(model, location[:-1]))}"
    if problem["type"] == "missing":
        return f"  {path}: missing"
    message = printable(problem["msg"].removeprefix("Value error, "))
    found = "" if isinstance(problem["input"], dict) else f" (found {shown(problem['input'])})"
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
