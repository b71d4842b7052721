from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.pipeline.order import FIRST, ITERATED, LAST
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.context import Context
from congrad_ray.stages.report.facts import gather
from congrad_ray.stages.report.html import duration, render
from congrad_ray.stages.report.pictures import conflict_matrix, histogram, line_chart
from pages import Page, words

MakeRun = Callable[..., tuple[RunDirectory, Recipe]]
REPORTED = (*FIRST, *ITERATED)
STEPS = ["prompts", "responses", "judgements", "pairs", "sketches", "selection", "policy", "evaluation"]


def report_of(run: RunDirectory, recipe: Recipe) -> str:
    LAST[-1].run(Context(recipe, Profile(name="test"), run, 0, run.stage("report", None)))
    return run.read_bytes("report.html").decode()


def test_numbers_are_those_of_the_tables(tmp_path: Path, make_run: MakeRun) -> None:
    run, recipe = make_run(tmp_path)
    text = words(report_of(run, recipe))
    facts = gather(run, REPORTED).iterations[0]
    # 30 prompts, 4 responses each, every ninth prompt without a pair, half of the pairs kept per language.
    assert facts.funnel["ar"]["prompts"] == 30
    assert facts.funnel["ar"]["responses"] == 120
    assert facts.funnel["ar"]["readable"] == 120 - sum((r + s) % 11 == 0 for r in range(30) for s in range(4))
    assert facts.funnel["ar"]["pairs"] == facts.funnel["ar"]["sketched"] == 27
    summary = run.stage("selection", 0).read_json("summary.json")
    assert facts.funnel["ar"]["kept"] == summary["per_language"]["ar"]["kept"]
    kept = sum(row["kept"] for row in summary["per_language"].values())
    assert f"{kept} pairs kept" in text
    between = [summary["cosine_before"][i][j] for i in range(6) for j in range(i)]
    assert f"{sum(v < 0 for v in between)} of 15 pairs of languages in conflict" in text
    for histogram_facts in facts.histograms:
        assert sum(histogram_facts.kept) + sum(histogram_facts.dropped) == 27
        expected = summary["per_language"][histogram_facts.language]
        assert histogram_facts.mean == pytest.approx(expected["mean_cosine"])
        assert histogram_facts.conflicting == pytest.approx(expected["conflicting"])
    best, worst = facts.samples[0]
    assert best.kept and not worst.kept and best.cosine > worst.cosine
    assert f"{facts.metrics[-1]['loss']:.3f} final training loss" in text


def test_evaluation_is_averaged_per_language(tmp_path: Path, make_run: MakeRun) -> None:
    run, recipe = make_run(tmp_path)
    rows = {row.language: row for row in gather(run, REPORTED).iterations[0].evaluation}
    assert list(rows) == ["ar", "de", "en", "he", "ru", "sw", "all seen", "is"]
    for language, after in (("de", 0.5), ("all seen", 0.5), ("is", 0.2)):
        assert rows[language].score_before == pytest.approx(0.25)
        assert rows[language].score_after == pytest.approx(after)
        # 1 loss, 2 ties, 4 wins of 7 readable
        assert rows[language].win_rate == pytest.approx(5 / 7)
        assert 0 < rows[language].win_low < 5 / 7 < rows[language].win_high <= 1
    assert (rows["all seen"].asked, rows["all seen"].readable, rows["all seen"].prompts) == (48, 42, 48)
    assert (rows["all seen"].tokens_before, rows["all seen"].tokens_after) == (10, 13)
    text = words(report_of(run, recipe))
    assert "0.250 → 0.500" in text
    assert "0.250 → 0.200" in text
    assert "+0.250 [+0.250, +0.250]" in text
    assert re.search(r"71 % \[\d+ %, \d+ %\] 48 42 readable, unreadable 6: truncated 6", text)
    assert "10.0 → 13.0" in text


def test_an_evaluation_that_could_hardly_be_read_says_so(tmp_path: Path, make_run: MakeRun) -> None:
    run, recipe = make_run(tmp_path)
    folder = run.stage("evaluation", 0)
    summary = folder.read_json("summary.json")
    for rate in summary["win_rates"]:
        rate |= {"prompts": 1, "readable": 1, "unreadable": {"no_verdict": rate["asked"] - 1}}
        rate |= {"win_rate": None, "low": None, "high": None}
    message = "47 of 48 comparisons cannot be read: <A> is longer"
    folder.write_json("summary.json", summary | {"warnings": [message]})
    page = report_of(run, recipe)
    Page(page)
    text = words(page)
    assert "47 of 48 comparisons cannot be read" in text
    assert "&lt;A&gt; is longer" in page
    assert "none win rate 1 of 48 comparisons could be read" in text
    assert "– of 1 prompts 8 1 readable, unreadable 7: no_verdict 7" in text


