"""What a stage shows of its result: tables on the screen, and its step in the report's funnel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from congrad_ray.config.recipe import Recipe
from congrad_ray.rundir.directory import Folder


@dataclass(frozen=True)
class Figures:
    """A table for a person, its cells as text: `texts` columns of text, then columns of numbers.

    `notes` follow the table, then `warnings`. One that is `brief` is in `congrad status` too. One that may `fold`
    is shown in parts of as many columns as there is room for.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    caption: str = ""
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    brief: bool = True
    fold: bool = False


@dataclass(frozen=True)
class Step:
    """A column of the report's funnel.

    `counts(folder)`: rows by language, None where there are none yet. Its share is of the step named `of`, whose
    rows could each have given `each(recipe)` of these.
    """

    name: str
    title: str
    small_print: str
    counts: Callable[[Folder], Counter[str] | None]
    of: str = ""
    each: Callable[[Recipe], int] = lambda recipe: 1


def rows_by_language(folder: Folder) -> Counter[str] | None:
    """The rows of a stage's table by language."""
    if not folder.files(".parquet"):
        return None
    return Counter(folder.read_table(["language"])["language"].to_pylist())
