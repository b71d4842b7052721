"""What a run directory holds, gathered for the report; every part may be missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from congrad_ray.rundir.directory import Folder, Manifest, RunDirectory
from congrad_ray.stages.report.evaluation import EvaluationRow, evaluation_rows
from congrad_ray.stages.train.metrics import Row, read_metrics

if TYPE_CHECKING:
    from congrad_ray.stages.base import Stage

_BINS = 20


@dataclass(frozen=True)
class StageFact:
    """A stage and its manifest; no manifest means unfinished."""

    iteration: int | None
    folder: str
    manifest: Manifest | None


@dataclass(frozen=True)
class Histogram:
    """Counts of pairs by cosine with the multilingual direction, in `_BINS` equal bins from -limit to limit."""

    language: str
    limit: float
    kept: list[int]
    dropped: list[int]
    mean: float
    conflicting: float  # share of pairs with a cosine below 0


@dataclass(frozen=True)
class SamplePair:
    """A pair for the reader, with why it is where it is."""

    language: str
    kept: bool
    cosine: float
    chosen_score: float
    rejected_score: float
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class IterationFacts:
    """What one iteration left behind."""

    number: int
    funnel: dict[str, dict[str, int]]  # language -> step -> count; a step that is missing was not done
    selection: dict[str, Any] | None  # selection/summary.json
    histograms: list[Histogram] = field(default_factory=list)
    samples: list[tuple[SamplePair, SamplePair]] = field(default_factory=list)  # best kept, worst dropped
    metrics: list[Row] = field(default_factory=list)
    evaluation: list[EvaluationRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # of the evaluation


@dataclass(frozen=True)
class RunFacts:
    """A whole run."""

    path: str
    recipe_text: str | None
    stages: list[StageFact]
    iterations: list[IterationFacts]


def gather(run: RunDirectory, stages: Sequence[Stage]) -> RunFacts:
    """Everything the report shows of these stages. Reads only what is there, and of the big tables only the
    columns it counts."""
    once = [stage for stage in stages if not stage.each_iteration]
    iterated = [stage for stage in stages if stage.each_iteration]
    found = [StageFact(None, stage.folder, run.stage(stage.folder, None).manifest()) for stage in once]
    iterations = []
    number = 0
    while run.exists(f"iteration-{number}"):
        found += [
            StageFact(number, stage.folder, run.stage(stage.folder, number).manifest())
            for stage in iterated
            if run.exists(f"iteration-{number}/{stage.folder}")
        ]
        iterations.append(_iteration(run, number, stages))
        number += 1
    recipe = run.read_bytes("recipe.yaml").decode() if run.exists("recipe.yaml") else None
    return RunFacts(run.path, recipe, found, iterations)


def _iteration(run: RunDirectory, number: int, stages: Sequence[Stage]) -> IterationFacts:
    selection, evaluation = run.stage("selection", number), run.stage("evaluation", number)
    scores = selection.read_table(name="scores.parquet") if selection.exists("scores.parquet") else None
    return IterationFacts(
        number=number,
        funnel=_funnel(run, number, stages),
        selection=selection.read_json("summary.json"),
        histograms=_histograms(scores) if scores is not None else [],
        samples=_samples(run.stage("pairs", number), scores) if scores is not None else [],
        metrics=read_metrics(run.stage("policy", number)),
        evaluation=evaluation_rows(evaluation),
        warnings=(evaluation.read_json("summary.json") or {}).get("warnings", []),
    )


def _funnel(run: RunDirectory, number: int, stages: Sequence[Stage]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for stage in stages:
        if stage.step:
            found = stage.step.counts(run.stage(stage.folder, number if stage.each_iteration else None))
            if found is not None:
                counts[stage.step.name] = found
    languages = sorted({language for counter in counts.values() for language in counter})
    return {language: {step: counter[language] for step, counter in counts.items()} for language in languages}


def _histograms(scores: pa.Table) -> list[Histogram]:
    cosine = scores["cosine"].to_numpy()
    kept = np.array(scores["kept"].to_pylist(), dtype=bool)
    languages = np.array(scores["language"].to_pylist())
    # One scale for all languages, or their pictures could not be compared.
    limit = max(0.05, float(np.ceil(np.abs(cosine).max(initial=0.0) * 20) / 20))
    found = []
    for language in sorted(set(languages.tolist())):
        here = languages == language
        counts = [
            np.histogram(cosine[here & part], bins=_BINS, range=(-limit, limit))[0].tolist()
            for part in (kept, ~kept)
        ]
        mean, conflicting = float(cosine[here].mean()), float((cosine[here] < 0).mean())
        found.append(Histogram(language, limit, counts[0], counts[1], mean, conflicting))
    return found


def _samples(pairs: Folder, scores: pa.Table) -> list[tuple[SamplePair, SamplePair]]:
    """Of every language the kept pair with the highest cosine and the dropped one with the lowest."""
    chosen: list[tuple[str, str]] = []
    rows = sorted(scores.to_pylist(), key=lambda row: row["cosine"])
    by_id = {row["pair_id"]: row for row in rows}
    for language in sorted({row["language"] for row in rows}):
        kept = [row["pair_id"] for row in rows if row["language"] == language and row["kept"]]
        dropped = [row["pair_id"] for row in rows if row["language"] == language and not row["kept"]]
        if kept and dropped:
            chosen.append((kept[-1], dropped[0]))
    wanted = pa.array([identifier for two in chosen for identifier in two], type=pa.string())
    texts: dict[str, dict[str, Any]] = {}
    for path in pairs.files(".parquet"):
        table = pq.read_table(path, filesystem=pairs.filesystem, filters=pc.field("pair_id").isin(wanted))
        texts.update({row["pair_id"]: row for row in table.to_pylist()})
    return [
        (_sample(texts[best], by_id[best]), _sample(texts[worst], by_id[worst]))
        for best, worst in chosen
        if best in texts and worst in texts
    ]


def _sample(pair: dict[str, Any], score: dict[str, Any]) -> SamplePair:
    def text(messages: list[dict[str, str]]) -> str:
        return "\n".join(message["content"] for message in messages)

    return SamplePair(
        language=pair["language"],
        kept=score["kept"],
        cosine=score["cosine"],
        chosen_score=pair["chosen_score"],
        rejected_score=pair["rejected_score"],
        prompt=text(pair["prompt"]),
        chosen=text(pair["chosen"]),
        rejected=text(pair["rejected"]),
    )
