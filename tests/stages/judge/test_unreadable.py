"""Judgements that cannot be read: counted, reported, and when they are too many."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.data.tables import FAILURE, FAILURE_FIELD, row_id, table_of
from congrad_ray.modeling.source import ModelSource
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError
from congrad_ray.runtime.context import Context
from congrad_ray.runtime.engines import Completion, Request, Task
from congrad_ray.stages.generate.schema import RESPONSES
from congrad_ray.stages.judge import stage as judge
from congrad_ray.stages.judge.schema import JUDGEMENT_SAMPLES
from congrad_ray.stages.judge.unreadable import Tally, by_reason, counts_by_language, explain, keep_failed


def test_a_judge_that_is_never_understood_is_known_after_twenty_judgements() -> None:
    tally = Tally({"en": 3000})
    tally.add("en", 19, 19)
    assert tally.share() < 0.01
    tally.add("en", 1, 1)
    assert tally.share() == 1.0
    tally.add("en", 30, 0)
    assert tally.share() == pytest.approx(20 / 50)


def test_one_language_that_comes_first_says_nothing_of_the_others() -> None:
    tally = Tally({tag: 100 for tag in ("th", "en", "de", "fr")})
    tally.add("th", 100, 100)
    assert tally.share() == 0.25
    tally.add("en", 20, 20)
    assert tally.share() == 0.5
    tally.add("de", 20, 10)
    assert tally.share() == pytest.approx(0.625)


def test_few_judgements_are_judged_by_when_they_are_all_there() -> None:
    tally = Tally({"en": 4, "de": 4})
    tally.add("en", 4, 4)
    assert tally.share() == 0.5
    tally.add("de", 4, 1)
    assert tally.share() == pytest.approx(5 / 8)


def test_counts_add_up() -> None:
    rows = [("en", None)] * 5 + [("en", "no_score")] * 2 + [("en", "truncated")] + [("de", "truncated")] * 3
    table = pa.table({"language": [row[0] for row in rows], "unreadable": [row[1] for row in rows]})
    assert counts_by_language(table) == {
        "de": {"asked": 3, "readable": 0, "unreadable": {"truncated": 3}},
        "en": {"asked": 8, "readable": 5, "unreadable": {"no_score": 2, "truncated": 1}},
    }
    assert by_reason({"no_score": 2, "truncated": 1}) == "3: no_score 2, truncated 1"
    assert by_reason({}) == "0"


def test_what_is_reported_has_counts_reasons_examples_and_ways_out() -> None:
    rows = [{"unreadable": None, "output": "Score: 4"}, {"unreadable": "truncated", "output": None}]
    rows += [
        {"unreadable": "no_score", "output": f"{'x' * 500}\nfine \x1b[31m{number % 5}"} for number in range(20)
    ]
    text = explain("judgements", rows, {"no_score": "take another judge"})
    assert text.startswith("21 of 22 judgements cannot be read:\n  no_score: 20, such as:\n")
    assert text.count("/ fine") == 3 and "x" * 200 not in text and "\x1b" not in text
    assert "-> take another judge" in text
    assert "truncated: 1" in text


def test_a_judgement_that_failed_is_unreadable_and_stays() -> None:
    row = {name: None for name in JUDGEMENT_SAMPLES.names}
    row |= {name: "x" for name in ("judgement_id", "response_id", "prompt_id", "language")}
    failed = {**row, FAILURE: {"reason": "prompt_too_long", "detail": "2 + 3 > 4"}}
    nullable = [field.with_nullable(True) for field in JUDGEMENT_SAMPLES]
    batch = table_of([failed], pa.schema([*nullable, FAILURE_FIELD]))
    (kept,) = keep_failed(batch, JUDGEMENT_SAMPLES).to_pylist()
    assert (kept["unreadable"], kept["output"], kept[FAILURE]) == ("prompt_too_long", "2 + 3 > 4", None)


def _recipe(model: str, **sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "test",
        "model": {"name": model, "dtype": "float32", "max_length": 2048},
        "prompts": {"languages": ["en", "de"]},
        "generate": {"max_tokens": 16},
        "evaluate": {"max_tokens": 16},
        "judge": {"samples": 1, "max_tokens": 32},
    }
    return Recipe.model_validate(values | sections)


def _context(tmp_path: Path, recipe: Recipe) -> Context:
    """A run with 40 responses in two languages."""
    run = RunDirectory.open(tmp_path / "run")
    rows = [
        {
            "response_id": f"r{number}",
            "prompt_id": f"p{number}",
            "language": ("en", "de")[number % 2],
            "prompt": [{"role": "user", "content": "?"}],
            "sample": 0,
            "seed": 0,
            "response": "!",
            "prompt_tokens": 1,
            "response_tokens": 1,
            "truncated": False,
        }
        for number in range(40)
    ]
    run.stage("responses", 0).write_table("part-0.parquet", table_of(rows, RESPONSES))
    return Context(recipe, Profile(name="local"), run, 0, run.stage("judgements", 0))


# What versions wrote before there could be several judges.
OF_ONE_JUDGE = pa.schema([field for field in JUDGEMENT_SAMPLES if field.name not in ("judge", "compared_with")])


def _write_samples(context: Context, unreadable: Callable[[int], str | None]) -> None:
    rows = [
        {
            "judgement_id": row_id("judgement", f"r{number}", 0),
            "response_id": f"r{number}",
            "prompt_id": f"p{number}",
            "language": ("en", "de")[number % 2],
            "score": None if unreadable(number) else 3.0,
            "mass": None,
            "output": f"I like it. {number}" if unreadable(number) else "Score: 3",
            "unreadable": unreadable(number),
            "prompt_tokens": 9,
            "output_tokens": 9,
        }
        for number in range(40)
    ]
    (context.output / "samples").write_table("part-0.parquet", table_of(rows, OF_ONE_JUDGE))


def test_the_judge_stage_stops_where_most_is_unreadable_and_says_why(tmp_path: Path) -> None:
    context = _context(tmp_path, _recipe("none"))
    _write_samples(context, lambda number: "truncated" if number < 4 else "no_score" if number < 30 else None)
    with pytest.raises(RunDirectoryError) as error:
        judge.run(context)
    for message in (
        "30 of 40 judgements cannot be read",
        "no_score: 26, such as:",
        "I like it. 4",
        "judge.method: expected_score",
        "truncated: 4, such as:",
        "raise judge.max_tokens (32)",
        "limits.unreadable_share (0.5)",
    ):
        assert message in str(error.value)
    assert "temperature" not in str(error.value)


def test_with_a_higher_limit_it_goes_on_and_its_counters_add_up(
    tmp_path: Path, warned: Callable[[], list[str]]
) -> None:
    recipe = _recipe("none", limits={"unreadable_share": 0.8})
    context = _context(tmp_path, recipe)
    _write_samples(context, lambda number: "no_score" if number % 2 or number < 10 else None)
    counters = judge.run(context).counters
    assert counters["judgements"] == {
        "de": {"asked": 20, "readable": 0, "unreadable": {"no_score": 20}, "mean_score": None, "mean_mass": None},
        "en": {"asked": 20, "readable": 15, "unreadable": {"no_score": 5}, "mean_score": 3.0, "mean_mass": None},
    }
    assert any("de: 0 of 20 judgements can be read (20: no_score 20)" in line for line in warned())
    assert judge.settings(recipe, 0) == judge.settings(_recipe("none"), 0)  # a limit changes no result


def test_judgements_that_were_written_twice_count_once(tmp_path: Path) -> None:
    context = _context(tmp_path, _recipe("none"))
    _write_samples(context, lambda number: None)
    samples = context.output / "samples"
    again = samples.read_table().slice(5, 10)
    samples.write_table("part-1.parquet", again)
    outcome = judge.run(context)
    assert outcome.rows == 40
    assert [row["asked"] for row in outcome.counters["judgements"].values()] == [20, 20]
    for folder in (samples, context.output):
        ids = folder.read_table()["response_id"].to_pylist()
        assert len(ids) == len(set(ids)) == 40


class Asked(Exception):
    """Ends a stage where it would ask its judge."""


def _how_it_asks(context: Context, monkeypatch: pytest.MonkeyPatch) -> tuple[Task, int]:
    """The judge stage's task for the engine, which is not started, and the judge's longest sequence."""
    found: list[tuple[Task, int]] = []

    def complete(
        dataset: Any, rows: int, source: ModelSource, profile: Any, task: Task, notify: Any, pool: str
    ) -> None:
        found.append((task, source.settings.max_length))
        raise Asked

    monkeypatch.setattr(judge, "ask", complete)
    monkeypatch.setattr(judge, "read_requests", lambda *arguments: None)
    monkeypatch.setattr(Context, "notify", lambda context: None)
    with pytest.raises(Asked):
        judge.run(context)
    return found[0]


ROW = {"judgement_id": "j", "response_id": "r", "prompt_id": "p", "language": "de"}


@pytest.mark.parametrize(
    ("text", "truncated", "score", "why"),
    [
        ("Gut.\nPunktzahl: 4", False, 4.0, None),
        ("Punktzahl: 1 für Relevanz\nPunktzahl: 4", False, None, "no_score"),
        ("Score: 1\nSo far so good, and", True, None, "truncated"),
        ("Gut.\nPunktzahl: 4", True, None, "truncated"),
        ("Gut.", False, None, "no_score"),
    ],
)
def test_a_judgement_that_is_cut_off_is_not_read(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    truncated: bool,
    score: float | None,
    why: str | None,
) -> None:
    task, _ = _how_it_asks(_context(tmp_path, _recipe(str(tiny_model))), monkeypatch)
    row = task.answer(ROW, Completion(text, 10, 5, truncated))
    assert (row["score"], row["unreadable"]) == (score, why)


def test_expected_score_is_read_however_little_the_score_tokens_have(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = _context(tmp_path, _recipe(str(tiny_model), judge={"method": "expected_score"}))
    task, _ = _how_it_asks(context, monkeypatch)
    logprobs = {token: -12.0 for token in task.scored_tokens}
    row = task.answer(ROW, Completion("4", 10, 1, True, logprobs))  # one token of one: cut off, as wanted
    assert (row["score"], row["unreadable"]) == (2.5, None)
    assert 0 < row["mass"] < 1e-4
    judging = {"method": "expected_score", "min_probability_mass": 0.1}
    task, _ = _how_it_asks(_context(tmp_path, _recipe(str(tiny_model), judge=judging)), monkeypatch)
    row = task.answer(ROW, Completion("4", 10, 1, True, logprobs))
    assert (row["score"], row["unreadable"]) == (None, "low_mass")


def test_the_judge_has_a_length_of_its_own(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, max_length = _how_it_asks(_context(tmp_path, _recipe(str(tiny_model))), monkeypatch)
    assert (max_length, task.length_setting) == (2048, "model.max_length")
    recipe = _recipe(str(tiny_model), judge={"max_length": 4096})
    task, max_length = _how_it_asks(_context(tmp_path, recipe), monkeypatch)
    assert (max_length, task.length_setting) == (4096, "judge.max_length")
    assert isinstance(
        task.request({**ROW, "prompt": [{"role": "user", "content": "?"}], "response": "!"}), Request
    )


def test_a_rubric_that_leaves_no_room_is_reported_before_any_engine(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(str(tiny_model), judge={"max_length": 900, "max_tokens": 100})
    with pytest.raises(
        ValueError, match=r"rubric of \d+ tokens \(de\).*no room for a prompt in judge.max_length \(900"
    ):
        judge.run(_context(tmp_path, recipe))