@pytest.mark.parametrize("until", STEPS)
def test_a_run_that_stopped_early_shows_what_exists(tmp_path: Path, make_run: MakeRun, until: str) -> None:
    run, recipe = make_run(tmp_path, until=until)
    page = report_of(run, recipe)
    Page(page)
    reached = STEPS.index(until)
    for number, heading in (
        (5, "How the languages pull against each other"),
        (5, "Pairs that were kept and dropped"),
        (6, ">Training<"),
        (7, "What came of it"),
    ):
        assert (heading in page) == (reached >= number)


def test_a_run_that_has_only_a_recipe(tmp_path: Path, make_run: MakeRun) -> None:
    _, recipe = make_run(tmp_path / "other", until="prompts")
    assert "No iteration has begun yet" in report_of(RunDirectory.open(tmp_path / "new"), recipe)


def test_hostile_text_stays_text(tmp_path: Path, make_run: MakeRun) -> None:
    attack = '</dd></style><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}" onclick="x'
    texts = {"en": (attack, attack + " good", attack + " bad"), "de": ("Frage", "gut", "schlecht")}
    run, recipe = make_run(tmp_path, texts=texts, name="</title><script>alert(3)</script>")
    page = report_of(run, recipe)
    elements = Page(page).elements
    assert not [tag for tag, _ in elements if tag in ("script", "img", "iframe", "link", "object")]
    assert not [key for _, attributes in elements for key in attributes if key.startswith("on")]
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3
    assert "{{ 7 * 7 }}" in page
    # Pictures take language tags from the tables, which may hold anything as well.
    picture = str(conflict_matrix(["<b>", '"x'], [[1.0, -0.5], [-0.5, 1.0]], "<i>"))
    assert "<b>" not in picture and "<i>" not in picture
    Page(picture)


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path, make_run: MakeRun) -> None:
    page = report_of(*make_run(tmp_path))
    for _, attributes in Page(page).elements:
        assert not {"src", "href", "srcset", "data"} & attributes.keys()
    assert "url(" not in page and "@import" not in page
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page


def test_samples_know_their_language_and_direction(tmp_path: Path, make_run: MakeRun) -> None:
    elements = Page(report_of(*make_run(tmp_path))).elements
    arabic = [attributes for tag, attributes in elements if tag == "dd" and attributes.get("lang") == "ar"]
    assert len(arabic) == 6
    assert all(attributes["dir"] == "auto" for attributes in arabic)


def test_several_iterations_newest_first(tmp_path: Path, make_run: MakeRun) -> None:
    run, recipe = make_run(tmp_path)
    run.stage("responses", 1).write_json("_started.json", {"fingerprint": "x"})
    text = words(report_of(run, recipe))
    assert text.index("Iteration 1") < text.index("Iteration 0")
    assert "1 / responses not finished" in text


def test_pictures_of_odd_data() -> None:
    assert "nan" not in str(line_chart([1, 2, 3], [1.0, float("nan"), 2.0], "loss"))
    assert "nan" not in str(line_chart([5], [0.7], "one point"))
    assert "nan" not in str(line_chart([1, 2], [0.0, 0.0], "flat", at_zero=True))
    assert "rect" not in str(histogram([0] * 4, [0] * 4, 0.5, "empty"))
    many = [f"l{number}" for number in range(30)]
    assert str(conflict_matrix(many, [[0.1] * 30] * 30, "many")).count("<rect") == 900


def test_durations() -> None:
    assert [duration(s) for s in (0.44, 12.3, 85, 3600, 9000)] == [
        "0.4 s",
        "12 s",
        "1 min 25 s",
        "1 h 0 min",
        "2 h 30 min",
    ]


def test_render_is_the_same_twice(tmp_path: Path, make_run: MakeRun) -> None:
    run, recipe = make_run(tmp_path)
    steps = [stage.step for stage in REPORTED if stage.step]
    pages = [render(gather(run, REPORTED), steps, recipe) for _ in range(2)]
    assert pages[0] == pages[1]
