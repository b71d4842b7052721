"""README and docs: links lead somewhere, commands and settings exist, and the README stays short."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from congrad_ray.cli.main import app
from congrad_ray.config.profile import Profile, load_profile
from congrad_ray.config.recipe import Recipe, Select
from congrad_ray.config.settings import apply_overrides, validate
from congrad_ray.pipeline.order import STAGES
from congrad_ray.planning.assumptions import load_assumptions

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GROUP: Any = typer.main.get_command(app)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
STARTER = {"name": "docs", "prompts": {"languages": ["en"]}, "sketch": {"groups": 2}}


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings that GitHub and mkdocs make alike."""
    github: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading).lower()).strip()
        anchor = plain.replace(" ", "-")
        number = github[anchor] = github.get(anchor, -1) + 1
        if number == 0 and anchor == re.sub(r"[-\s]+", "-", plain):
            found.add(anchor)
    return found


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    text = prose(page)
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if link.startswith(("http://", "https://")):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def lines(page: Path) -> Iterator[str]:
    """Every line of code of a page: of its blocks, and inline."""
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language not in ("python", "yaml", "json"):
            yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `congrad` command of a page, and of the scripts in jobs/ that are the same."""
    for line in lines(page):
        for part in re.split(r"&&|\||--\s+(?=python)", line.strip().removeprefix("$ ")):
            job = re.match(r"\s*python jobs/run_(\w+)\.py(.*)", part)
            if job and job[1] not in ("study", "real_study"):
                assert (ROOT / "jobs" / f"run_{job[1]}.py").exists(), part
                name = "run" if job[1] == "all" else job[1]
                yield [name, *shlex.split(job[2].replace("...", ""), comments=True)]
            found = re.match(r"\s*(?:\w+=\S+ )*congrad (?=[a-z-])(.*)", part)
            if found:
                yield shlex.split(found[1].replace("...", ""), comments=True)


def values_of(words: list[str], option: str) -> list[str]:
    return [value for word, value in itertools.pairwise(words) if word == option]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_and_their_options_exist(page: Path) -> None:
    for words in commands(page):
        command = GROUP
        if not words[0].startswith("-"):
            assert words[0] in GROUP.commands, f"congrad {words[0]}"
            command = GROUP.commands[words[0]]
        parameters = [
            *command.params,
            *(GROUP.commands["filter"].params if words[:2] == ["submit", "filter"] else []),
        ]
        options = {"--help", "-h"} | {option for parameter in parameters for option in parameter.opts}
        unknown = [word for word in words if re.match("--?[a-z]", word) and word.partition("=")[0] not in options]
        assert not unknown, f"congrad {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_settings_profiles_and_stages_of_commands_exist(page: Path) -> None:
    for words in commands(page):
        settings = [value for value in values_of(words, "--set") if value != "a.b=c"]
        validate(Recipe, apply_overrides(STARTER, settings), " ".join(words))
        chosen = [value for value in values_of(words, "--select") if value != "a=b"]
        validate(Select, apply_overrides({}, chosen), " ".join(words))
        assumed = [value for value in values_of(words, "--assume") if value not in ("a=b", "NAME=VALUE")]
        load_assumptions(assumed)
        for name in values_of(words, "--profile"):
            if name != "P" and not name.endswith(".yaml"):
                load_profile(name)
        stages = [*values_of(words, "--until"), *values_of(words, "--stage")]
        stages += words[1:2] if words[0] == "submit" else []
        for stage in stages:
            assert stage in (*STAGES, "run", "filter", "STAGE"), " ".join(words)


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a setting of this type holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def is_setting(path: list[str], model: type[BaseModel]) -> bool:
    for number, key in enumerate(path, 1):
        if key not in model.model_fields:
            return False
        inner = sections_in(model.model_fields[key].annotation)
        if not inner:
            return number == len(path)
        model = inner[0]
    return True


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_settings_named_in_the_text_exist(page: Path) -> None:
    sections = {*Recipe.model_fields, *Profile.model_fields}
    for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:: [^`]+)?`", prose(page)):
        path = name.split(".")
        if path[0] in sections and path[-1] not in ("json", "jsonl", "md", "parquet", "safetensors", "yaml"):
            assert is_setting(path, Recipe) or is_setting(path, Profile), name


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_targets_of_make_exist(page: Path) -> None:
    there = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in lines(page):
        found = re.match(r"make (?:\w+=\S+ )*([\w-]+)", line)
        assert not found or found[1] in there, line


def test_the_readme_can_be_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 220


def test_the_readme_names_every_folder() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "congrad_ray").glob("*/__init__.py")]
    folders += [Path(name) for name in ("jobs", "cluster", "docs", "tests")]
    assert [folder.as_posix() for folder in folders if f"| `{folder.as_posix()}/` |" not in text] == []


def test_the_site_has_every_page() -> None:
    listed = set(re.findall(r"^\s*- ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {path.relative_to(ROOT / "docs").as_posix() for path in PAGES[1:]}
