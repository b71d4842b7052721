"""The charts as data: what they show, that Vega-Lite can read them, and that foreign texts stay data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import vl_convert

from congrad_ray.stages.report import charts
from congrad_ray.stages.report.charts import Mark, Spec
from congrad_ray.stages.report.selection import FATES, LanguageScores

EVIL = '"+alert(1)+"\'</script>'


def scores(language: str = "de", threshold: float | None = 0.2) -> LanguageScores:
    bins = {"kept": [0, 0, 3, 4], "quota": [0, 2, 1, 0], "conflict": [5, 0, 0, 0]}
    return LanguageScores(language, 15, 7, 3, 5, 0, 6, threshold, 0.1, bins)


EDGES = [-0.2, 0.0, 0.2, 0.4, 0.6]
MARKS = [
    Mark("de", 0.1, 0.05, 0.15, "up", "raw"),
    Mark(EVIL, -0.1, -0.3, 0.1, "soft", "raw"),
    Mark(EVIL, -0.2, None, None, "soft", "controlled"),
]
SPECS: dict[str, Spec] = {
    "histogram": charts.score_histogram(scores(EVIL), EDGES),
    "fates": charts.fates_by_language([scores("de"), scores(EVIL)]),
    "matrix": charts.conflict_matrix(["de", EVIL], [[1.0, -0.2], [-0.2, 1.0]], 0.2),
    "forest": charts.forest(MARKS, 0.0, "change", series=["raw", "controlled"]),
    "rates": charts.forest(MARKS[:2], 0.5, "win rate", percent=True, domain=(0.0, 1.0)),
    "curve": charts.curve([{"step": 1, "loss": 0.7}, {"step": 2, "loss": float("nan")}], "loss"),
    "empty curve": charts.curve([], "loss"),
    "one value": charts.forest([Mark("de", 0.0, 0.0, 0.0, "soft")], 0.0, "change"),
    "iterations": charts.over_iterations({0: MARKS, 1: MARKS[:1]}, 0.0, "change", percent=False),
    "columns": charts.in_columns({EVIL: charts.score_histogram(scores(), EDGES), "b": charts.curve([], "loss")}),
}


def parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from parts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from parts(inner)


@pytest.mark.parametrize("name", SPECS)
def test_vega_lite_draws_them(name: str) -> None:
    spec = charts.on_paper(SPECS[name])
    assert "var(--" not in json.dumps(spec)
    assert vl_convert.vegalite_to_svg(spec).startswith("<svg")


@pytest.mark.parametrize("name", SPECS)
def test_foreign_texts_are_no_part_of_an_expression(name: str) -> None:
    compiled = vl_convert.vegalite_to_vega(charts.on_paper(SPECS[name]))
    for key, value in parts(compiled):
        if key in ("expr", "signal", "test", "update", "init") and isinstance(value, str):
            assert "alert" not in value, f"{key}: {value}"


@pytest.mark.parametrize("name", SPECS)
def test_they_are_plain_json(name: str) -> None:
    json.dumps(SPECS[name], allow_nan=False)


def values(spec: Spec) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = spec["data"]["values"]
    return found


def test_a_histogram_has_every_pair_and_its_threshold() -> None:
    spec = SPECS["histogram"]
    assert {(row["from"], row["to"], row["fate"], row["pairs"]) for row in values(spec)} == {
        (-0.2, 0.0, "dropped in conflict", 5),
        (0.0, 0.2, "dropped to the quota", 2),
        (0.2, 0.4, "dropped to the quota", 1),
        (0.2, 0.4, "kept", 3),
        (0.4, 0.6, "kept", 4),
    }
    lines = [layer["data"]["values"][0]["at"] for layer in spec["layer"] if "data" in layer]
    assert lines == [0.0, 0.2]
    without = charts.score_histogram(scores(threshold=None), EDGES)
    assert [layer["data"]["values"][0]["at"] for layer in without["layer"] if "data" in layer] == [0.0]


def test_on_paper_pictures_of_pairs_have_one_legend() -> None:
    histogram = charts.score_histogram(scores(), EDGES)
    both = vl_convert.vegalite_to_svg(charts.on_paper(charts.in_columns({"a": histogram, "b": histogram})))
    assert both.count(">dropped in conflict</text>") == 1
    assert ">dropped in conflict</text>" not in vl_convert.vegalite_to_svg({**charts.on_paper(SPECS["curve"])})


def test_shares_add_up() -> None:
    rows = values(SPECS["fates"])
    assert sum(row["share"] for row in rows if row["language"] == "de") == pytest.approx(1.0)
    assert [row["fate"] for row in rows[:3]] == [charts.FATE_NAMES[fate] for fate in FATES]


def test_matrices_are_on_the_scale_of_the_largest_cosine_between_two_languages() -> None:
    before, after = [[1.0, -0.12], [-0.12, 1.0]], [[1.0, 0.31], [0.31, 1.0]]
    assert charts.matrix_scale(before, after) == pytest.approx(0.35)
    assert charts.matrix_scale([[1.0]]) == 0.05
    assert charts.matrix_scale([[1.0, 0.35], [0.35, 1.0]]) == pytest.approx(0.35)
    assert values(charts.conflict_matrix(["a", "b"], before, 0.35)) == [
        {"row": "b", "column": "a", "cosine": -0.12}
    ]


def test_many_languages_have_no_numbers_in_the_cells() -> None:
    many = [f"l{number}" for number in range(charts.LABELLED_CELLS + 1)]
    spec = charts.conflict_matrix(many, [[0.1] * len(many)] * len(many), 0.1)
    assert [layer["mark"]["type"] for layer in spec["layer"]] == ["rect"]
    assert len(values(spec)) == len(many) * (len(many) - 1) / 2


def test_a_forest_holds_the_line_of_no_change() -> None:
    far = charts.forest([Mark("de", 0.9, 0.8, 1.0, "up")], 0.0, "change")
    low, high = far["layer"][2]["encoding"]["x"]["scale"]["domain"]
    assert low < 0.0 < 1.0 < high
    colours = far["layer"][2]["encoding"]["color"]["scale"]
    assert dict(zip(colours["domain"], colours["range"], strict=True))["soft"] == "var(--soft)"
    assert [row["verdict"] for row in values(far)] == ["up"]


def test_the_light_colours_are_the_pages() -> None:
    from pathlib import Path

    style = (Path(charts.__file__).parent / "report.css").read_text()
    light = style[: style.index("@media")]
    for name, colour in charts.LIGHT.items():
        assert f"--{name}: {colour};" in light
