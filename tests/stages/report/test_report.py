from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.data.tables import QUARANTINE, table_of
from congrad_ray.pipeline.order import FIRST, ITERATED, LAST
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.context import Context
from congrad_ray.stages.report.facts import gather
from congrad_ray.stages.report.figures import figures
from congrad_ray.stages.report.html import duration, render, script_hash
from congrad_ray.stages.report.vega import bundle
from pages import ATTACK, Page, words

MakeRun = Callable[..., tuple[RunDirectory, Recipe]]
REPORTED = (*FIRST, *ITERATED)
STEPS = ["prompts", "responses", "judgements", "pairs", "sketches", "selection", "policy", "evaluation"]


def quarantine_of(reason: str) -> pa.Table:
    return table_of([{"row_id": "1", "language": "en", "reason": reason, "detail": ""}], QUARANTINE)


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
    assert facts.selection is not None
    for row in facts.selection.languages[:-1]:
        assert row.pairs == 27 == sum(sum(counts) for counts in row.bins.values())
        expected = summary["per_language"][row.language]
        assert row.kept == expected["kept"]
        assert row.mean == pytest.approx(expected["mean_cosine"])
        assert (row.conflict + row.kept_in_conflict) / 27 == pytest.approx(expected["conflicting"])
    everything = facts.selection.all
    assert f"dropped: {everything.quota} to the quota, {everything.conflict} in conflict" in text
    assert f"{everything.opposing} pairs oppose at least one language" in text
    assert facts.pairs is not None and len(facts.pairs.rows) == facts.pairs.total == 6 * 27
    assert summary["advice"] and all(text.count(f"Advice: {line}") == 1 for line in summary["advice"])
    # Everything a stage's manifest says of its time is in the table.
    assert "1 min 35 s" in text and "48 s" in text


def test_evaluation_is_averaged_per_language(tmp_path: Path, make_run: MakeRun) -> None:
    run, recipe = make_run(tmp_path)
    evaluation = gather(run, REPORTED).iterations[0].evaluation
    assert evaluation is not None
    scores = {row.place.name: row for row in evaluation.scores["greedy"]}
    rates = {row.place.name: row for row in evaluation.rates["M_0"]}
    answers = {row.place.name: row for row in evaluation.answers["greedy"]}
    names = ["ar", "de", "en", "he", "ru", "sw", "all seen", "is"]
    assert list(scores) == list(rates) == list(answers) == names
    for language, after in (("de", 0.5), ("all seen", 0.5), ("is", 0.2)):
        assert scores[language].before == pytest.approx(0.25)
        assert scores[language].after == pytest.approx(after)
        # 1 loss, 2 ties, 4 wins of 7 readable
        found = rates[language].raw
        assert found is not None and found.value == pytest.approx(5 / 7)
        assert found.low is not None and found.high is not None and 0 < found.low < 5 / 7 < found.high <= 1
    assert (rates["all seen"].asked, rates["all seen"].readable, answers["all seen"].count) == (48, 42, 48)
    assert answers["all seen"].before["mean_tokens"] == 10
    assert answers["all seen"].after["mean_tokens"] == 13
    text = words(report_of(run, recipe))
    assert "0.250 → 0.500" in text
    assert "0.250 → 0.200" in text
    assert "+0.250 [+0.250, +0.250]" in text
    assert re.search(
        r"71 % \[\d+ %, \d+ %\] 50 % \[50 %, 50 %\] 12 – 48 42 readable, unreadable 6: truncated 6", text
    )
    assert "10.0 → 13.0" in text


def test_the_headline_prefers_sampled_answers_and_colours_only_what_is_sure(
    tmp_path: Path, make_run: MakeRun
) -> None:
    run, recipe = make_run(tmp_path)
    folder = run.stage("evaluation", 0)
    summary = folder.read_json("summary.json")
    sampled = [{**row, "decoding": "sampled"} for row in summary["score_changes"]]
    for row in sampled:
        row |= {"change": 0.093, "low": 0.077, "high": 0.111}
    for row in summary["score_changes"]:
        row |= {"change": -0.01, "low": -0.03, "high": 0.01}
    folder.write_json("summary.json", {**summary, "score_changes": [*summary["score_changes"], *sampled]})
    page = report_of(run, recipe)
    tile = '<b class="up">+0.093</b><span>true score, sampled answers, seen</span>'
    assert f"{tile}<small>+0.077 to +0.111" in page
    assert "true score, greedy answers, seen" not in page
    # Greedy: below zero, but its interval holds no change.
    assert '<b class="soft">−0.010</b>' in page


def test_an_evaluation_that_could_hardly_be_read_says_so(tmp_path: Path, make_run: MakeRun) -> None:
    run, recipe = make_run(tmp_path)
    folder = run.stage("evaluation", 0)
    summary = folder.read_json("summary.json")
    for rate in summary["win_rates"]:
        rate |= {"prompts": 1, "readable": 1, "unreadable": {"no_verdict": rate["asked"] - 1}}
        rate |= dict.fromkeys(("win_rate", "low", "high", "lc_win_rate", "lc_low", "lc_high")) | {"ties": 0}
    message = "47 of 48 comparisons cannot be read: <A> is longer"
    folder.write_json("summary.json", summary | {"warnings": [message]})
    page = report_of(run, recipe)
    Page(page)
    text = words(page)
    assert "47 of 48 comparisons cannot be read" in text
    assert "&lt;A&gt; is longer" in page
    assert "none win rate against M_0, seen 1 of 48 comparisons could be read" in text
    assert re.search(r"– of 1 prompts 0 – 8 1 readable, unreadable 7: no_verdict 7", text)


