"""What the commands show on the screen, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from congrad_ray.config.printable import printable, without_keys
from congrad_ray.config.recipe import Recipe
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError
from congrad_ray.stages.evaluate.statistics import EVERY_LANGUAGE

if TYPE_CHECKING:
    from congrad_ray.deploy.doctor import Finding
    from congrad_ray.stages.base import Stage
    from congrad_ray.stages.view import Figures

console = Console()

# Two spaces between columns, no frame: most tables fit 80 columns.
TABLES: dict[str, Any] = {
    "box": box.SIMPLE_HEAD,
    "padding": (0, 1, 0, 0),
    "pad_edge": False,
    "show_edge": False,
}


def _table(title: str, columns: Sequence[str], texts: int = 1, caption: str = "") -> Table:
    """A table whose rows stay on one line each; after `texts` columns of text come numbers, to the right."""
    table = Table(title=title or None, caption=caption or None, **TABLES)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < texts else "right", no_wrap=True, overflow="ellipsis")
    return table


def show(table: Table) -> None:
    """Prints a table and an empty line; rich would fold title and caption to the table's own width."""
    title, caption = table.title, table.caption
    table.title = table.caption = None
    if title:
        console.print(f"[bold]{title}[/bold]", highlight=False)
    console.print(table)
    if caption:
        console.print(f"[dim]{caption}[/dim]", highlight=False)
    console.print()


def plain(text: str) -> str:
    """Text for rich, which would take [...] in it for markup."""
    return escape(printable(text, lines=True))


def show_run(directory: RunDirectory, recipe: Recipe) -> None:
    """The stages of a run and how far each is, and what the evaluations found."""
    from congrad_ray.pipeline.order import steps_of
    from congrad_ray.runtime.progress import duration

    table = _table(plain(directory.path), ("stage", "iteration", "state", "rows", "time"), texts=3)
    for stage, number in steps_of(recipe):
        folder = directory.stage(stage.folder, number)
        manifest = folder.manifest()
        label = "" if number is None else str(number)
        if manifest:
            time = duration(manifest.seconds)
            table.add_row(stage.name, label, "[green]done[/green]", f"{manifest.rows:,}", time)
        elif folder.begun():
            table.add_row(stage.name, label, "[yellow]begun[/yellow]", f"{folder.rows_so_far():,}", "")
        elif (rows := stage.adopted(recipe, directory)) is not None:  # an older version's, in another folder
            table.add_row(stage.name, label, "[green]done[/green]", f"{len(rows):,}", "")
        else:
            table.add_row(stage.name, label, "", "", "")
    show(table)
    for stage, number in steps_of(recipe):
        for figures in stage.figures(directory.stage(stage.folder, number)):
            if figures.brief:
                show_figures(figures)


def show_stage(directory: RunDirectory, stage: Stage, iteration: int) -> None:
    """The result of a stage that a person wants to see at once."""
    for figures in stage.figures(directory.stage(stage.folder, iteration if stage.each_iteration else None)):
        show_figures(figures)


def show_figures(figures: Figures) -> None:
    """A stage's table with its notes and warnings; a wide one that may fold in parts."""
    columns = figures.columns
    room = len(columns)
    if figures.fold:
        width = max(map(len, columns))
        room = max(1, (console.width - width - 4) // max(7, 2 + width))
    for start in range(1, len(columns), room) if columns else ():
        part = slice(start, start + room)
        table = _table(
            plain(figures.title) if start == 1 else "",
            [plain(column) for column in (*columns[:1], *columns[part])],
            figures.texts,
            plain(figures.caption),
        )
        for row in figures.rows:
            table.add_row(*map(plain, (*row[:1], *row[part])))
        show(table)
    for note in figures.notes:
        console.print(plain(note), highlight=False)
    for warning in figures.warnings:
        console.print(f"[bold yellow]warning:[/bold yellow] {plain(warning)}")


def show_overlaps(first: str, second: str) -> None:
    """How far two selections (folders) agree, by language. Raises RunDirectoryError where they share no pair."""
    found = overlap_values(first, second)
    table = _table(
        plain(f"1: {without_keys(first)}\n2: {without_keys(second)}"),
        ("language", "pairs", "kept 1", "kept 2", "both", "chance", "of either", "rank corr."),
    )
    for row in found["languages"]:
        table.add_row(
            row["language"],
            *(f"{row[name]:,}" for name in ("pairs", "kept_first", "kept_second", "kept_both")),
            f"{row['by_chance']:.0f}",
            f"{row['share']:.1%}",
            "" if row["rank_correlation"] is None else f"{row['rank_correlation']:.3f}",
        )
    show(table)
    left = found["only_in"]
    if any(left):
        console.print(f"only in 1: {left[0]} pairs, only in 2: {left[1]} pairs")


def overlap_values(first: str, second: str) -> dict[str, Any]:
    """What `show_overlaps` shows, as --json gives it. Raises RunDirectoryError where they share no pair."""
    from congrad_ray.stages.select.compare import overlaps
    from congrad_ray.stages.select.stage import read_scores

    tables = [read_scores(RunDirectory.open(folder)) for folder in (first, second)]
    both = tables[0].join(tables[1], "pair_id", join_type="inner", right_suffix="_second").sort_by("pair_id")
    if not len(both):
        raise RunDirectoryError(f"{without_keys(first)} and {without_keys(second)} have no pair in common")
    columns = [both[name].to_numpy() for name in ("kept", "kept_second", "score", "score_second")]
    rows = overlaps(both["language"].to_pylist(), (columns[0], columns[1]), (columns[2], columns[3]))
    languages = [{**asdict(row), "by_chance": row.by_chance, "share": row.share} for row in rows]
    for values in languages:
        values["language"] = "all" if values["language"] == EVERY_LANGUAGE else values["language"]
    names = [without_keys(first), without_keys(second)]
    return {"selections": names, "languages": languages, "only_in": [len(table) - len(both) for table in tables]}


def show_findings(findings: Sequence[Finding]) -> None:
    """The doctor's report: what is there, and the command that fixes what is not."""
    table = Table("what", "found", "to fix it", **TABLES)
    for finding in findings:
        table.add_row(finding.what, plain(finding.found), plain(finding.fix) or "[green]ok[/green]")
    show(table)
