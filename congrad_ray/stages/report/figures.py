"""Which charts a run's facts give, by name: for the page, and as pictures for paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from congrad_ray.stages.report import charts
from congrad_ray.stages.report.charts import Mark, Spec
from congrad_ray.stages.report.evaluation import BenchmarkFacts, EvaluationFacts, Interval, total_of
from congrad_ray.stages.report.facts import IterationFacts, RunFacts
from congrad_ray.stages.report.selection import SelectionFacts
from congrad_ray.stages.train.metrics import Row

RAW, LENGTH_CONTROLLED = "as judged", "length-controlled"

CURVES = {
    "loss": ("loss", False),
    "rewards/accuracies": ("rewards/accuracies", False),
    "rewards/margins": ("rewards/margins", True),
    "rewards/chosen": ("rewards/chosen", True),
    "rewards/rejected": ("rewards/rejected", True),
    "grad_norm": ("gradient norm before clipping", True),
}


@dataclass(frozen=True)
class Figure:
    """A chart with what it shows, in words; those of one `group` are one picture on paper."""

    title: str
    spec: Spec
    group: str = ""


def figures(facts: RunFacts) -> dict[str, Figure]:
    """Every chart of the run by a name that may be a file's and an element's id: `0-scores-greedy`."""
    found: dict[str, Figure] = {}
    for iteration in facts.iterations:
        of_iteration = {
            **(_evaluation(iteration.evaluation) if iteration.evaluation else {}),
            **(_benchmarks(iteration.benchmarks) if iteration.benchmarks else {}),
            **(_selection(iteration.selection) if iteration.selection else {}),
            **_training(iteration.metrics),
        }
        found.update({f"{iteration.number}-{name}": figure for name, figure in of_iteration.items()})
    if len(facts.iterations) > 1:
        found.update(_iterations(facts.iterations))
    return found


def pictures(found: Mapping[str, Figure]) -> dict[str, Spec]:
    """The charts for paper by name, those of a group as one."""
    singles = {name: charts.on_paper(figure.spec) for name, figure in found.items() if not figure.group}
    groups: dict[str, dict[str, Spec]] = {}
    for name, figure in found.items():
        if figure.group:
            groups.setdefault(f"{name.partition('-')[0]}-{figure.group}", {})[figure.title] = figure.spec
    return {**singles, **{name: charts.on_paper(charts.in_columns(specs), 200) for name, specs in groups.items()}}


def _mark(label: str, found: Interval, no_change: float, series: str = "") -> Mark:
    return Mark(label, found.value, found.low, found.high, found.verdict(no_change), series)


def _evaluation(facts: EvaluationFacts) -> dict[str, Figure]:
    found = {}
    if facts.scores:
        # Those of a language one below the other.
        rows = [(decoding, row) for decoding, rows in facts.scores.items() for row in rows]
        places = list(dict.fromkeys(row.place for _, row in rows))
        rows.sort(key=lambda found: places.index(found[1].place))
        marks = [_mark(row.place.name, row.change, 0.0, decoding) for decoding, row in rows]
        title = "change of the true score"
        found["scores"] = Figure(title, charts.forest(marks, 0.0, title, series=list(facts.scores)))
    for number, (baseline, rates) in enumerate(facts.rates.items()):
        marks = []
        for rate in rates:
            both = ((RAW, rate.raw), (LENGTH_CONTROLLED, rate.length_controlled))
            marks += [_mark(rate.place.name, value, 0.5, series) for series, value in both if value]
        if marks:
            series = [name for name in (RAW, LENGTH_CONTROLLED) if any(mark.series == name for mark in marks)]
            spec = charts.forest(marks, 0.5, "win rate", percent=True, series=series, domain=(0.0, 1.0))
            found[f"win-rates-{number}"] = Figure(f"win rate against {baseline}", spec)
    return found


def _benchmarks(facts: BenchmarkFacts) -> dict[str, Figure]:
    found = {}
    tasks = list(dict.fromkeys((row.task, row.metric) for row in facts.tasks))
    for number, (task, metric) in enumerate(tasks):
        rows = [row for row in facts.tasks if (row.task, row.metric) == (task, metric)]
        marks = [_mark(row.name, row.change, 0.0) for row in rows if row.change]
        title = f"{task}: change of {metric}"
        if marks:
            found[f"task-{number}"] = Figure(title, charts.forest(marks, 0.0, title))
    known = [(row, row.accuracy) for row in facts.preferences if row.accuracy]
    models = list(dict.fromkeys(row.model for row, _ in known))
    accuracies = [_mark(row.place.name, accuracy, 0.5, row.model) for row, accuracy in known]
    if accuracies:
        spec = charts.forest(accuracies, 0.5, "preference accuracy", True, models, (0.0, 1.0))
        found["preferences"] = Figure("accuracy on held-out pairs", spec)
    return found


def _selection(facts: SelectionFacts) -> dict[str, Figure]:
    summary = facts.summary
    languages, before, after = summary["languages"], summary["cosine_before"], summary["cosine_after"]
    scale = charts.matrix_scale(before, after)
    found = {"fates": Figure("what became of the pairs", charts.fates_by_language(facts.languages[:-1]))}
    for number, scores in enumerate(facts.languages[:-1]):
        spec = charts.score_histogram(scores, facts.edges, facts.score)
        found[f"histogram-{number}"] = Figure(scores.language, spec, "histograms")
    if len(languages) > 1:
        spec = charts.conflict_matrix(languages, before, scale)
        found["matrix-before"] = Figure("cosines between languages before the surgery", spec)
        if facts.surgery_changed:
            spec = charts.conflict_matrix(languages, after, scale)
            found["matrix-after"] = Figure("cosines between languages after the surgery", spec)
    if facts.traits:
        marks = []
        for trait in facts.traits:
            value = Interval(trait.found.chance, trait.found.low, trait.found.high)
            # Neither better nor worse: a colour only says that the interval leaves out no difference.
            verdict = "soft" if value.verdict(0.5) == "soft" else "differs"
            marks.append(Mark(trait.measure, value.value, value.low, value.high, verdict))
        title = "dropped pair has more"
        found["traits"] = Figure(title, charts.forest(marks, 0.5, title, percent=True, domain=(0.0, 1.0)))
    return found


def _training(metrics: Sequence[Row]) -> dict[str, Figure]:
    return {
        f"curve-{number}": Figure(title, charts.curve(metrics, name, at_zero), "training")
        for number, (name, (title, at_zero)) in enumerate(CURVES.items())
        if metrics and all(name in row for row in metrics)
    }


def _iterations(iterations: Sequence[IterationFacts]) -> dict[str, Figure]:
    scores: dict[int, list[Mark]] = {}
    rates: dict[int, list[Mark]] = {}
    for iteration in iterations:
        evaluation = iteration.evaluation
        if not evaluation:
            continue
        for seen in (True, False):
            series = "seen languages" if seen else "unseen languages"
            score = evaluation.total(seen)
            if score:
                scores.setdefault(iteration.number, []).append(_mark("", score.change, 0.0, series))
            rate = total_of(evaluation.rates.get(evaluation.baseline, []), seen)
            if rate and rate.raw:
                rates.setdefault(iteration.number, []).append(_mark("", rate.raw, 0.5, series))
    found = {}
    if scores:
        title = "change of the true score since the start"
        found["iterations-scores"] = Figure(title, charts.over_iterations(scores, 0.0, title, percent=False))
    if rates:
        title = "win rate against the start"
        found["iterations-win-rates"] = Figure(title, charts.over_iterations(rates, 0.5, title, percent=True))
    return found
