"""The evaluate stage with real engines: true scores, comparisons in both orders, and a later iteration."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from congrad_ray.cli.display import console, show_figures
from congrad_ray.config.endpoint import Endpoint
from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.data.tables import prompt_id, table_of
from congrad_ray.modeling.source import ModelSource
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError
from congrad_ray.runtime.context import Context
from congrad_ray.runtime.engines import Completion, Task
from congrad_ray.stages.baseline.stage import STAGE as BASELINE
from congrad_ray.stages.evaluate import comparing
from congrad_ray.stages.evaluate.comparing import Baseline, compare, cost_of, judge_of, warnings_of
from congrad_ray.stages.evaluate.figures import evaluation
from congrad_ray.stages.evaluate.schema import ANSWERS, COMPARISONS
from congrad_ray.stages.evaluate.stage import STAGE, run
from congrad_ray.stages.evaluate.statistics import win_rates
from congrad_ray.stages.judge.pairwise import ORDERS
from congrad_ray.stages.prompts.schema import PROMPTS
from congrad_ray.world.score import true_score
from congrad_ray.world.tasks import world_prompts
from judge_server import Reply, chat, serving


def _row(language: str, content: str, split: str, seen: bool, task: str | None) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    values = {"prompt_id": prompt_id(language, messages), "language": language, "prompt": messages}
    return {**values, "split": split, "seen": seen, "task": task}


def _write_prompts(directory: RunDirectory, rows: list[dict[str, Any]]) -> None:
    folder = directory.stage("prompts", None)
    folder.begin("fingerprint", False, "prompts")
    folder.write_table("part-0.parquet", table_of(rows, PROMPTS))
    folder.commit("prompts", None, "fingerprint", {}, {}, len(rows), 0.0, {})


def _commit_policy(directory: RunDirectory, iteration: int, model: Path) -> None:
    folder = directory.stage("policy", iteration)
    folder.begin(f"policy-{iteration}", False, "train")
    shutil.copytree(model, folder.path, dirs_exist_ok=True)
    folder.commit("train", iteration, f"policy-{iteration}", {}, {}, 1, 0.0, {})


def _recipe(model: Path, **evaluate: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "iterations": 2,
            "model": {"name": str(model), "dtype": "float32", "max_length": 512},
            "prompts": {"languages": ["en"], "unseen_languages": ["de"]},
            "generate": {"max_tokens": 16},
            "judge": {"max_tokens": 16},
            "evaluate": {"max_tokens": 16, "judge_max_tokens": 8} | evaluate,
        }
    )


def test_no_evaluation_prompt_is_an_error_before_any_engine(tiny_model: Path, tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path / "run")
    _write_prompts(directory, [_row("en", "fox", "train", True, None)])
    context = Context(_recipe(tiny_model), Profile(name="local"), directory, 0, directory.stage("evaluation", 0))
    with pytest.raises(RunDirectoryError, match=r"no prompt of .* is for evaluation"):
        run(context)


def test_the_judge_has_room_for_two_answers_as_far_as_it_has_positions(tiny_model: Path, tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path / "run")
    _write_prompts(directory, [_row("en", "fox", "evaluation", True, None)])

    def length(**settings: Any) -> int:
        recipe = _recipe(tiny_model, **settings)
        context = Context(recipe, Profile(name="local"), directory, 0, directory.stage("evaluation", 0))
        source = judge_of(context)
        assert source is not None
        return source.settings.max_length

    assert length() == 512  # its positions; 512 + 16 + 8 + the instruction would be more
    assert length(judge_max_length=460) == 460
    with pytest.raises(
        ValueError, match=r"two answers of evaluate.max_tokens \(60\).*judge_max_length \(512; null"
    ):
        length(max_tokens=60)


def test_nothing_is_compared_where_all_have_a_true_score(tiny_model: Path, tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path / "run")
    task = world_prompts("en", 1, 0, "evaluation")[0].task
    _write_prompts(directory, [_row("en", "x", "evaluation", True, task), _row("en", "y", "train", True, None)])
    recipe = _recipe(tiny_model, judge_max_tokens=5000)  # which would never fit
    assert judge_of(Context(recipe, Profile(name="local"), directory, 0, directory)) is None  # type: ignore[arg-type]


def _comparisons(read: int, of: int, language: str = "en") -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": f"{language}{number // 2}",
            "language": language,
            "seen": True,
            "model": "M_1",
            "baseline": "M_0",
            "order": ORDERS[number % 2],
            "win": 1.0 if number < read else None,
            "output": "Verdict: A" if number < read else "A is longer",
            "unreadable": None if number < read else "no_verdict",
        }
        for number in range(of)
    ]


def _lengths(rows: list[dict[str, Any]]) -> dict[tuple[str, str], int]:
    return {(model, row["prompt_id"]): 10 for row in rows for model in ("M_0", "M_1")}


def test_mostly_unreadable_comparisons_are_reported_with_examples_and_no_rate(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_width", 200)
    recipe = _recipe(tiny_model)
    rows = _comparisons(1, 32)
    rates = win_rates(rows, _lengths(rows), 0, recipe.evaluate.min_prompts)
    warnings = warnings_of(recipe, rows, rates)
    assert "31 of 32 comparisons cannot be read" in warnings[0]
    assert "A is longer" in warnings[0] and "evaluate.judge that follows instructions" in warnings[0]
    assert "fewer than evaluate.min_prompts (10)" in warnings[1] and "en (1)" in warnings[1]
    summary = {"model": "M_1", "baseline": "M_0", "score_changes": [], "warnings": warnings}
    for figures in evaluation({**summary, "win_rates": [asdict(rate) for rate in rates]}):
        show_figures(figures)
    screen = " ".join(capsys.readouterr().out.split())
    assert "%" not in screen.split("warning:")[0].replace("95%", "")
    assert "too few" in screen and "31: no_verdict 31" in screen and "warning: 31 of 32" in screen


def test_readable_comparisons_give_no_warning(tiny_model: Path) -> None:
    rows = _comparisons(24, 30)
    assert warnings_of(_recipe(tiny_model), rows, win_rates(rows, _lengths(rows), 0, 10)) == []


def test_a_comparison_that_is_cut_off_is_not_read(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.data

    found: dict[str, Any] = {}

    def ask(dataset: Any, rows: int, source: Any, profile: Any, task: Task, notify: Any, pool: str) -> None:
        found["answer"] = task.answer
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "ask", ask)
    monkeypatch.setattr(ray.data, "from_arrow", lambda table: None)
    monkeypatch.setattr(Context, "notify", lambda context: None)
    directory = RunDirectory.open(tmp_path / "run")
    context = Context(_recipe(tiny_model), Profile(name="local"), directory, 0, directory.stage("evaluation", 0))
    answers = [
        {**_row("en", "fox", "evaluation", True, None), "decoding": "greedy", "true_score": None}
        | {"model": model, "answer_id": model, "response": "x"}
        for model in ("M_0", "M_1")
    ]
    with pytest.raises(KeyboardInterrupt):
        baseline = Baseline("M_0", {answers[0]["prompt_id"]: answers[0]})
        compare(context, ModelSource("none", context.recipe.model), answers[1:], [baseline])
    row = {"order": "model_first"}
    for text, truncated, expected in (
        ("Verdict: A", False, (1.0, None)),
        ("Verdict: A", True, (None, "truncated")),
        ("A is better", False, (None, "no_verdict")),
    ):
        answered = found["answer"](row, Completion(text, 1, 1, truncated))
        assert (answered["win"], answered["unreadable"]) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("no_ray")
@pytest.mark.timeout(900)
def test_two_iterations_against_the_start(tiny_model: Path, tmp_path: Path) -> None:
    directory = RunDirectory.open(tmp_path / "run")
    tasks = {language: world_prompts(language, 3, 0, "evaluation") for language in ("en", "de")}
    rows = [
        _row(language, item.prompt, "evaluation", language == "en", item.task)
        for language, items in tasks.items()
        for item in items
    ]
    free = [_row("en", word, "evaluation", True, None) for word in ("fox", "dog")]
    _write_prompts(directory, [*rows, *free, _row("en", "quick", "train", True, None)])
    _commit_policy(directory, 0, tiny_model)
    _commit_policy(directory, 1, tiny_model)
    recipe, profile = _recipe(tiny_model), Profile(name="local")

    assert run_stage(BASELINE, recipe, profile, directory).rows == 2 * 8  # decodings, prompts
    manifest = run_stage(STAGE, recipe, profile, directory)
    output = directory.stage("evaluation", 0)
    table = output.read_table()
    assert table.schema.equals(ANSWERS)
    answers = table.to_pylist()
    assert len(answers) == manifest.rows == 2 * 8
    task_of = {row["prompt_id"]: row["task"] for row in rows}
    for answer in answers:
        task = task_of.get(answer["prompt_id"])
        score = None if task is None else true_score(task, answer["language"], answer["response"])
        assert answer["true_score"] == (score if score is None else pytest.approx(score))
    compared = (output / "comparisons").read_table()
    assert compared.schema.equals(COMPARISONS)
    assert sorted(zip(compared["order"].to_pylist(), compared["prompt_id"].to_pylist(), strict=True)) == sorted(
        (order, row["prompt_id"]) for order in ("model_first", "baseline_first") for row in free
    )
    summary = output.read_json("summary.json")
    for rate in summary["win_rates"]:
        assert rate["asked"] == 4 == rate["readable"] + sum(rate["unreadable"].values())
        assert rate["win_rate"] is None  # of two prompts
    assert "fewer than evaluate.min_prompts (10)" in summary["warnings"][-1]
    assert (summary["model"], summary["baseline"]) == ("M_1", "M_0")
    changes = {(c["language"], c["seen"], c["decoding"]): c for c in summary["score_changes"]}
    assert changes["*", True, "greedy"]["count"] == changes["*", False, "greedy"]["count"] == 3
    counters = manifest.counters
    assert counters["greedy_seen_before"] == pytest.approx(changes["*", True, "greedy"]["before"], abs=1e-4)
    # The same checkpoint twice, decoded greedily, has nothing to tell apart.
    assert counters["greedy_seen_after"] == pytest.approx(counters["greedy_seen_before"], abs=0.05)

    manifest = run_stage(STAGE, recipe, profile, directory, iteration=1)
    assert manifest.rows == 2 * 8
    summary = directory.stage("evaluation", 1).read_json("summary.json")
    assert summary["model"] == "M_2"
    assert {row["model"] for row in summary["answers"]} == {"M_0", "M_1", "M_2"}
    assert sum(change["count"] for change in summary["score_changes"] if change["language"] == "*") == 2 * 6


@pytest.mark.slow
@pytest.mark.usefixtures("no_ray")
def test_a_server_compares_and_what_it_costs_is_counted(tiny_model: Path, tmp_path: Path) -> None:
    """The server is a double that prefers what comes first, and refuses one of the messages."""
    from congrad_ray.runtime.session import connect

    def reply(request: dict[str, Any], before: int) -> Reply:
        text = request["messages"][-1]["content"]
        return Reply(400, {"error": {"message": "no"}}) if "bad" in text else Reply(body=chat("Verdict: A"))

    directory = RunDirectory.open(tmp_path / "run")
    rows = [_row("en", word, "evaluation", True, None) for word in ("fox", "dog", "bad")]
    _write_prompts(directory, rows)
    answers = [
        {
            **row,
            "decoding": "greedy",
            "true_score": None,
            "model": model,
            "answer_id": f"{model}{row['prompt_id']}",
        }
        | {"response": f"{model} says", "seen": True}
        for model in ("M_0", "M_1")
        for row in rows
    ]
    with serving(reply) as server:
        endpoint = {
            "url": server.url,
            "model": "double",
            "max_retries": 0,
            "input_price": 1e6,
            "output_price": 2e6,
        }
        recipe = _recipe(tiny_model, endpoint=endpoint)
        profile = Profile(name="local")
        connect(profile, 3)
        context = Context(recipe, profile, directory, 0, directory.stage("evaluation", 0))
        judge = judge_of(context)
        assert isinstance(judge, Endpoint)
        baseline = Baseline("M_0", {row["prompt_id"]: row for row in answers[:3]})
        found = compare(context, judge, answers[3:], [baseline])
        asked = len(server.asked)
        assert compare(context, judge, answers[3:], [baseline]) == found  # from what is there
        assert len(server.asked) == asked == 1 + 6
    assert sorted((row["order"], row["win"], row["unreadable"]) for row in found if row["win"] is not None) == [
        ("baseline_first", 0.0, None),
        ("baseline_first", 0.0, None),
        ("model_first", 1.0, None),
        ("model_first", 1.0, None),
    ]
    assert [row["unreadable"] for row in found if row["win"] is None] == ["bad_request"] * 2
    assert cost_of(recipe.evaluate, found) == 4 * (7 + 2 * 3)
    lengths = {(row["model"], row["prompt_id"]): len(row["response"]) for row in answers}
    rate = win_rates(found, lengths, 0, 1)[0]
    assert (rate.prompts, rate.asked, rate.readable, rate.consistent) == (2, 6, 4, 0.0)
    assert rate.win_rate == 0.5 and rate.unreadable == {"bad_request": 2}
