"""The report as one self-contained HTML file: no script, no font, no picture from anywhere else."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from congrad_ray.config.recipe import Recipe
from congrad_ray.stages.judge.unreadable import by_reason
from congrad_ray.stages.report.charts import CONFIG, FATE_NAMES, matrix_scale
from congrad_ray.stages.report.evaluation import ANSWER_MEASURES, Interval, total_of
from congrad_ray.stages.report.facts import IterationFacts, RunFacts, held_out_by_language
from congrad_ray.stages.report.figures import Figure
from congrad_ray.stages.report.pairs import COLUMNS
from congrad_ray.stages.report.selection import FATES
from congrad_ray.stages.view import Step

_HERE = Path(__file__).parent
# Above so many languages the histograms are folded away: the table and the bars say it shorter.
_FOLDED = 12
_MINUS = "\N{MINUS SIGN}"

STRATEGIES = {
    "own_language": "cosine with the own language's gradient",
    "reward_gap": "the judge's margin",
    "length_balanced": "responses of like length",
    "length_gap": "the chosen response longer",
    "random": "a random choice",
}


NO_PAIR = {
    "too few judged": "fewer than two judged responses",
    "all identical": "all responses the same",
    "none may be chosen": "no response that may be chosen",
    "tie or small margin": "a tie or too small a margin",
}
FINDINGS = {
    "wrong language": "in another language than the prompt",
    "unknown language": "in no language that is clear",
}


def page_environment(folder: Path) -> Environment:
    """The templates of a folder, escaping whatever they are given, with the reports' common `style`."""
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["style"] = Markup((_HERE / "report.css").read_text(encoding="utf-8"))
    return environment


def render(
    facts: RunFacts, figures: Mapping[str, Figure], steps: Sequence[Step], recipe: Recipe, library: str
) -> str:
    """The page; `steps` are the funnel's, `library` is the charts' JavaScript.

    Texts of models and users are escaped by the template; in the page's data every '<' is, so they end no script.
    """
    values = recipe.model_dump(mode="json")
    environment = page_environment(_HERE)
    environment.filters.update(
        whole=whole,
        percent=_share,
        signed=signed,
        duration=duration,
        by_reason=lambda found: str(found) if isinstance(found, int) else by_reason(found),
    )
    scripts = [library, (_HERE / "page.js").read_text(encoding="utf-8")]
    return environment.get_template("report.html.jinja").render(
        facts=facts,
        recipe=values,
        headline=headline(facts, values),
        funnels={iteration.number: _funnel(iteration, steps, recipe) for iteration in facts.iterations},
        figures=figures,
        chart=lambda name: _place(name, figures),
        scripts=[Markup(script) for script in scripts],
        hashes=" ".join(f"'{script_hash(script)}'" for script in scripts),
        specs=script_json({"config": CONFIG, "specs": {name: figure.spec for name, figure in figures.items()}}),
        pairs_json=_pairs_json,
        sides=_sides(facts),
        longest_stage=max((s.manifest.seconds for s in facts.stages if s.manifest), default=1.0) or 1.0,
        folded=_FOLDED,
        fates=FATE_NAMES,
        strategies=STRATEGIES,
        no_pair=NO_PAIR,
        findings=FINDINGS,
        held_out={iteration.number: held_out_by_language(iteration.held_out) for iteration in facts.iterations},
        answer_measures=ANSWER_MEASURES,
        matrix_scale=matrix_scale,
    )


def script_hash(script: str) -> str:
    """What a Content-Security-Policy knows a script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def script_json(value: Any) -> Markup:
    """JSON for a <script> element, whose text nothing in it can end. Raises ValueError for NaN."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _pairs_json(iteration: IterationFacts) -> Markup:
    assert iteration.pairs is not None
    fates = [FATE_NAMES[fate] for fate in FATES]
    return script_json({"columns": COLUMNS, "fates": fates, "rows": iteration.pairs.rows})


def _place(name: str, figures: Mapping[str, Figure]) -> Markup:
    """The element that a chart is drawn in; nothing where there is no such chart."""
    if name not in figures:
        return Markup()
    return Markup('<div class="chart" id="{}" role="img" aria-label="{}"></div>').format(name, figures[name].title)