@pytest.mark.parametrize("until", STEPS)
def test_a_run_that_stopped_early_shows_what_exists(tmp_path: Path, make_run: MakeRun, until: str) -> None:
    run, recipe = make_run(tmp_path, until=until)
    page = report_of(run, recipe)
    Page(page)
    reached = STEPS.index(until)
    for number, heading in (
        (5, "How the languages pull against each other"),
        (5, "<h3>The pairs</h3>"),
        (5, "What the dropped pairs have in common"),
        (6, ">Training<"),
        (7, "What came of it"),
    ):
        assert (heading in page) == (reached >= number)


def test_a_run_that_has_only_a_recipe(tmp_path: Path, make_run: MakeRun) -> None:
    _, recipe = make_run(tmp_path / "other", until="prompts")
    assert "No iteration has begun yet" in report_of(RunDirectory.open(tmp_path / "new"), recipe)


def test_hostile_text_stays_text(tmp_path: Path, make_run: MakeRun) -> None:
    texts = {"en": (ATTACK, ATTACK + " good", ATTACK + " bad"), "de": ("Frage", "gut", "schlecht")}
    run, recipe = make_run(tmp_path, texts=texts, name="</title><script>alert(3)</script>")
    (run.stage("policy", 0)).quarantine.write_table("part.parquet", quarantine_of(ATTACK))
    page = report_of(run, recipe)
    found = Page(page)
    elements = found.elements
    assert not [tag for tag, _ in elements if tag in ("img", "iframe", "link", "object")]
    assert not [key for _, attributes in elements for key in attributes if key.startswith("on")]
    # The page's own two scripts run, and no other; the rest are data.
    scripts = [attributes for tag, attributes in elements if tag == "script"]
    assert [attributes.get("type") for attributes in scripts].count(None) == 2
    assert {attributes.get("type") for attributes in scripts} == {None, "application/json"}
    assert "&lt;script&gt;alert(3)&lt;/script&gt;" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page  # the reason in quarantine
    pairs = json.loads(found.texts["0-pairs"])
    at = pairs["columns"].index("prompt")
    assert sum(row[at] == ATTACK for row in pairs["rows"]) == 27
    data = page[page.index('id="0-pairs"') :]
    assert "<" not in data[data.index(">") + 1 : data.index("</script>")]


def test_only_the_pages_own_scripts_may_run(tmp_path: Path, make_run: MakeRun) -> None:
    found = Page(report_of(*make_run(tmp_path, until="pairs")))
    policy = next(
        attributes["content"]
        for tag, attributes in found.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in rules["script-src"]
    assert rules["script-src"].split() == [f"'{script_hash(script)}'" for script in found.scripts]
    assert found.scripts[0] == bundle()
    assert "\r" not in bundle() and "\0" not in bundle()  # a browser would hash another text


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path, make_run: MakeRun) -> None:
    page = report_of(*make_run(tmp_path))
    for _, attributes in Page(page).elements:
        assert not {"src", "href", "srcset", "data"} & attributes.keys()
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page


def test_several_iterations_newest_first(tmp_path: Path, make_run: MakeRun) -> None:
    run, recipe = make_run(tmp_path)
    run.stage("responses", 1).write_json("_started.json", {"fingerprint": "x"})
    text = words(report_of(run, recipe))
    assert text.index("Iteration 1") < text.index("Iteration 0")
    assert "1 / responses not finished" in text


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
    found = [gather(run, REPORTED) for _ in range(2)]
    pages = [render(facts, figures(facts), steps, recipe, "") for facts in found]
    assert pages[0] == pages[1]


def test_what_is_written_beside_the_page(tmp_path: Path, make_run: MakeRun) -> None:
    run, recipe = make_run(tmp_path)
    stale = run.stage("report", None) / "figures"
    stale.write_bytes("9-gone.svg", b"<svg/>")
    report_of(run, recipe)
    figures_of = {path.rpartition("/")[2] for path in stale.files(".svg")}
    assert figures_of == {
        "0-fates.svg",
        "0-histograms.svg",
        "0-matrix-before.svg",
        "0-matrix-after.svg",
        "0-traits.svg",
        "0-training.svg",
        "0-scores.svg",
        "0-win-rates-0.svg",
    }
    picture = stale.read_bytes("0-histograms.svg").decode()
    assert picture.startswith("<svg") and "var(--" not in picture
    for language in ("ar", "sw"):
        assert f">{language}</text>" in picture
    listed = {path.rpartition("/")[2] for path in (run.stage("report", None) / "tables").files(".csv")}
    assert {"selection.csv", "true_scores.csv", "win_rates.csv", "stages.csv", "training.csv"} <= listed
    assert run.read_bytes("model_card.md").startswith(b"---\n")
    assert b"selected.parquet" in run.read_bytes("dataset_card.md")
