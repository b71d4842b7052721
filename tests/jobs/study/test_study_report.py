"""The study's page: its numbers, its pictures, missing parts, and texts that stay texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pages import Page, words
from study.analysis import Estimate, differences, groups, selection_summaries, table
from study.report import (
    KeepCurve,
    Mark,
    auc_plots,
    exact_checks,
    forest_plots,
    interval_plot,
    keep_plot,
    keep_plots,
    render_report,
    verdict,
    write_report,
)

Row = dict[str, Any]


def cell(seed: int, strategy: str, seen: float, keep: float = 0.5, variant: str = "inverted", **more: Any) -> Row:
    row = {"kind": "cell", "seed": seed, "variant": variant, "strategy": strategy, "keep": keep}
    row |= {"learning_rate": 1e-4, "iterations": 1, "pairs": 700, "kept": int(700 * keep), "steps": 40}
    row |= {"seen": seen, "unseen": seen - 0.1, "held_out": 0.6, "held_out_unseen": 0.5, "tokens": 17.25}
    return row | {"by_language": {"en": seen}, "seconds": 30.0} | more


def start(seed: int) -> Row:
    return cell(seed, "start", 0.7, 1.0, "", learning_rate=0.0, pairs=0, kept=0, steps=0)


def selection(seed: int, strategy: str, auc: float | None, keep: float = 0.5, variant: str = "inverted") -> Row:
    row = {"kind": "selection", "seed": seed, "variant": variant, "strategy": strategy, "keep": keep}
    row |= {"pairs": 700, "kept": 350, "better_kept": 0.71, "better_all": 0.6, "auc": auc, "auc_biased": None}
    row |= {"auc_healthy": None, "conflicting_pairs": 0.2, "cosine_before": 0.3, "cosine_after": 0.5}
    return row | {"negative_before": 0.1, "negative_after": 0.0}


def exact(seed: int, rank_correlation: float, common: float, error: float) -> Row:
    row = {"kind": "exact", "seed": seed, "variant": "inverted", "strategy": "congrad", "keep": 0.5}
    return row | {"rank_correlation": rank_correlation, "kept_in_common": common, "error": error}


def study() -> list[Row]:
    rows: list[Row] = []
    for seed, gain in ((11, 0.010), (12, 0.014), (13, 0.012)):
        rows += [start(seed), cell(seed, "all", 0.8, 1.0), cell(seed, "random", 0.79)]
        rows += [cell(seed, "congrad", 0.8 + gain), cell(seed, "congrad", 0.8 - gain, 0.25)]
        rows += [selection(seed, "congrad", 0.7 + gain), selection(seed, "congrad", 0.7 + gain, 0.25)]
        rows += [selection(seed, "all", None, 1.0), exact(seed, 0.99 + gain / 2, 0.98 - gain, gain / 2)]
    return rows


def marks(picture: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(picture).findall("circle")


def test_the_page_has_the_numbers() -> None:
    text = words(render_report(study(), "recipe:\n  name: study"))
    assert "3 seeds a world and a starting model each" in text
    assert "12 cells trained models; 3 starting models" in text
    assert "6 min 0 s of training and sampling" in text
    # +-4.303 * 0.002 / sqrt(3) = 0.00497
    assert "congrad 50 % 3 350 40 0.812 +0.012 (+0.007..+0.017) +0.022 (+0.017..+0.027)" in text
    assert "congrad 25 % 3 175 40 0.788 −0.012 (−0.017..−0.007) – " in text
    assert "start – 3 0 0 0.700" in text
    assert "0.712 (0.707..0.717)" in text
    assert "inverted congrad 50 % 3 0.9960 (0.9950) 96.8 % (96.6 %) 0.0060 (0.0070)" in text
    assert "recipe: name: study" in text
    assert "inverted, learning rate 1e-4" in text


def test_intervals_are_counted() -> None:
    # `all` against `random` is not compared (other keep ratio), nor is congrad at 25 %: 3 strategies against all,
    # 1 against random, on three measures. The held-out scores are all the same: an interval from 0 to 0 holds 0.
    page = words(render_report(study()))
    assert "of the 12 intervals of differences drawn below 8 leave out zero, and about 1 would" in page


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [start(1)],
        [cell(1, "all", 0.5, 1.0)],
        [cell(1, "congrad", 0.5)],
        [start(1), cell(1, "all", 0.5, 1.0), cell(1, "congrad", 0.6), cell(1, "congrad", 0.6, 0.25)],
        [selection(1, "congrad", 0.7)],
        [selection(1, "all", None)],
        [{**selection(1, "random", 0.5), "cosine_before": None, "negative_before": None, "better_kept": None}],
        [exact(1, 0.9, 0.9, 0.1)],
        [{**cell(1, "congrad", 0.5), "unseen": None, "held_out_unseen": None, "tokens": None}],
        [cell(1, "all", 0.5, 1.0), cell(1, "congrad", 0.6), cell(2, "congrad", 0.7)],
    ],
)
def test_missing_parts(rows: list[Row]) -> None:
    page = render_report(rows)
    Page(page)
    kinds = {row["kind"] for row in rows}
    trained = any(row["kind"] == "cell" and row["strategy"] != "start" for row in rows)
    assert ("There are no results yet" in page) == (not trained and not kinds & {"selection", "exact"})
    assert (">Scores</h3>" in page) == trained
    assert ("before any training</h2>" in page) == ("selection" in kinds)
    assert ("Do the scores find" in page) == any(row.get("auc") is not None for row in rows)
    assert ("Sketches against exact" in page) == ("exact" in kinds)
    assert "The protocol" not in page
    assert "nan" not in words(page).split()


def test_texts_stay_texts() -> None:
    attack = '</pre></style><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}" onclick="x'
    rows = [cell(seed, name, 0.5 + seed / 9, keep, attack) for seed in (1, 2) for name, keep in (("all", 1.0),)]
    rows += [cell(seed, attack, 0.6, keep, attack) for seed in (1, 2) for keep in (0.25, 0.5)]
    rows += [
        selection(1, attack, 0.6, variant=attack),
        {**exact(1, 1, 1, 0), "variant": attack, "strategy": attack},
    ]
    page = render_report(rows, attack)
    elements = Page(page).elements
    assert not [tag for tag, _ in elements if tag in ("script", "img", "iframe", "link", "object")]
    assert not [key for _, attributes in elements for key in attributes if key.startswith("on")]
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 10
    assert "{{ 7 * 7 }}" in page and f"<pre>{'&lt;/pre&gt;'}" in page


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    write_report(study(), tmp_path / "new" / "study.html", "name: é")
    page = (tmp_path / "new" / "study.html").read_text(encoding="utf-8")
    for _, attributes in Page(page).elements:
        assert not {"src", "href", "srcset", "data"} & attributes.keys()
    assert "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page and "name: é" in page


def test_steps_are_distinguished() -> None:
    more = [cell(11, "mean", 0.8, steps=80)]
    assert "same number of optimiser steps" in words(render_report(study()))
    assert "numbers of optimiser steps differ" in words(render_report(study() + more))


def test_forest_plots_share_a_scale_and_tell_their_numbers() -> None:
    (group,) = groups(study())
    found = {
        (measure, baseline): str(picture) for measure, baseline, picture in forest_plots(table(study(), group))
    }
    assert list(found) == [(m, b) for m in ("seen", "unseen", "held_out") for b in ("all", "random")]
    picture = ElementTree.fromstring(found["seen", "all"])
    names = [t.text for t in picture.findall("text") if t.get("text-anchor") == "end"]
    assert names == ["random, 50 %", "congrad, 25 %", "congrad, 50 %"]
    tips = [circle.findtext("title") for circle in picture.findall("circle")]
    assert tips[2] == ("congrad, 50 % kept, against all: +0.012 (+0.007..+0.017), higher in 3 of 3 seeds")
    assert [c.get("class") for c in picture.findall("circle")] == ["point down", "point down", "point up"]
    # Dots lie on one scale: differences of -0.010, -0.012 and +0.012 around the line at zero.
    zero = float(next(e for e in picture.findall("line") if e.get("class") == "zero").get("x1", "nan"))
    places = [float(c.get("cx", "nan")) - zero for c in picture.findall("circle")]
    assert places[0] / places[2] == pytest.approx(-10 / 12, rel=1e-3)
    assert places[1] == pytest.approx(-places[2], rel=1e-3)
    only = differences(study(), "random", "seen")
    assert [d.strategy for d in only] == ["congrad"]
    assert len(marks(found["seen", "random"])) == 1
    # The keep ratio is named where there are several.
    fewer = [row for row in study() if row["keep"] != 0.25]
    assert "50 %<" not in str(forest_plots(table(fewer, group))[0][2])


def test_a_single_seed_is_hollow_and_has_no_interval() -> None:
    rows = [cell(1, "all", 0.5, 1.0), cell(1, "congrad", 0.6)]
    (picture, *_) = [p for m, b, p in forest_plots(table(rows, groups(rows)[0])) if (m, b) == ("seen", "all")]
    (dot,) = marks(str(picture))
    assert dot.get("class") == "point soft hollow"
    assert 'class="span' not in str(picture)
    assert "+0.100 (1 seed)" in str(picture)


def test_auc_by_variant() -> None:
    rows = [selection(s, "mean", 0.6 + s / 100, variant=v) for s in (1, 2) for v in ("plain", "inverted")]
    rows += [selection(s, "congrad", 0.4, keep, "plain") for s in (1, 2) for keep in (0.25, 0.5)]
    rows += [selection(1, "random", 0.5, 0.25, "plain"), selection(2, "random", 0.52, 0.5, "plain")]
    plots = dict(auc_plots(selection_summaries(rows)))
    assert list(plots) == ["plain", "inverted"]
    picture = ElementTree.fromstring(str(plots["plain"]))
    names = [t.text for t in picture.findall("text") if t.get("text-anchor") == "end"]
    # A line for each keep ratio only where they were seen in different seeds.
    assert names == ["random, 25 %", "random, 50 %", "congrad", "mean"]
    classes = [c.get("class") for c in picture.findall("circle")]
    assert classes == ["point soft hollow", "point soft hollow", "point down", "point up"]
    assert auc_plots(selection_summaries([selection(1, "all", None)])) == []


def test_keep_plots_where_there_are_several_ratios() -> None:
    (group,) = groups(study())
    plots = keep_plots(table(study(), group))
    assert [(baseline, strategy) for baseline, strategy, _ in plots] == [("all", "congrad")]
    quarter, half = marks(str(plots[0][2]))
    assert float(quarter.get("cx", "nan")) < float(half.get("cx", "nan"))
    assert float(quarter.get("cy", "nan")) > float(half.get("cy", "nan"))  # lower down is a lower score
    assert "How much is kept" in render_report(study())
    fewer = [row for row in study() if row["keep"] != 0.25]
    assert keep_plots(table(fewer, group)) == []
    assert "How much is kept" not in render_report(fewer)


def test_exact_checks_tell_the_worst_seed() -> None:
    (found,) = exact_checks([exact(1, 0.9, 0.8, 0.01), exact(2, 0.7, 1.0, 0.03), *study()[:3]])
    assert (found.seeds, found.rank_correlation_worst, found.in_common_worst, found.error_worst) == (
        2,
        0.7,
        0.8,
        0.03,
    )
    assert (found.rank_correlation, found.in_common, found.error) == pytest.approx((0.8, 0.9, 0.02))


def test_verdict() -> None:
    def between(low: float | None, high: float | None) -> Estimate:
        return Estimate(seeds=3, mean=0.0, low=low, high=high)

    assert [verdict(between(*ends)) for ends in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (0.0, 0.0))] == [
        "up",
        "down",
        "soft",
        "soft",
    ]
    assert verdict(between(0.4, 0.45), 0.5) == "down"
    assert verdict(between(None, None)) == verdict(None) == "soft"


def test_pictures_of_odd_data() -> None:
    flat = Estimate(seeds=2, mean=0.0, low=0.0, high=0.0)
    assert len(marks(str(interval_plot([Mark("a", flat, "0", "a")], 0.0, (0.0, 0.0), "flat")))) == 1
    assert marks(str(interval_plot([], 0.5, (0.5, 0.5), "empty"))) == []
    same = differences([cell(1, "all", 0.5, 1.0), cell(1, "a", 0.5), cell(1, "a", 0.5, 0.25)], "all", "seen")
    picture = str(keep_plot(KeepCurve("a", same), (0.0, 0.0), "flat"))
    assert len(marks(picture)) == 2 and "nan" not in picture
