"""The report as one self-contained HTML file: no script, no font, no picture from anywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from congrad_ray.config.recipe import Recipe
from congrad_ray.stages.report import pictures
from congrad_ray.stages.report.facts import IterationFacts, RunFacts
from congrad_ray.stages.view import Step

_CURVES = (
    ("loss", "loss", False),
    ("rewards/accuracies", "rewards/accuracies", False),
    ("rewards/margins", "rewards/margins", True),
    ("rewards/chosen", "rewards/chosen", True),
    ("rewards/rejected", "rewards/rejected", True),
    ("grad_norm", "gradient norm before clipping", True),
)
_LONGEST_TEXT = 1200


def page_environment(folder: Path) -> Environment:
    """The templates of a folder, escaping whatever they are given, with the reports' common `style`."""
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["style"] = Markup((Path(__file__).parent / "report.css").read_text(encoding="utf-8"))
    return environment


def render(facts: RunFacts, steps: Sequence[Step], recipe: Recipe) -> str:
    """The page; `steps` are the funnel's. Texts of models and users are escaped by the template."""
    values = recipe.model_dump(mode="json")
    environment = page_environment(Path(__file__).parent)
    environment.filters.update(
        whole=_whole,
        percent=lambda value: f"{100 * value:.0f} %",
        signed=_signed,
        duration=duration,
        cut=_cut,
    )
    return environment.get_template("report.html.jinja").render(
        facts=facts,
        recipe=values,
        headline=headline(facts, values),
        funnels={iteration.number: _funnel(iteration, steps, recipe) for iteration in facts.iterations},
        curves={iteration.number: _curves(iteration) for iteration in facts.iterations},
        versions=_versions(facts),
        longest_stage=max((s.manifest.seconds for s in facts.stages if s.manifest), default=1.0) or 1.0,
        total_seconds=sum(s.manifest.seconds for s in facts.stages if s.manifest),
        pictures=pictures,
        verdict=_verdict,
    )


def headline(facts: RunFacts, recipe: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The run in a few numbers: (number, what it is, small print). Only what was computed is there."""
    unseen = len(recipe["prompts"]["unseen_languages"])
    small = f"{unseen} more only evaluated" if unseen else ""
    found = [(str(len(recipe["prompts"]["languages"])), "languages trained on", small)]
    if not facts.iterations:
        return found
    last = facts.iterations[-1]
    responses, pairs, sketched, kept = (_total(last, step) for step in ("responses", "pairs", "sketched", "kept"))
    if pairs:
        found.append((_whole(pairs), "preference pairs", f"from {_whole(responses)} responses"))
    if kept and sketched:
        found.append((_whole(kept), "pairs kept", f"{100 * kept / sketched:.0f} % of {_whole(sketched)}"))
    matrix = last.selection["cosine_before"] if last.selection else []
    between = [matrix[i][j] for i in range(len(matrix)) for j in range(i)]
    if between:
        small = f"lowest cosine {min(between):+.2f}".replace("-", "\N{MINUS SIGN}")
        found.append((f"{sum(v < 0 for v in between)} of {len(between)}", "pairs of languages in conflict", small))
    if last.metrics:
        first, end = last.metrics[0], last.metrics[-1]
        found.append((f"{end['loss']:.3f}", "final training loss", f"from {first['loss']:.3f}"))
    seen = [row for row in last.evaluation if row.seen and row.decoding == "greedy"]
    if seen and seen[-1].score_after is not None and seen[-1].score_before is not None:
        small = f"{seen[-1].language}; {seen[-1].score_before:.2f} before"
        found.append((f"{seen[-1].score_after:.2f}", "true score", small))
    if seen and seen[-1].win_rate is not None:
        small = f"against {seen[-1].baseline}; {seen[-1].language}"
        found.append((f"{100 * seen[-1].win_rate:.0f} %", "win rate", small))
    elif seen and seen[-1].asked:
        small = f"{seen[-1].readable} of {seen[-1].asked} comparisons could be read"
        found.append(("none", "win rate", small))
    return found


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def _whole(value: int) -> str:
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _total(iteration: IterationFacts, step: str) -> int:
    return sum(row.get(step, 0) for row in iteration.funnel.values())


def _funnel(iteration: IterationFacts, steps: Sequence[Step], recipe: Recipe) -> dict[str, Any]:
    """The table's steps and, per language and step, the count and its share of what it came from."""
    present = [step for step in steps if any(step.name in row for row in iteration.funnel.values())]
    total = {step.name: _total(iteration, step.name) for step in present}
    rows = []
    for language, counts in [*iteration.funnel.items(), ("all", total)]:
        cells = []
        for step in present:
            whole = counts.get(step.of or step.name, 0) * step.each(recipe)
            count = counts.get(step.name, 0)
            cells.append({"count": count, "share": min(1.0, count / whole) if whole else None})
        rows.append({"language": language, "cells": cells})
    return {"steps": present, "rows": rows if len(iteration.funnel) > 1 else rows[:-1]}


def _curves(iteration: IterationFacts) -> list[tuple[str, float, Markup]]:
    rows = iteration.metrics
    xs = [row["step"] for row in rows]
    return [
        (title, rows[-1][name], pictures.line_chart(xs, [row[name] for row in rows], title, at_zero))
        for name, title, at_zero in _CURVES
        if rows and all(name in row for row in rows)
    ]


def _versions(facts: RunFacts) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for stage in facts.stages:
        for package, version in (stage.manifest.versions if stage.manifest else {}).items():
            found.setdefault(package, set()).add(version)
    return {package: ", ".join(sorted(versions)) for package, versions in sorted(found.items())}


def _verdict(low: float, high: float, no_change: float) -> str:
    """The CSS class of a change: green or red only where its interval leaves out no change."""
    if low > no_change:
        return "up"
    return "down" if high < no_change else "soft"


def duration(seconds: float) -> str:
    """85 -> '1 min 25 s'."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " …"