def headline(facts: RunFacts, recipe: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The run in a few numbers: (number, what it is, small print, verdict). Only what was computed is there.

    A number of the evaluation is coloured by its verdict, which is 'up' or 'down' only where the interval leaves
    out no change.
    """
    unseen = len(recipe["prompts"]["unseen_languages"])
    small = f"{unseen} more only evaluated" if unseen else ""
    found = [(str(len(recipe["prompts"]["languages"])), "languages trained on", small, "")]
    if not facts.iterations:
        return found
    last = facts.iterations[-1]
    responses, pairs = (_total(last, step) for step in ("responses", "pairs"))
    if pairs:
        found.append((whole(pairs), "preference pairs", f"from {whole(responses)} responses", ""))
    return [*found, *_selection_tiles(last), *_evaluation_tiles(last), *_benchmark_tiles(last)]


def _selection_tiles(last: IterationFacts) -> list[tuple[str, str, str, str]]:
    selection = last.selection
    if selection is None:
        return []
    scores = selection.all
    small = f"of {whole(scores.pairs)}"
    if scores.kept < scores.pairs:
        small += f"; dropped: {whole(scores.quota)} to the quota, {whole(scores.conflict)} in conflict"
    found = [(whole(scores.kept), "pairs kept", small, "")]
    if scores.opposing is not None:
        small = f"{_share(scores.opposing / max(1, scores.pairs))} of {whole(scores.pairs)}"
        found.append((whole(scores.opposing), "pairs oppose at least one language", small, ""))
    matrix = selection.summary["cosine_before"]
    between = [matrix[i][j] for i in range(len(matrix)) for j in range(i)]
    if between:
        small = f"lowest cosine {min(between):+.2f}".replace("-", _MINUS)
        against = sum(value < 0 for value in between)
        found.append((f"{against} of {len(between)}", "pairs of languages in conflict", small, ""))
    return found


def _evaluation_tiles(last: IterationFacts) -> list[tuple[str, str, str, str]]:
    found: list[tuple[str, str, str, str]] = []
    evaluation = last.evaluation
    if evaluation is None:
        return found
    for seen in (True, False):
        of_seen = "seen" if seen else "unseen"
        totals = [(decoding, total_of(rows, seen)) for decoding, rows in evaluation.scores.items()]
        known = [(decoding, row) for decoding, row in totals if row is not None]
        if known:
            decoding, row = known[0]
            small = f"{_bounds(row.change, signed)}; {row.before:.3f} before"
            for other, beside in known[1:]:
                small += f"; {other} {_interval(beside.change, signed)}"
            what = f"true score, {decoding} answers, {of_seen}"
            found.append((signed(row.change.value), what, small, row.change.verdict(0.0)))
        for baseline, rates in evaluation.rates.items():
            rate = total_of(rates, seen)
            if rate is None:
                continue
            what = f"win rate against {baseline}, {of_seen}"
            if rate.raw is None:
                if rate.asked:
                    small = f"{rate.readable} of {rate.asked} comparisons could be read"
                    found.append(("none", what, small, ""))
                continue
            small = _bounds(rate.raw, _share)
            if rate.length_controlled:
                small += f"; length-controlled {_interval(rate.length_controlled, _share)}"
            found.append((_share(rate.raw.value), what, small, rate.raw.verdict(0.5)))
    return found


def _benchmark_tiles(last: IterationFacts) -> list[tuple[str, str, str, str]]:
    if last.benchmarks is None or not last.benchmarks.tasks:
        return []
    verdicts = [row.change.verdict(0.0) if row.change else "soft" for row in last.benchmarks.tasks]
    fell, rose = verdicts.count("down"), verdicts.count("up")
    small = f"{rose} rose; the others hold no change in their intervals"
    return [(f"{fell} of {len(verdicts)}", "benchmark results fell", small, "down" if fell else "")]


def _sides(facts: RunFacts) -> list[tuple[str, list[str]]]:
    """The iterations side by side: (what, its value in each)."""
    iterations = facts.iterations
    if len(iterations) < 2:
        return []
    selections, evaluations = [i.selection for i in iterations], [i.evaluation for i in iterations]
    lines = [
        ("pairs", [whole(s.all.pairs) if s else "–" for s in selections]),
        ("kept", [whole(s.all.kept) if s else "–" for s in selections]),
        ("dropped to the quota", [whole(s.all.quota) if s else "–" for s in selections]),
        ("dropped in conflict", [whole(s.all.conflict) if s else "–" for s in selections]),
        (
            "oppose at least one language",
            [whole(s.all.opposing) if s and s.all.opposing is not None else "–" for s in selections],
        ),
        ("mean score of a pair", [signed(s.all.mean) if s else "–" for s in selections]),
        ("final training loss", [f"{i.metrics[-1]['loss']:.3f}" if i.metrics else "–" for i in iterations]),
    ]
    for seen in (True, False):
        totals = [e.total(seen) if e else None for e in evaluations]
        name = f"change of the true score, {'seen' if seen else 'unseen'}"
        lines.append((name, [_interval(row.change, signed) if row else "–" for row in totals]))
        for baseline in dict.fromkeys(name for e in evaluations if e for name in e.rates):
            rates = [total_of(e.rates.get(baseline, []), seen) if e else None for e in evaluations]
            name = f"win rate against {baseline}, {'seen' if seen else 'unseen'}"
            lines.append((name, [_interval(rate.raw, _share) if rate and rate.raw else "–" for rate in rates]))
    return [(name, values) for name, values in lines if any(value != "–" for value in values)]


def _share(value: float) -> str:
    return f"{100 * value:.0f}\N{NO-BREAK SPACE}%"


def _bounds(found: Interval, text: Any) -> str:
    if found.low is None or found.high is None:
        return "no interval"
    return f"{text(found.low)} to {text(found.high)}"


def _interval(found: Interval, text: Any) -> str:
    return f"{text(found.value)} [{_bounds(found, text)}]"


def signed(value: float) -> str:
    """Three digits with a sign."""
    return f"{value:+.3f}".replace("-", _MINUS)


def whole(value: int) -> str:
    """1234567 -> '1 234 567', with narrow spaces that do not break."""
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
            every = counts.get(step.of or step.name, 0) * step.each(recipe)
            count = counts.get(step.name, 0)
            cells.append({"count": count, "share": min(1.0, count / every) if every else None})
        rows.append({"language": language, "cells": cells})
    return {"steps": present, "rows": rows if len(iteration.funnel) > 1 else rows[:-1]}


def duration(seconds: float) -> str:
    """85 -> '1 min 25 s'."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60} min"
