"""What the commands show on the screen, as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from congrad_ray.config.printable import printable
from congrad_ray.config.recipe import Recipe
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError, without_keys
from congrad_ray.stages.base import Stage
from congrad_ray.stages.evaluate.statistics import EVERY_LANGUAGE
from congrad_ray.stages.judge.unreadable import by_reason

console = Console()


def plain(text: str) -> str:
    """Text for rich, which would take [...] in it for markup."""
    return escape(printable(text, lines=True))


def show_run(directory: RunDirectory, recipe: Recipe) -> None:
    """The stages of a run and how far each is, and what the evaluations found."""
    from congrad_ray.pipeline.order import FIRST, ITERATED, LAST

    table = Table("stage", "iteration", "state", "rows", "seconds", title=plain(directory.path))
    steps: list[tuple[Stage, int | None]] = [(stage, None) for stage in FIRST]
    steps += [(stage, number) for number in range(recipe.iterations) for stage in ITERATED]
    steps += [(stage, None) for stage in LAST]
    for stage, number in steps:
        folder = directory.stage(stage.folder, number)
        manifest = folder.manifest()
        label = "" if number is None else str(number)
        if manifest:
            table.add_row(
                stage.name, label, "[green]done[/green]", f"{manifest.rows:,}", f"{manifest.seconds:.0f}"
            )
        elif folder.exists("_started.json"):
            table.add_row(stage.name, label, "[yellow]begun[/yellow]", f"{folder.rows_so_far():,}", "")
        else:
            table.add_row(stage.name, label, "", "", "")
    console.print(table)
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
    table = Table("language", "pairs", "kept", "mean cosine", "conflicting", "with direction", title="selection")
    for language, row in summary["per_language"].items():
        table.add_row(
            language,
            str(row["pairs"]),
            str(row["kept"]),
            f"{row['mean_cosine']:.3f}",
            f"{row['conflicting']:.1%}",
            f"{row['cosine_with_direction']:.2f}" if row["in_direction"] else "not in it",
        )
    console.print(table)
    for when in ("before", "after"):
        matrix = Table("", *summary["languages"], title=f"cosines between languages {when} surgery")
        for language, row in zip(summary["languages"], summary[f"cosine_{when}"], strict=True):
            matrix.add_row(language, *(f"{value:.2f}" for value in row))
        console.print(matrix)


def show_overlaps(first: str, second: str) -> None:
    """How far two selections (folders) agree, by language. Raises RunDirectoryError where they share no pair."""
    from congrad_ray.stages.select.compare import overlaps
    from congrad_ray.stages.select.stage import read_scores

    tables = [read_scores(RunDirectory.open(folder)) for folder in (first, second)]
    both = tables[0].join(tables[1], "pair_id", join_type="inner", right_suffix="_second").sort_by("pair_id")
    left = [len(table) - len(both) for table in tables]
    if not len(both):
        raise RunDirectoryError(f"{without_keys(first)} and {without_keys(second)} have no pair in common")
    columns = [both[name].to_numpy() for name in ("kept", "kept_second", "score", "score_second")]
    table = Table("language", "pairs", "kept by 1", "kept by 2", "by both", "by chance", "of either", "rank corr.")
    table.title = plain(f"1: {without_keys(first)}\n2: {without_keys(second)}")
    for row in overlaps(both["language"].to_pylist(), (columns[0], columns[1]), (columns[2], columns[3])):
        table.add_row(
            "all" if row.language == EVERY_LANGUAGE else row.language,
            *(str(number) for number in (row.pairs, row.kept_first, row.kept_second, row.kept_both)),
            f"{row.by_chance:.0f}",
            f"{row.share:.1%}",
            "" if row.rank_correlation is None else f"{row.rank_correlation:.3f}",
        )
    console.print(table)
    if any(left):
        console.print(f"only in 1: {left[0]} pairs, only in 2: {left[1]} pairs")


def show_judgements(counters: dict[str, Any]) -> None:
    """Judgements asked, readable and unreadable by language; `counters` are of the judge stage's manifest."""
    masses = counters.get("mean_mass") is not None
    table = Table("language", "asked", "readable", "unreadable", "mean score", title="judgements")
    if masses:
        table.add_column("mean mass")
    for language, row in counters["judgements"].items():
        cells = [language, str(row["asked"]), str(row["readable"]), by_reason(row["unreadable"])]
        cells.append("" if row["mean_score"] is None else f"{row['mean_score']:.2f}")
        if masses:
            cells.append("" if row["mean_mass"] is None else f"{row['mean_mass']:.2g}")
        table.add_row(*cells)
    console.print(table)


def show_evaluation(summary: dict[str, Any]) -> None:
    """Changes of true scores and win rates by language; `summary` is the evaluation's summary.json."""
    model, baseline = summary["model"], summary["baseline"]
    if summary["score_changes"]:
        table = Table("language", "", "decoding", "prompts", baseline, model, "change", "95%")
        table.title = f"true score of {model} against {baseline}"
        for row in summary["score_changes"]:
            table.add_row(
                *_language_cells(row),
                row["decoding"],
                str(row["count"]),
                f"{row['before']:.3f}",
                f"{row['after']:.3f}",
                f"{row['change']:+.3f}",
                f"{row['low']:+.3f} .. {row['high']:+.3f}",
            )
        console.print(table)
    if summary["win_rates"]:
        table = Table("language", "", "prompts", "win rate", "95%", "asked", "readable", "unreadable")
        table.title = f"{model} against {baseline}, judged in both orders"
        for row in summary["win_rates"]:
            known = row["win_rate"] is not None
            table.add_row(
                *_language_cells(row),
                str(row["prompts"]),
                f"{row['win_rate']:.1%}" if known else "too few",
                f"{row['low']:.1%} .. {row['high']:.1%}" if known else "",
                *_readings(row),
            )
        console.print(table)
    for warning in summary.get("warnings", []):
        console.print(f"[bold yellow]warning:[/bold yellow] {plain(warning)}")


def _readings(row: dict[str, Any]) -> tuple[str, str, str]:
    """How many comparisons were asked for, could be read and could not; older runs know the last alone."""
    unreadable = row["unreadable"]
    if isinstance(unreadable, int):
        return "", "", str(unreadable)
    return str(row["asked"]), str(row["readable"]), by_reason(unreadable)


def _language_cells(row: dict[str, Any]) -> tuple[str, str]:
    """The first two cells of an evaluation's row: which language, and whether it is trained on."""
    language = "all" if row["language"] == EVERY_LANGUAGE else row["language"]
    return language, "seen" if row["seen"] else "unseen"
