"""Runs with everything that a run can have, in few languages and in fifty, and with parts of it missing."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.data.tables import QUARANTINE, table_of
from congrad_ray.pipeline.order import FIRST, ITERATED, LAST
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.context import Context
from congrad_ray.stages.benchmark.intervals import TaskChange
from congrad_ray.stages.benchmark.preferences import PreferenceScore
from congrad_ray.stages.report.facts import gather
from congrad_ray.stages.report.figures import figures
from congrad_ray.stages.train.metrics import METRICS
from pages import Page, words

MakeRun = Callable[..., tuple[RunDirectory, Recipe]]
FEW = {
    "en": ("Why is the sky blue?", "Air scatters blue light more than red.", "It just is."),
    "de": ("Warum ist der Himmel blau?", "Luft streut blaues Licht stärker als rotes.", "Ist halt so."),
    "sw": ("Kwa nini anga ni buluu?", "Hewa hutawanya mwanga wa buluu zaidi.", "Sijui."),
}
_FIFTY = (
    "af am ar az be bg bn bs ca cs cy da de el en es et eu fa fi fr ga gl gu he hi hr hu hy id it ja ka kk km",
    "kn ko lt lv mk ml mn mr ms mt my nb ne nl zh-Hant",
)
MANY = {
    tag: (
        f"Question in {tag}: why is the sky blue?",
        f"An answer in {tag} of some length.",
        f"No answer in {tag}.",
    )
    for line in _FIFTY
    for tag in line.split()
}


def complete(run: RunDirectory, languages: list[str]) -> None:
    """Adds to a made run what other stages and settings leave, and a second iteration like the first."""
    random = np.random.default_rng(5)
    folder = run.stage("evaluation", 0)
    summary = folder.read_json("summary.json")
    sampled = []
    for row in summary["score_changes"]:
        change = float(random.normal(0.05, 0.05))
        sampled.append({**row, "decoding": "sampled", "after": row["before"] + change, "change": change})
        sampled[-1] |= {"low": change - 0.05, "high": change + 0.05}
    rates = []
    for baseline in ("M_0", "reference"):
        for row in summary["win_rates"]:
            rate = float(random.uniform(0.4, 0.8))
            found = {"baseline": baseline, "ties": 2, "win_rate": rate, "low": rate - 0.1, "high": rate + 0.1}
            found |= {"lc_win_rate": rate - 0.08, "lc_low": rate - 0.19, "lc_high": rate + 0.03}
            rates.append({**row, **found})
    for row in summary["answers"]:
        row |= {"wrong_language_share": 0.02, "repeated_share": 0.04}
    summary |= {"score_changes": [*summary["score_changes"], *sampled], "win_rates": rates}
    folder.write_json("summary.json", {**summary, "baselines": ["M_0", "reference"]})
    changes, preferences = [], []
    for task in ("belebele", "xcopa"):
        for language in [*languages, "*"]:
            change = float(random.normal(-0.01, 0.02))
            bounds = (change - 0.02, change + 0.02)
            changes.append(TaskChange(task, language, "acc", 0.5, 0.5 + change, change, *bounds, 100))
    changes.append(TaskChange("gsm", None, "acc", 0.5, 0.4, -0.1, None, None, 100))
    changes.append(TaskChange("odd", None, "bleu", 0.5, float("nan"), float("nan"), None, None, 100))
    for language in [*languages, "*"]:
        share = float(random.uniform(0.45, 0.9))
        # Against itself the model that training began with has no reward.
        preferences.append(PreferenceScore("M_0", language, True, 40, *[None] * 3, 0.5, *[None] * 3))
        found = (share, share - 0.1, share + 0.1, 0.5, 0.2, -0.1, 0.5)
        preferences.append(PreferenceScore("M_1", language, True, 40, *found))
    benchmarks = {
        "model": "M_1",
        "baseline": "M_0",
        "tasks": [],
        "changes": [asdict(row) for row in changes],
        "preferences": [asdict(row) for row in preferences],
    }
    run.stage("benchmarks", 0).write_json("summary.json", {**benchmarks, "warnings": ["xcopa: <few> questions"]})
    counters: dict[str, dict[str, Any]] = {
        "judgements": {
            "agreement": {language: {"tau": 0.4, "prompts": 30} for language in languages},
            "cost_usd": 1.25,
            "judges": {
                name: {"asked": 9, "readable": 8, "mean_score": 3.5, "prompt_tokens": 90, "output_tokens": 9}
                | more
                for name, more in (("<large>", {"cost_usd": 1.25}), ("small", {"cost_usd": None}))
            },
            "engine_starts": 1,
        },
        "responses": {"engine_starts": 1, "prompt_tokens": 1000, "output_tokens": 2000},
        "pairs": {
            "no_pair": {f"all_identical {language}": 2 for language in languages},
            "wrong_language": {languages[0]: 7},
            "unknown_language": {},
        },
    }
    for name, found in counters.items():
        stage = run.stage(name, 0)
        stage.commit(name, 0, f"{name}-print", {}, {}, 100, 10.0, found)
    quarantined = [{"row_id": "1", "language": languages[0], "reason": "prompt_too_long", "detail": "9 > 8"}]
    run.stage("responses", 0).quarantine.write_table("part.parquet", table_of(quarantined, QUARANTINE))
    audit = {"pairs": 200, "error": 0.0049, "largest_error": 0.0123, "rank_correlation": 0.998}
    run.stage("sketches", 0).write_json("summary.json", {"audit": audit})
    lines = run.stage("policy", 0).read_bytes(METRICS).decode()
    for step in (0, 24):
        row = {"step": step, "eval_loss": 0.6, "eval_rewards/accuracies": 0.5 + step / 100}
        for language in languages:
            row |= {f"eval_{language}_loss": 0.7, f"eval_{language}_rewards/accuracies": 0.4}
        lines += json.dumps(row) + "\n"
    run.stage("policy", 0).write_bytes(METRICS, lines.encode())
    shutil.copytree(f"{run.path}/iteration-0", f"{run.path}/iteration-1")


def report_of(run: RunDirectory, recipe: Recipe) -> str:
    LAST[-1].run(Context(recipe, Profile(name="test"), run, 0, run.stage("report", None)))
    return run.read_bytes("report.html").decode()


def chart_names(page: Page) -> set[str]:
    return {attributes["id"] for _, attributes in page.elements if attributes.get("class") == "chart"}


@pytest.mark.parametrize(
    "texts", [pytest.param(FEW, id="few"), pytest.param(MANY, id="fifty", marks=pytest.mark.slow)]
)
def test_everything_is_shown(tmp_path: Path, make_run: MakeRun, texts: dict[str, tuple[str, str, str]]) -> None:
    languages = sorted(texts)
    run, recipe = make_run(tmp_path / "run", texts=texts)
    complete(run, languages)
    page = report_of(run, recipe)
    found, text = Page(page), words(page)
    specs = json.loads(found.texts["charts"])["specs"]
    assert chart_names(found) == set(specs)
    for name in ("scores", "win-rates-0", "win-rates-1", "task-0", "task-1", "preferences", "fates", "traits"):
        assert f"0-{name}" in specs and f"1-{name}" in specs
    assert {"iterations-scores", "iterations-win-rates"} < set(specs)
    assert sum(name.startswith("0-histogram-") for name in specs) == len(languages)
    for said in (
        "Iterations side by side",
        "length-controlled",
        "Alignment tax: benchmarks before and after",
        "xcopa: &lt;few&gt; questions",
        "Held-out preferences",
        "&lt;large&gt; 9 8 3.50 90, 9 1.25",
        "How far the judges agree",
        f"{2 * len(languages)} all responses the same",
        "7 were in another language than the prompt",
        "off by 0.0049 (root mean square of 200 pairs",
        "1: prompt_too_long 1",
        "Pairs held out of training",
        "engine starts",
        "2.50",  # of both iterations
    ):
        assert said in text, said
    changes = run.stage("benchmarks", 0).read_json("summary.json")["changes"]
    fell = sum(row["high"] is not None and row["high"] < 0 for row in changes)
    assert f"{fell} of {len(changes)} benchmark results fell" in text
    pairs = json.loads(found.texts["1-pairs"])
    assert {row[0] for row in pairs["rows"]} == set(languages)
    assert len(page.encode()) < 2.5e6
    # Of many languages the histograms are folded away, and long tables scroll.
    assert ('class="histograms"' in page) == (len(languages) > 12)
    assert ("scroll tall" in page) == (len(languages) > 16)
    with Path(run.path, "report", "tables", "win_rates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["baseline"] for row in rows} == {"M_0", "reference"}
    assert all(float(row["lc_win_rate_low"]) < float(row["lc_win_rate"]) for row in rows)


@pytest.mark.parametrize(
    "stage", ["evaluation", "benchmarks", "selection", "pairs", "sketches", "policy", "judgements"]
)
def test_any_stage_may_be_missing(tmp_path: Path, make_run: MakeRun, stage: str) -> None:
    run, recipe = make_run(tmp_path / "run", texts=FEW)
    complete(run, sorted(FEW))
    for number in (0, 1):
        run.stage(stage, number).delete()
    page = report_of(run, recipe)
    facts = gather(run, (*FIRST, *ITERATED))
    assert chart_names(Page(page)) == set(figures(facts))


def test_an_older_selection_lacks_columns(tmp_path: Path, make_run: MakeRun) -> None:
    run, recipe = make_run(tmp_path / "run", texts=FEW)
    folder = run.stage("selection", 0)
    scores = folder.read_table(name="scores.parquet")
    folder.write_table("scores.parquet", scores.drop_columns(["worst_cosine", "score"]))
    text = words(report_of(run, recipe))
    selection = gather(run, (*FIRST, *ITERATED)).iterations[0].selection
    assert selection is not None
    assert selection.all.opposing is None
    assert selection.all.mean == pytest.approx(float(np.mean(scores["cosine"].to_numpy())))
    assert "oppose at least one language" not in text
