"""What the commands show on the screen, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from congrad_ray.config.printable import printable
from congrad_ray.config.recipe import Recipe
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError, without_keys
from congrad_ray.stages.evaluate.statistics import EVERY_LANGUAGE
from congrad_ray.stages.judge.unreadable import by_reason

if TYPE_CHECKING:
    from congrad_ray.deploy.doctor import Finding
    from congrad_ray.stages.base import Stage

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


def steps_of(recipe: Recipe) -> list[tuple[Stage, int | None]]:
    """The stages of a run in order, each with its iteration where it has one."""
    from congrad_ray.pipeline.order import FIRST, ITERATED, LAST

    steps: list[tuple[Stage, int | None]] = [(stage, None) for stage in FIRST]
    steps += [(stage, number) for number in range(recipe.iterations) for stage in ITERATED]
    return steps + [(stage, None) for stage in LAST]


def show_run(directory: RunDirectory, recipe: Recipe) -> None:
    """The stages of a run and how far each is, and what the evaluations found."""
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
        else:
            table.add_row(stage.name, label, "", "", "")
    show(table)
    for number in range(recipe.iterations):
        show_stage(directory, "judge", number)
        show_stage(directory, "evaluate", number)


def show_stage(directory: RunDirectory, name: str, iteration: int) -> None:
    """The result of a stage that a person wants to see at once."""
    if name == "select":
        show_selection(directory.stage("selection", iteration).read_json("summary.json"))
    manifest = directory.stage("judgements", iteration).manifest() if name == "judge" else None
    if manifest and "judgements" in manifest.counters:
        show_judgements(manifest.counters)
    if name == "evaluate":
        summary = directory.stage("evaluation", iteration).read_json("summary.json")
        if summary:
            show_evaluation(summary)


def show_selection(summary: dict[str, Any]) -> None:
    """What was kept by language, and the languages' cosines; `summary` is the selection's summary.json."""
    table = _table(
        "selection",
        ("language", "pairs", "kept", "cosine", "conflicting", "language's cosine"),
        caption="cosine: mean of the pairs with the direction; language's cosine: of its gradient with it",
    )
    for language, row in summary["per_language"].items():
        table.add_row(
            language,
            f"{row['pairs']:,}",
            f"{row['kept']:,}",
            f"{row['mean_cosine']:.3f}",
            f"{row['conflicting']:.1%}",
            f"{row['cosine_with_direction']:.2f}" if row["in_direction"] else "not in it",
        )
    show(table)
    for when in ("before", "after"):
        _show_matrix(f"cosines between languages {when} surgery", summary["languages"], summary[f"cosine_{when}"])


def _show_matrix(title: str, languages: Sequence[str], cosines: Sequence[Sequence[float]]) -> None:
    """A symmetric matrix, in parts of as many columns as the screen has room for."""
    room = max(1, (console.width - max(map(len, languages)) - 4) // max(7, 2 + max(map(len, languages))))
    for start in range(0, len(languages), room):
        table = _table(title if start == 0 else "", ("language", *languages[start : start + room]))
        for language, row in zip(languages, cosines, strict=True):
            table.add_row(language, *(f"{value:.2f}" for value in row[start : start + room]))
        show(table)


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


def show_judgements(counters: dict[str, Any]) -> None:
    """Judgements asked, readable and unreadable by language; `counters` are of the judge stage's manifest."""
    masses = counters.get("mean_mass") is not None
    heads = ("language", "asked", "readable", "unreadable", "score")
    table = _table(
        "judgements",
        (*heads, "mass") if masses else heads,
        caption="score: the mean; mass: mean probability of the score tokens" if masses else "score: the mean",
    )
    for language, row in counters["judgements"].items():
        unreadable = sum(row["unreadable"].values())
        cells = [language, f"{row['asked']:,}", f"{row['readable']:,}", f"{unreadable:,}"]
        cells.append("" if row["mean_score"] is None else f"{row['mean_score']:.2f}")
        if masses:
            cells.append("" if row["mean_mass"] is None else f"{row['mean_mass']:.2g}")
        table.add_row(*cells)
    show(table)
    _show_unreadable({language: row["unreadable"] for language, row in counters["judgements"].items()})


def _show_unreadable(counts: Mapping[str, Any]) -> None:
    """What could not be read, by language and reason; older runs know only how many."""
    found = [
        f"{language} {by_reason(row)}" for language, row in counts.items() if row and not isinstance(row, int)
    ]
    if found:
        console.print(f"unreadable by reason: {'; '.join(found)}", highlight=False)


def show_evaluation(summary: dict[str, Any]) -> None:
    """Changes of true scores and win rates by language; `summary` is the evaluation's summary.json."""
    model, baseline = summary["model"], summary["baseline"]
    if summary["score_changes"]:
        heads = ("language", "", "decoding", "prompts", baseline, model, "change", "95% interval")
        table = _table(f"true score of {model} against {baseline}", heads, texts=3)
        for row in summary["score_changes"]:
            table.add_row(
                *_language_cells(row),
                row["decoding"],
                str(row["count"]),
                f"{row['before']:.3f}",
                f"{row['after']:.3f}",
                f"{row['change']:+.3f}",
                f"{row['low']:+.3f}..{row['high']:+.3f}",
            )
        show(table)
    if summary["win_rates"]:
        heads = ("language", "", "prompts", "win rate", "95% interval", "asked", "readable", "unreadable")
        table = _table(f"{model} against {baseline}, judged in both orders", heads, texts=2)
        for row in summary["win_rates"]:
            known = row["win_rate"] is not None
            table.add_row(
                *_language_cells(row),
                str(row["prompts"]),
                f"{row['win_rate']:.1%}" if known else "too few",
                f"{row['low']:.1%}..{row['high']:.1%}" if known else "",
                *_readings(row),
            )
        show(table)
        _show_unreadable({_language_cells(row)[0]: row["unreadable"] for row in summary["win_rates"]})
    for warning in summary.get("warnings", []):
        console.print(f"[bold yellow]warning:[/bold yellow] {plain(warning)}")


def _readings(row: dict[str, Any]) -> tuple[str, str, str]:
    """How many comparisons were asked for, could be read and could not; older runs know the last alone."""
    unreadable = row["unreadable"]
    if isinstance(unreadable, int):
        return "", "", str(unreadable)
    return str(row["asked"]), str(row["readable"]), str(sum(unreadable.values()))


def _language_cells(row: dict[str, Any]) -> tuple[str, str]:
    """The first two cells of an evaluation's row: which language, and whether it is trained on."""
    language = "all" if row["language"] == EVERY_LANGUAGE else row["language"]
    return language, "seen" if row["seen"] else "unseen"


def show_findings(findings: Sequence[Finding]) -> None:
    """The doctor's report: what is there, and the command that fixes what is not."""
    table = Table("what", "found", "to fix it", **TABLES)
    for finding in findings:
        table.add_row(finding.what, plain(finding.found), plain(finding.fix) or "[green]ok[/green]")
    show(table)
