"""Reading strict YAML settings: shared by recipes (what to do) and profiles (where to run)."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

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
    """Base of every settings model: unknown keys are errors, values are not coerced, numbers are finite.

    `gone` names settings that there were in older versions, and what to do without each.
    """

    gone: ClassVar[Mapping[str, str]] = {}
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


SettingsType = TypeVar("SettingsType", bound=Settings)


def read_yaml(path: Path, what: str = "") -> dict[str, Any]:
    """The mapping in a YAML file; `what` it is goes into messages. Raises SettingsError naming the file."""
    name = f"{what} {brief(path)}".strip()
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read {name}: {why_not_read(error)}") from error
    return settings_in(data, name)


def settings_in(data: bytes, source: str) -> dict[str, Any]:
    """The mapping in the bytes of a YAML file. Raises SettingsError naming the `source`."""
    try:
        value = parse_yaml(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SettingsError(f"cannot read {printable(source)}: {why_not_read(error)}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"cannot read {printable(source)}: {_where(error)}") from error
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise SettingsError(f"{printable(source)} should hold a mapping of settings (key: value), found {found}")
    return value


def _where(error: yaml.YAMLError) -> str:
    """What is wrong in a YAML text, on one line, with the place."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    if mark is None or problem is None:
        return printable(error, lines=True)
    return f"line {mark.line + 1}, column {mark.column + 1}: {printable(problem)}"


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
            raise SettingsError(f"setting {shown(override)}: the value is not YAML: {_where(error)}") from error
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
        explained: dict[tuple[str, str], list[str]] = {}
        for problem in error.errors():
            path, message, found = _explain(model, problem)
            explained.setdefault((path, found), []).append(message)
        # A setting that may be of several types comes once for each of them.
        lines = [f"  {path}: {', or '.join(messages)}{found}" for (path, found), messages in explained.items()]
        count = "1 wrong setting" if len(lines) == 1 else f"{len(lines)} wrong settings"
        raise SettingsError(f"{printable(source)} has {count}:\n" + "\n".join(lines)) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean x?)` with the most similar of the known names, or nothing where none is similar."""
    similar = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {similar[0]}?)" if similar else ""


def why_not_read(error: Exception) -> str:
    """Why a file cannot be read or written, without the number of the system's error and without the path."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    reason = error.strerror if isinstance(error, OSError) else None
    return reason.lower() if reason else brief(error)


# What is wrong by pydantic's type of error; names in braces are of its context.
_SENTENCES = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text (in quotes where YAML takes it for something else)",
    "string_too_short": "must not be empty",
    "bool_type": "must be true or false",
    "too_short": "must have at least {min_length} of them",
    "list_type": "must be a list: [a, b]",
    "dict_type": "must be a mapping: {{key: value}}",
    "literal_error": "must be {expected}",
    "multiple_of": "must be a multiple of {multiple_of}",
}


def _explain(model: type[Settings], problem: Any) -> tuple[str, str, str]:
    """Which key is wrong, what it must be, and what was found."""
    # Not keys, but the branches of a union and the validators that pydantic went through.
    location = [part for part in problem["loc"] if not (isinstance(part, str) and _NO_KEY.match(part))]
    path = brief(".".join(str(part) for part in location)) or "(the whole file)"
    kind, context, value = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind == "extra_forbidden":
        section = _section(model, location[:-1])
        if str(location[-1]) in section.gone:
            return path, f"no longer a setting: {section.gone[str(location[-1])]}", ""
        allowed = list(section.model_fields)
        hint = did_you_mean(str(location[-1]), allowed) or _elsewhere(model, str(location[-1]))
        return path, f"no such setting{hint}; allowed here: {', '.join(allowed)}", ""
    if kind == "missing":
        return path, "missing", ""
    if kind in ("model_type", "model_attributes_type"):
        names = ", ".join(_section(model, location).model_fields)
        return path, f"must be a section with the settings {names}", f" (found {shown(value)})"
    hint = ""
    if kind == "literal_error" and isinstance(value, str):
        hint = did_you_mean(value, re.findall(r"'([^']*)'", context["expected"]))
    numbers = {key: f"{limit:g}" if isinstance(limit, float) else limit for key, limit in context.items()}
    message = _SENTENCES[kind].format(**numbers) if kind in _SENTENCES else problem["msg"]
    found = "" if isinstance(value, dict) else f" (found {shown(value)})"
    return path, printable(message.removeprefix("Value error, ")), found + hint


_NO_KEY = re.compile(r"function-|constrained-|literal\[|(int|float|str|bool)$")


def _section(model: type[Settings], location: Sequence[Any]) -> type[Settings]:
    """The settings model at a place in `model`, or the last one on the way there."""
    current = model
    for part in location:
        field = current.model_fields.get(part) if isinstance(part, str) else None
        nested = _model_in(getattr(field, "annotation", None)) if field else current
        if nested is None:
            break
        current = nested
    return current


def without_gone(model: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` that an older version wrote, without the settings that are gone from its sections since."""
    found = {}
    for name, value in values.items():
        field = model.model_fields.get(name)
        section = _model_in(field.annotation) if field else None
        if name not in model.gone:
            found[name] = without_gone(section, value) if section and isinstance(value, dict) else value
    return found


def _model_in(annotation: Any) -> type[Settings] | None:
    """The settings model in a field's type: `Model`, `Model | None`, `list[Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _elsewhere(model: type[Settings], name: str) -> str:
    """` (it is in section x)` where a setting of this name is in another section, and in one only."""
    sections = {key: _model_in(field.annotation) for key, field in model.model_fields.items()}
    places = [key for key, nested in sections.items() if nested and name in nested.model_fields]
    return f" (did you mean {places[0]}.{brief(name)}?)" if len(places) == 1 else ""


def to_yaml(settings: Settings) -> str:
    """The settings with every default written out, as YAML in the order of the models."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
