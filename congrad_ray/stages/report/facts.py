"""What a run directory holds, gathered for the report; every part may be missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.evaluate.statistics import EVERY_LANGUAGE
from congrad_ray.stages.report.evaluation import (
    BenchmarkFacts,
    EvaluationFacts,
    benchmark_facts,
    evaluation_facts,
)
from congrad_ray.stages.report.ledger import NoPair, StageFact, judge_agreement, judge_counts, no_pair, stage_fact
from congrad_ray.stages.report.pairs import BUDGET, PairTable, pair_table
from congrad_ray.stages.report.selection import Scored, SelectionFacts, read_scored, selection_facts
from congrad_ray.stages.select.keep import TOKENS
from congrad_ray.stages.train.metrics import Row, read_evaluations, read_metrics

if TYPE_CHECKING:
    from congrad_ray.stages.base import Stage


@dataclass(frozen=True)
class IterationFacts:
    """What one iteration left behind."""

    number: int
    funnel: dict[str, dict[str, int]]  # language -> step -> count; a step that is missing was not done
    no_pair: NoPair | None = None
    judges: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # numbers of each of several
    agreement: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of several judges, by language
    selection: SelectionFacts | None = None
    pairs: PairTable | None = None
    metrics: list[Row] = field(default_factory=list)
    held_out: list[Row] = field(default_factory=list)  # metrics of held-out pairs, by step
    trained_tokens: int | None = None  # of the kept pairs, prompts counted once, as often as they were trained on
    evaluation: EvaluationFacts | None = None
    benchmarks: BenchmarkFacts | None = None


@dataclass(frozen=True)
class RunFacts:
    """A whole run."""

    path: str
    recipe_text: str | None
    stages: list[StageFact]
    iterations: list[IterationFacts]

    @property
    def seconds(self) -> float:
        """Of all finished stages."""
        return sum(stage.manifest.seconds for stage in self.stages if stage.manifest)

    @property
    def versions(self) -> dict[str, str]:
        """Of the packages that the stages were run with."""
        found: dict[str, set[str]] = {}
        for stage in self.stages:
            for package, version in (stage.manifest.versions if stage.manifest else {}).items():
                found.setdefault(package, set()).add(version)
        return {package: ", ".join(sorted(versions)) for package, versions in sorted(found.items())}


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs of one language, or all ('*'), in training: at the first and at the last look."""

    language: str
    loss: tuple[float, float]
    accuracy: tuple[float, float]  # share of pairs whose reward margin is above 0


def held_out_by_language(rows: Sequence[Row]) -> list[HeldOut]:
    """From the metrics of held-out pairs (`eval_loss`, `eval_de_loss`, ...); none without any."""
    if not rows:
        return []
    first, last = rows[0], rows[-1]
    names = [name for name in last if name.endswith("_rewards/accuracies") and name in first]
    found = []
    for name in names:
        start = name.removesuffix("rewards/accuracies")
        loss, language = f"{start}loss", start.removeprefix("eval_").rstrip("_") or EVERY_LANGUAGE
        if loss in first and loss in last:
            found.append(HeldOut(language, (first[loss], last[loss]), (first[name], last[name])))
    return sorted(found, key=lambda row: (row.language == EVERY_LANGUAGE, row.language))


def gather(run: RunDirectory, stages: Sequence[Stage]) -> RunFacts:
    """Everything the report shows of these stages. Reads only what is there, and of the big tables only the
    columns it counts."""
    once = [stage for stage in stages if not stage.each_iteration]
    iterated = [stage for stage in stages if stage.each_iteration]
    begun = [stage for stage in once if run.exists(stage.folder)]
    found = [stage_fact(run.stage(stage.folder, None), stage.folder, None) for stage in begun]
    count = 0
    while run.exists(f"iteration-{count}"):
        found += [
            stage_fact(run.stage(stage.folder, count), stage.folder, count)
            for stage in iterated
            if run.exists(f"iteration-{count}/{stage.folder}")
        ]
        count += 1
    iterations = [_iteration(run, number, stages, BUDGET // count) for number in range(count)]
    found = [
        replace(fact, tokens=iterations[fact.iteration].trained_tokens)
        if fact.folder == "policy" and fact.iteration is not None
        else fact
        for fact in found
    ]
    recipe = run.read_bytes("recipe.yaml").decode() if run.exists("recipe.yaml") else None
    return RunFacts(run.path, recipe, found, iterations)


def _iteration(run: RunDirectory, number: int, stages: Sequence[Stage], budget: int) -> IterationFacts:
    names = ("judgements", "pairs", "sketches", "selection", "policy", "evaluation", "benchmarks")
    judgements, pairs, sketches, selection, policy, evaluation, benchmarks = (
        run.stage(name, number) for name in names
    )
    scored = read_scored(selection, pairs, sketches)
    summary, audit = selection.read_json("summary.json"), (sketches.read_json("summary.json") or {}).get("audit")
    metrics = read_metrics(policy)
    return IterationFacts(
        number=number,
        funnel=_funnel(run, number, stages),
        no_pair=no_pair(pairs.manifest()),
        judges=judge_counts(judgements.manifest()),
        agreement=judge_agreement(judgements.manifest()),
        selection=selection_facts(scored, summary, audit) if scored and summary else None,
        pairs=pair_table(scored, pairs, budget) if scored else None,
        metrics=metrics,
        held_out=read_evaluations(policy),
        trained_tokens=_trained_tokens(scored, metrics) if scored else None,
        evaluation=evaluation_facts(evaluation),
        benchmarks=benchmark_facts(benchmarks),
    )


def _trained_tokens(scored: Scored, metrics: list[Row]) -> int | None:
    if not metrics or "epoch" not in metrics[-1] or not scored.has(*TOKENS):
        return None
    return round(metrics[-1]["epoch"] * sum(float(scored.column(name)[scored.kept].sum()) for name in TOKENS))


def _funnel(run: RunDirectory, number: int, stages: Sequence[Stage]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for stage in stages:
        if stage.step:
            found = stage.step.counts(run.stage(stage.folder, number if stage.each_iteration else None))
            if found is not None:
                counts[stage.step.name] = found
    languages = sorted({language for counter in counts.values() for language in counter})
    return {language: {step: counter[language] for step, counter in counts.items()} for language in languages}
