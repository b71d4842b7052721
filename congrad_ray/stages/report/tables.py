"""The report's numbers as CSV, for a paper or a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from congrad_ray.stages.report.evaluation import ANSWER_MEASURES, BenchmarkFacts, EvaluationFacts, Interval
from congrad_ray.stages.report.facts import RunFacts
from congrad_ray.stages.report.selection import SelectionFacts

Row = Mapping[str, Any]


def tables(facts: RunFacts) -> dict[str, str]:
    """The CSV files by name, those with a row only. Every row of an iteration names it."""
    rows: dict[str, list[Row]] = {"stages": _stages(facts)}
    for iteration in facts.iterations:
        of_iteration: dict[str, Sequence[Row]] = {
            "funnel": [{"language": language, **counts} for language, counts in iteration.funnel.items()],
            **(_evaluation(iteration.evaluation) if iteration.evaluation else {}),
            **(_benchmarks(iteration.benchmarks) if iteration.benchmarks else {}),
            **(_selection(iteration.selection) if iteration.selection else {}),
            "training": iteration.metrics,
            "held_out": iteration.held_out,
        }
        if iteration.no_pair:
            reasons = iteration.no_pair.reasons
            of_iteration["no_pair"] = [
                {"reason": reason, "language": language, "prompts": count}
                for reason, counts in reasons.items()
                for language, count in counts.items()
            ]
        for name, found in of_iteration.items():
            rows.setdefault(name, []).extend({"iteration": iteration.number, **row} for row in found)
    return {name: csv_text(found) for name, found in rows.items() if found}


def csv_text(rows: Sequence[Row]) -> str:
    """Rows as CSV with a header of all their keys; None is empty.

    A cell that a spreadsheet would take for a formula, such as a language tag `=1+1`, gets an apostrophe.
    """
    sink = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(sink, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _safe(value) for name, value in row.items()} for row in rows)
    return sink.getvalue()


def _safe(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _interval(found: Interval | None, name: str) -> dict[str, float | None]:
    if found is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _stages(facts: RunFacts) -> list[Row]:
    return [
        {
            "iteration": stage.iteration,
            "stage": stage.folder,
            "rows": stage.manifest.rows,
            "seconds": stage.manifest.seconds,
            "tokens": stage.tokens,
            "cost_usd": stage.cost,
            "engine_starts": stage.engine_starts,
            "quarantine": sum(stage.quarantine.values()),
            "finished_at": stage.manifest.finished_at,
        }
        for stage in facts.stages
        if stage.manifest
    ]


def _evaluation(facts: EvaluationFacts) -> dict[str, list[Row]]:
    return {
        "true_scores": [
            {
                "decoding": decoding,
                "language": row.place.language,
                "seen": row.place.seen,
                "prompts": row.count,
                "before": row.before,
                "after": row.after,
                **_interval(row.change, "change"),
            }
            for decoding, rows in facts.scores.items()
            for row in rows
        ],
        "win_rates": [
            {
                "baseline": baseline,
                "language": row.place.language,
                "seen": row.place.seen,
                "prompts": row.prompts,
                "asked": row.asked,
                "readable": row.readable,
                **_interval(row.raw, "win_rate"),
                **_interval(row.length_controlled, "lc_win_rate"),
                "ties": row.ties,
                "consistent": row.consistent,
            }
            for baseline, rows in facts.rates.items()
            for row in rows
        ],
        "answers": [
            {
                "decoding": decoding,
                "language": row.place.language,
                "seen": row.place.seen,
                "count": row.count,
                **{f"{name}_before": row.before[name] for name in ANSWER_MEASURES},
                **{f"{name}_after": row.after[name] for name in ANSWER_MEASURES},
            }
            for decoding, rows in facts.answers.items()
            for row in rows
        ],
    }


def _benchmarks(facts: BenchmarkFacts) -> dict[str, list[Row]]:
    return {
        "benchmarks": [
            {
                "task": row.task,
                "metric": row.metric,
                "language": row.language,
                "questions": row.count,
                "before": row.before,
                "after": row.after,
                **_interval(row.change, "change"),
            }
            for row in facts.tasks
        ],
        "preferences": [
            {
                "model": row.model,
                "language": row.place.language,
                "seen": row.place.seen,
                "pairs": row.pairs,
                **_interval(row.accuracy, "accuracy"),
                "logp_accuracy": row.logp_accuracy,
                **_interval(row.margin, "margin"),
            }
            for row in facts.preferences
        ],
    }


def _selection(facts: SelectionFacts) -> dict[str, list[Row]]:
    languages = facts.summary["languages"]
    return {
        "selection": [
            {
                "language": row.language,
                "pairs": row.pairs,
                "kept": row.kept,
                "dropped_to_quota": row.quota,
                "dropped_in_conflict": row.conflict,
                "kept_in_conflict": row.kept_in_conflict,
                "oppose_a_language": row.opposing,
                "threshold": row.threshold,
                "mean_score": row.mean,
            }
            for row in facts.languages
        ],
        "cosines": [
            {
                "language": languages[i],
                "with": languages[j],
                "before": facts.summary["cosine_before"][i][j],
                "after": facts.summary["cosine_after"][i][j],
            }
            for i in range(len(languages))
            for j in range(i)
        ],
        "dropped_pairs": [
            {
                "measure": row.measure,
                **{f"mean_{fate}": mean for fate, mean in row.mean.items()},
                "chance_dropped_has_more": row.found.chance,
                "low": row.found.low,
                "high": row.found.high,
            }
            for row in facts.traits
        ],
        "other_strategies": [
            {
                "strategy": strategy,
                "pairs": row.pairs,
                "kept": row.kept_first,
                "kept_by_strategy": row.kept_second,
                "kept_by_both": row.kept_both,
                "by_chance": row.by_chance,
                "rank_correlation": row.rank_correlation,
            }
            for strategy, row in facts.agreement
        ],
    }
