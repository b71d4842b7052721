"""Writes docs/reference/ from the code: python docs/generate.py. A test checks that it is up to date."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pyarrow as pa
import typer
from pydantic import BaseModel

from congrad_ray.cli.main import app
from congrad_ray.cli.options import EXIT_CODES
from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import validate
from congrad_ray.data.tables import QUARANTINE
from congrad_ray.pipeline.order import STAGES
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.runtime.metrics import ABOUT, COUNTERS, GAUGES

FOLDER = Path(__file__).resolve().parent / "reference"
_NOTE = "<!-- Written by docs/generate.py: change the code, not this page. -->"


def pages() -> dict[str, str]:
    """The text of every page, by file name."""
    return {
        "recipe.md": _settings("Recipe", Recipe, "What a run does. `congrad init` writes one with every setting."),
        "profile.md": _settings("Profile", Profile, "Where a run is done: a YAML, or the name of a built-in one."),
        "tables.md": _tables(),
        "commands.md": _commands(),
        "assumptions.md": _settings(
            "Assumptions",
            Assumptions,
            "What nobody can know before a run, for `congrad plan --assume NAME=VALUE`. None of these defaults "
            "was measured by this project. With `--run DIR` lengths come from the finished stages of that run.",
        ),
        "metrics.md": _metrics(),
        "exit-codes.md": _exit_codes(),
    }


def _page(title: str, *parts: str) -> str:
    return "\n\n".join((f"# {title}", _NOTE, *parts)) + "\n"


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines)


def _settings(title: str, model: type[BaseModel], summary: str) -> str:
    sections = [
        (name, nested) for name, field in model.model_fields.items() for nested in _models(field.annotation)
    ]
    nested_names = {name for name, _ in sections}
    plain = [row for name, row in _rows(model) if name not in nested_names]
    parts = [summary, _table(("setting", "type", "default", "meaning"), plain)]
    parts += [part for name, section in sections for part in _section(name, section)]
    return _page(title, *parts)


def _section(path: str, model: type[BaseModel]) -> Iterator[str]:
    """A heading and a table for the settings of a section, and the same for the sections in it."""
    yield f"## {path}"
    if model.__doc__:
        yield " ".join(model.__doc__.split())
    yield _table(("setting", "type", "default", "meaning"), [row for _, row in _rows(model)])
    for name, field in model.model_fields.items():
        for nested in _models(field.annotation):
            yield from _section(f"{path}.{name}", nested)


def _rows(model: type[BaseModel]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else _value(field.get_default(call_default_factory=True))
        limits = ", ".join(text for item in field.metadata if (text := _limit(item)))
        kind = _kind(field.annotation) + (f", {limits}" if limits else "")
        yield name, (f"`{name}`", kind, default, field.description or "")


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a setting is or may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _kind(annotation: Any) -> str:
    """A type as YAML users know it: `text`, `number`, `list of text`, `one of a, b`, ..."""
    plain = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    if annotation in plain:
        return plain[annotation]
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "section"
    name = getattr(origin, "__name__", str(origin))
    if origin is Literal:
        return "one of " + ", ".join(f"`{choice}`" for choice in arguments)
    if name in ("Union", "UnionType"):
        return " or ".join(_kind(argument) for argument in arguments)
    if name == "Annotated":
        limits = ", ".join(text for item in arguments[1:] if (text := _limit(item)))
        return _kind(arguments[0]) + (f", {limits}" if limits else "")
    if origin in (list, tuple):
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"mapping of {_kind(arguments[0])} to {_kind(arguments[1])}"
    return getattr(annotation, "__name__", str(annotation))


def _limit(item: Any) -> str:
    """`> 0` for a pydantic constraint; empty for what is none."""
    signs = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
    found = [f"{sign} {value:g}" for name, sign in signs if (value := getattr(item, name, None)) is not None]
    found += [text for inner in getattr(item, "metadata", ()) if (text := _limit(inner))]
    return ", ".join(found)


def _value(value: Any) -> str:
    if isinstance(value, BaseModel):
        return ""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value not in ("", [], {}) else "empty"


def _tables() -> str:
    recipe = validate(
        Recipe, {"name": "reference", "prompts": {"languages": ["en", "de"]}}, "the reference's recipe"
    )
    parts = [
        "Every stage writes Parquet with a fixed schema. A column's meaning is also in its metadata, under "
        "`doc`. Rows are joined by ids, never by position. Widths are those of a recipe's defaults.",
        *_columns(
            "quarantine", QUARANTINE, "Rows of any stage that could not be used, in its folder `quarantine/`."
        ),
    ]
    for stage in STAGES.values():
        if stage.schema is None:
            continue
        schema = stage.schema(recipe)
        parts += _columns(stage.folder, schema, f"{stage.summary}: `congrad {stage.name}`.")
        place = f"congrad_ray.stages.{stage.name}.schema"
        if importlib.util.find_spec(place) is None:  # its table is another stage's
            continue
        module = importlib.import_module(place)
        for name, other in vars(module).items():
            if isinstance(other, pa.Schema) and other is not schema and not other.equals(schema):
                parts += _columns(f"{stage.folder}: {name.lower().replace('_', ' ')}", other, "")
    return _page("Tables", *parts)


def _columns(title: str, schema: pa.Schema, summary: str) -> list[str]:
    rows = [
        (
            f"`{field.name}`",
            f"`{re.sub(r'element: ', '', str(field.type))}`" + (" or null" if field.nullable else ""),
            (field.metadata or {}).get(b"doc", b"").decode(),
        )
        for field in schema
    ]
    return [f"## {title}", *([summary] if summary else []), _table(("column", "type", "meaning"), rows)]


def _commands() -> str:
    group: Any = typer.main.get_command(app)
    parts = [_plain(group.help), *_parameters(group)]
    for name, command in group.commands.items():
        usage = " ".join(
            ["congrad", name, *(_usage(p) for p in command.params if p.param_type_name == "argument")]
        )
        parts += [
            f"## congrad {name}",
            f"```\n{usage} [OPTIONS]\n```",
            _plain(command.help),
            *_parameters(command),
        ]
        if command.epilog:
            lines = [line.strip() for line in _plain(command.epilog).splitlines()]
            examples = "\n".join(line.removeprefix("$ ") for line in lines if line.startswith("$ "))
            parts.append(f"```\n{examples}\n```")
    return _page("Commands", *parts)


def _usage(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _parameters(command: Any) -> list[str]:
    rows = []
    for parameter in command.params:
        if parameter.name in ("help", "install_completion", "show_completion"):
            continue
        annotation = parameter.type_descriptor.annotation
        choices = get_args(annotation) if get_origin(annotation) is Literal else ()
        if parameter.param_type_name == "argument":
            shown = f"`{_usage(parameter)}`"
        else:
            flag = annotation is bool or parameter.count
            value = f" {parameter.metavar}" if parameter.metavar else "" if flag else " VALUE"
            shown = ", ".join(f"`{option}{value}`" for option in parameter.opts)
        text = parameter.help or ""
        if choices:
            text += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
        default = parameter.default
        flag_off = default is None or default is False or default in ("", [], ())
        given = not flag_off and not callable(default) and "UNSET" not in repr(default)
        if parameter.required and parameter.param_type_name != "argument":
            text += " Required."
        rows.append((shown, text + (f" Default: `{default}`." if given else "")))
    return [_table(("option", "meaning"), rows)] if rows else []


def _plain(text: str | None) -> str:
    """Text without the markup of rich and the marks of click."""
    return re.sub(r"\[/?(bold|dim|green|yellow|red)\]", "", inspect.cleandoc(text or "")).replace("\b", "").strip()


def _metrics() -> str:
    heads = ("metric", "labels", "meaning")
    return _page(
        "Metrics",
        "What a run reports to Prometheus, through Ray's metrics. Each also has the labels "
        f"{', '.join(f'`{label}`' for label in ABOUT)}.",
        "## Counters",
        _table(heads, [_metric(f"ray_{name}_total", *about) for name, about in COUNTERS.items()]),
        "## Gauges",
        _table(heads, [_metric(f"ray_{name}", *about) for name, about in GAUGES.items()]),
    )


def _metric(name: str, meaning: str, labels: tuple[str, ...]) -> tuple[str, ...]:
    return f"`{name}`", ", ".join(f"`{label}`" for label in labels), meaning


def _exit_codes() -> str:
    rows = [(f"`{code}`", meaning) for code, meaning in EXIT_CODES.items()]
    return _page(
        "Exit codes",
        "The same for every command; `congrad submit` ends with the job's own.",
        _table(("code", "meaning"), rows),
    )


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
