"""The cards and the tables beside the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, ModelCard

from congrad_ray.config.recipe import Recipe
from congrad_ray.pipeline.order import FIRST, ITERATED
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.report.cards import model_card, pairs_card
from congrad_ray.stages.report.facts import gather
from congrad_ray.stages.report.tables import csv_text, tables

MakeRun = Callable[..., tuple[RunDirectory, Recipe]]
REPORTED = (*FIRST, *ITERATED)


def test_the_model_card_says_what_was_measured(tmp_path: Path, make_run: MakeRun) -> None:
    run, recipe = make_run(tmp_path)
    text = model_card(gather(run, REPORTED), recipe)
    assert text is not None
    card = ModelCard(text)
    assert card.data.language == ["ar", "de", "en", "he", "ru", "sw"]
    assert card.data.base_model is None  # it is no name on the hub
    assert "| true score, greedy answers, change from M_0 | all seen | 48 | +0.250 [+0.250, +0.250] |" in text
    summary = run.stage("evaluation", 0).read_json("summary.json")
    rate = next(row for row in summary["win_rates"] if row["language"] == "*" and row["seen"])
    interval = f"{rate['win_rate']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]"
    assert f"| win rate against M_0 | all seen | 42 | {interval} |" in text
    assert str(tmp_path) not in text


def test_a_model_on_the_hub_is_the_base_model(tmp_path: Path, make_run: MakeRun) -> None:
    run, recipe = make_run(tmp_path)
    named = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": "google/gemma-3-270m"})})
    assert ModelCard(model_card(gather(run, REPORTED), named) or "").data.base_model == "google/gemma-3-270m"
    here = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": "/secret/place/model"})})
    text = model_card(gather(run, REPORTED), here) or ""
    assert "`model`" in text and "/secret" not in text


def test_nothing_measured_is_said(tmp_path: Path, make_run: MakeRun) -> None:
    run, recipe = make_run(tmp_path, until="policy")
    assert "Nothing was measured of this model." in (model_card(gather(run, REPORTED), recipe) or "")


def test_there_are_no_cards_of_what_is_not_there(tmp_path: Path, make_run: MakeRun) -> None:
    run, recipe = make_run(tmp_path, until="sketches")
    facts = gather(run, REPORTED)
    assert model_card(facts, recipe) is None
    assert pairs_card(facts, recipe) is None


def test_the_data_set_card_counts_each_language(tmp_path: Path, make_run: MakeRun) -> None:
    run, recipe = make_run(tmp_path)
    text = pairs_card(gather(run, REPORTED), recipe)
    assert text is not None
    files = DatasetCard(text).data.to_dict()["configs"][0]["data_files"]
    assert files == [{"split": "train", "path": "iteration-0/selection/selected.parquet"}]
    assert run.exists(files[0]["path"])
    per_language = run.stage("selection", 0).read_json("summary.json")["per_language"]
    for language, row in per_language.items():
        assert f"| {language} | {row['pairs']} | {row['kept']} |" in text


def test_a_hostile_name_stays_a_name(tmp_path: Path, make_run: MakeRun) -> None:
    run, recipe = make_run(tmp_path, name="a | b\x1b[31m\n# Heading")
    text = model_card(gather(run, REPORTED), recipe) or ""
    assert "\x1b" not in text and "\n# Heading" not in text
    assert ModelCard(text).data.pipeline_tag == "text-generation"


def test_tables_hold_the_facts(tmp_path: Path, make_run: MakeRun) -> None:
    run, _ = make_run(tmp_path)
    facts = gather(run, REPORTED)
    found = {name: list(csv.DictReader(io.StringIO(text))) for name, text in tables(facts).items()}
    selection = facts.iterations[0].selection
    assert selection is not None
    for row, scores in zip(found["selection"], selection.languages, strict=True):
        assert (row["iteration"], row["language"]) == ("0", scores.language)
        assert int(row["pairs"]) == sum(
            int(row[name]) for name in ("kept", "dropped_to_quota", "dropped_in_conflict")
        )
        assert float(row["threshold"]) == pytest.approx(scores.threshold)
    assert len(found["cosines"]) == 15
    assert [row["stage"] for row in found["stages"]][:2] == ["prompts", "responses"]
    assert float(found["stages"][1]["seconds"]) == 95.0
    assert len(found["training"]) == 24
    assert {row["change"] for row in found["true_scores"] if row["language"] == "de"} == {"0.25"}
    assert not found.keys() & {"benchmarks", "preferences", "no_pair", "held_out"}  # there are none


def test_a_spreadsheet_runs_nothing() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text([{"language": "=1+1", "x": None}, {"x": -2, "y": "a,\nb"}]))))
    assert rows == [{"language": "'=1+1", "x": "", "y": ""}, {"language": "", "x": "-2", "y": "a,\nb"}]
