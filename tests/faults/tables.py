"""What a fault run found, as tables on the screen."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table as Screen

from faults.kills import KINDS
from faults.results import Record, Results
from faults.rounds import REPEATED, UNDISTURBED
from faults.work import COMPUTING


def show(results: Results) -> None:
    console = Console(width=None if Console().is_terminal else 140)
    for table in (_kills(results), _tables(results), _work(results), _exits(results)):
        console.print(table)


def _kills(results: Results) -> Screen:
    counts = Counter((record["kind"], record["stage"]) for record in results.of("kill"))
    table = Screen("kind", *KINDS, "all", title="Kills by kind and stage")
    for kind in dict.fromkeys(kind for kinds in KINDS.values() for kind in kinds):
        cells = [str(counts[kind, stage]) if kind in kinds else "" for stage, kinds in KINDS.items()]
        table.add_row(kind, *cells, str(sum(counts[kind, stage] for stage in KINDS)))
    totals = [sum(count for (_, at), count in counts.items() if at == stage) for stage in KINDS]
    table.add_row("all", *map(str, totals), str(sum(totals)), style="bold")
    return table


def _tables(results: Results) -> Screen:
    table = Screen(
        "table",
        "comparisons",
        "rows",
        "lost",
        "doubled",
        "differing",
        "of which at most",
        "between undisturbed",
        title="Tables against the undisturbed run",
    )
    compared = results.of("compare")
    for name in dict.fromkeys(record["table"] for record in compared):
        rows = [record for record in compared if record["table"] == name and record["round"] != REPEATED]
        usual = [record for record in compared if record["table"] == name and record["round"] == REPEATED]
        differing = sum(row["differing"] for row in rows)
        table.add_row(
            name,
            str(len(rows)),
            str(sum(row["rows"] for row in rows)),
            _alarm(sum(row["lost"] for row in rows)),
            _alarm(sum(row["doubled"] for row in rows)),
            _alarm(differing) if any(row["promised"] for row in rows) else str(differing),
            f"{max((row['largest_difference'] for row in rows), default=0.0):.3g}",
            "; ".join(f"{row['differing']}, at most {row['largest_difference']:.3g}" for row in usual),
        )
    policies = results.of("policy")
    apart = [record["relative_difference"] for record in policies if record["round"] != REPEATED]
    usually = [record["relative_difference"] for record in policies if record["round"] == REPEATED]
    table.caption = (
        f"trained weights: |difference| / |weights| at most {max(apart, default=0.0):.3g}, between two "
        f"undisturbed runs {max(usually, default=0.0):.3g}"
    )
    return table


def _work(results: Results) -> Screen:
    table = Screen(
        "stage",
        "visits",
        "kills",
        "batches needed",
        "done again",
        "actors killed",
        "per actor",
        "most in one visit",
        "rows a batch",
        title="Work done more than once, at most",
    )
    for stage, (*_, rows) in COMPUTING.items():
        [needed] = [record["batches"] for record in results.of("work", round=UNDISTURBED, stage=stage)][-1:] or [0]
        visits = [record for record in results.of("work", stage=stage, whole=True) if record["kills"]]
        again = [visit["batches"] - needed for visit in visits]
        kills = sum(len(visit["kills"]) for visit in visits)
        rounds = {visit["round"] for visit in visits}
        hit = [record for record in results.of("kill", stage=stage) if record["round"] in rounds]
        actors = sum(record["actors"] for record in hit)
        most = max(again, default=0)
        whose = ", ".join(visits[again.index(most)]["kills"]) if visits else ""
        table.add_row(
            stage,
            str(len(visits)),
            str(kills),
            str(needed),
            str(sum(again)),
            str(actors),
            f"{sum(again) / actors:.2f}" if actors else "",
            f"{most} ({whose})" if visits else "",
            str(rows),
        )
    trained = results.of("kill", stage="train")
    if trained:
        steps = [record["steps_lost_at_most"] for record in trained]
        ranks = sum(record["actors"] for record in trained)
        most = f"{max(steps)} (one kill)"
        table.add_row("train (steps)", "", str(len(steps)), "", str(sum(steps)), str(ranks), "", most, "")
    return table


def _exits(results: Results) -> Screen:
    table = Screen(
        "round", "stage", "code", "after kills of", "last words", title="Ends that no kill of the driver explains"
    )
    unexpected: list[Record] = [*results.of("exit"), *results.of("hang")]
    for record in unexpected:
        words = next((line for line in reversed(record.get("lines", [])) if line.strip()), record["event"])
        kills = ", ".join(record.get("kills", []))
        table.add_row(record["round"], str(record["stage"]), str(record.get("code", "")), kills, words[:120])
    table.caption = f"{len(unexpected)} in all"
    return table


def _alarm(number: int) -> str:
    return f"[red]{number}[/red]" if number else "0"
