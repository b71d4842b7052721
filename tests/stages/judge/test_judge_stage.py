"""The judge stage on Ray with servers (doubles on loopback), a reward model, comparisons, and several judges."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import zscore
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import SettingsError, validate
from congrad_ray.data.tables import table_of
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError
from congrad_ray.runtime.engines import EngineFailed
from congrad_ray.stages.generate.schema import RESPONSES
from congrad_ray.stages.judge.schema import JUDGEMENT_SAMPLES, JUDGEMENTS
from congrad_ray.stages.judge.stage import STAGE
from congrad_ray.stages.pair.stage import STAGE as PAIR
from judge_server import KEY, Reply, chat, serving
from tiny_models import make_reward_model

PROMPTS, SAMPLES = 6, 3
PROFILE = Profile(name="local")
_GRADE = re.compile(r"grade (\d)")


def _grade(prompt: int, sample: int) -> int:
    return (2 * prompt + sample) % 5 + (sample == 2)


def _run(path: Path) -> RunDirectory:
    """A run with responses "grade 0" to "grade 5" of prompts in two languages, the parts mixed."""
    run = RunDirectory.open(path)
    rows = [
        {
            "response_id": f"r{prompt}.{sample}",
            "prompt_id": f"p{prompt}",
            "language": ("en", "de")[prompt % 2],
            "prompt": [{"role": "user", "content": f"say {prompt}"}],
            "sample": sample,
            "seed": 0,
            "response": f"grade {_grade(prompt, sample)}",
            "prompt_tokens": 1,
            "response_tokens": 1,
            "truncated": False,
        }
        for sample in range(SAMPLES)
        for prompt in range(PROMPTS)
    ]
    folder = run.stage("responses", 0)
    folder.begin("responses", False, "generate")
    folder.write_table("part-0.parquet", table_of(rows[::2], RESPONSES))
    folder.write_table("part-1.parquet", table_of(rows[1::2], RESPONSES))
    folder.commit("generate", 0, "responses", {}, {}, len(rows), 0.0, {})
    return run


def _recipe(model: Path, rubric: Path, **sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "test",
        "model": {"name": str(model), "dtype": "float32", "max_length": 256},
        "prompts": {"languages": ["en", "de"]},
        "generate": {"num_generations": SAMPLES, "max_tokens": 16},
        "evaluate": {"max_tokens": 16, "judge_max_tokens": 8},
        "pair": {"language_check": False},
    }
    return validate(Recipe, values | sections, "recipe")


@pytest.fixture
def rubric(tmp_path: Path) -> Path:
    folder = tmp_path / "rubric"
    folder.mkdir()
    (folder / "en.txt").write_text("{prompt}|{response}")
    return folder


def _judge(request: dict[str, Any], before: int) -> Reply:
    """Says the grade; of two responses prefers the better in English prompts, the worse in German (odd) ones."""
    text = request["messages"][0]["content"]
    grades = [int(grade) for grade in _GRADE.findall(text)]
    if len(grades) < 2:  # none: the stage looks whether the server answers
        return Reply(body=chat(f"Score: {grades[0] if grades else 0}"))
    first, second = grades
    better = int(re.search(r"say (\d)", text)[1]) % 2 == 0  # type: ignore[index]
    verdict = "tie" if first == second else "A" if (first > second) == better else "B"
    return Reply(body=chat(f"Verdict: {verdict}"))


@pytest.mark.usefixtures("shared_ray")
def test_a_server_and_its_comparisons_judge_together(
    tiny_model: Path,
    rubric: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warned: Callable[[], list[str]],
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    run = _run(tmp_path / "run")
    with serving(_judge) as server:
        endpoint = {"url": server.url, "model": "double", "api_key_env": "JUDGE_KEY"}
        priced = endpoint | {"input_price": 10.0, "output_price": 100.0}
        judge: dict[str, Any] = {
            "endpoint": priced,
            "rubric": str(rubric),
            "samples": 2,
            "also": [{"endpoint": endpoint, "method": "pairwise"}],
            "min_agreement": 0.5,
            "disagreement": "leave_out",
        }
        recipe = _recipe(tiny_model, rubric, judge=judge)
        manifest = run_stage(STAGE, recipe, PROFILE, run)
        assert set(server.keys) == {f"Bearer {KEY}"}
        first = PROMPTS * SAMPLES * 2
        comparisons = PROMPTS * 3 * 2
        assert len(server.asked) == 2 + first + comparisons  # a probe each

        output = run.stage("judgements", 0)
        samples = (output / "samples").read_table()
        assert samples.schema.names == JUDGEMENT_SAMPLES.names and len(samples) == first + comparisons
        table = output.read_table()
        assert table.schema.equals(JUDGEMENTS)
        scores = {row["response_id"]: row for row in table.to_pylist()}
        grades = {f"r{p}.{s}": float(_grade(p, s)) for p in range(PROMPTS) for s in range(SAMPLES)}
        shares = {}
        for p in range(PROMPTS):
            for s in range(SAMPLES):
                others = [_grade(p, other) for other in range(SAMPLES) if other != s]
                wins = [0.5 if o == _grade(p, s) else float((_grade(p, s) > o) == (p % 2 == 0)) for o in others]
                shares[f"r{p}.{s}"] = 5 * sum(wins) / len(wins)
        ids = sorted(grades)
        expected = (zscore([grades[i] for i in ids]) + zscore([shares[i] for i in ids])) / 2
        assert [scores[i]["score"] for i in ids] == pytest.approx(expected.tolist(), abs=1e-5)
        assert {(row["readable"], row["asked"]) for row in scores.values()} == {(2 + 4, 2 + 4)}

        counters = manifest.counters
        assert counters["cost_usd"] == pytest.approx(first * (7 * 10 + 3 * 100) / 1e6, abs=1e-6)
        assert counters["judges"]["double"]["asked"] == first
        assert counters["judges"]["double (2)"]["asked"] == comparisons
        agreement = counters["agreement"]
        assert agreement["en"]["tau"] == 1.0 and agreement["de"]["tau"] == -1.0
        assert {row["prompts"] + row["left_out"] for row in agreement.values()} == {PROMPTS // 2}
        assert any(re.search(r"agree less than .*0\.5\) in de \(-1\.00\)\. No pairs", line) for line in warned())
        assert "agreement of the judges" in [figure.title for figure in STAGE.figures(output)]

        pairs = run_stage(PAIR, recipe, PROFILE, run)
        assert pairs.counters["no_pair"] == {"judges_disagree de": PROMPTS // 2}
        assert pairs.counters["pairs"] == {"en": PROMPTS // 2}

        # What matters not to the judgements changes none: another price, another limit.
        other = judge | {"endpoint": endpoint | {"max_concurrency": 2}, "min_agreement": 0.1}
        before = len(server.asked)
        assert (
            run_stage(STAGE, _recipe(tiny_model, rubric, judge=other), PROFILE, run).fingerprint
            == manifest.fingerprint
        )
        assert len(server.asked) == before
    for path in Path(run.path).rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


@pytest.mark.usefixtures("shared_ray")
def test_rows_without_an_answer_are_unreadable_and_asked_again_on_resume(
    tiny_model: Path, rubric: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = _run(tmp_path / "run")
    down = {"en": True}

    def reply(request: dict[str, Any], before: int) -> Reply:
        text = request["messages"][0]["content"]
        if "say 1|grade 3" in text:
            return Reply(body=chat(None, finish="content_filter"))
        if down["en"] and re.search(r"say [0245]", text):
            return Reply(503, {"error": {"message": "no room"}}, {"Retry-After": "0.01"})
        return _judge(request, before)

    with serving(reply) as server:
        endpoint = {"url": server.url, "model": "double", "max_retries": 1}
        judge = {"endpoint": endpoint, "rubric": str(rubric), "samples": 1}
        recipe = _recipe(tiny_model, rubric, judge=judge)
        with pytest.raises(RunDirectoryError, match=r"(?s)inference_error.*no room.*judge\.endpoint"):
            run_stage(STAGE, recipe, PROFILE, run)
        down["en"] = False
        answered = [json.dumps(request["messages"]) for request in server.asked if "say 3" in str(request)]
        manifest = run_stage(STAGE, recipe, PROFILE, run)
        again = [json.dumps(request["messages"]) for request in server.asked if "say 3" in str(request)]
        assert again.count(answered[0]) == 1 or len(answered) == 0  # what was answered is not asked again
    scores = {row["response_id"]: row["score"] for row in run.stage("judgements", 0).read_table().to_pylist()}
    grades = {f"r{p}.{s}": float(_grade(p, s)) for p in range(PROMPTS) for s in range(SAMPLES)}
    refused = {name for name, grade in grades.items() if name.startswith("r1.") and grade == 3}
    assert scores == {name: None if name in refused else grade for name, grade in grades.items()}
    assert manifest.counters["judgements"]["de"]["unreadable"] == {"refused": 1}
    assert "cost_usd" not in manifest.counters and "agreement" not in manifest.counters


@pytest.mark.usefixtures("shared_ray")
def test_a_reward_model_scores_without_writing(tiny_model: Path, rubric: Path, tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    folder = make_reward_model(tiny_model, tmp_path / "reward")
    recipe = _recipe(
        tiny_model, rubric, judge={"model": str(folder), "method": "reward_model", "dtype": "float32"}
    )
    manifest = run_stage(STAGE, recipe, PROFILE, run)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    responses = {row["response_id"]: row for row in run.stage("responses", 0).read_table().to_pylist()}
    judgements = run.stage("judgements", 0).read_table().to_pylist()
    assert {row["response_id"] for row in judgements} == responses.keys()
    for row in judgements:
        about = responses[row["response_id"]]
        conversation = [*about["prompt"], {"role": "assistant", "content": about["response"]}]
        ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            assert row["score"] == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)
        assert row["outputs"] == [""]
    assert manifest.counters["mean_output_tokens"] == 0
    assert STAGE.demand(recipe, PROFILE).what == "reward models: 1"


def test_what_does_not_go_together_is_refused(tiny_model: Path, rubric: Path) -> None:
    server = {"url": "http://localhost/v1", "model": "m"}
    for judge, words in (
        ({"endpoint": server, "model": "x"}, r"both name a judge"),
        ({"endpoint": server, "method": "reward_model"}, r"needs judge\.model, a checkpoint"),
        ({"endpoint": server, "dtype": "float32"}, r"a server .* has its own"),
        ({"method": "reward_model"}, r"the policy is none"),
        ({"dtype": "float32"}, r"the policy has model\.dtype"),
        ({"structured": True, "method": "pairwise"}, r"structured is for judge\.method sampled"),
        ({"comparisons": 3}, r"comparisons is for judge\.method pairwise"),
        ({"comparisons": 1, "method": "pairwise"}, r"comparisons \(1\) leaves some .*\(3\).*give 2 or more"),
        ({"min_agreement": 0.3}, r"name more of them in judge\.also"),
        ({"also": [{"model": "x"}], "disagreement": "weight"}, r"min_agreement, which is null"),
        ({"method": "pairwise", "max_length": 64, "max_tokens": 40}, r"two responses of generate\.max_tokens"),
        ({"endpoint": {**server, "url": "https://a:b@c/v1"}}, r"no user, password or query"),
        ({"also": [{"min_agreement": 1}]}, r"also\.0\.min_agreement: no such setting"),
    ):
        with pytest.raises(SettingsError, match=words):
            _recipe(tiny_model, rubric, judge={"max_tokens": 16, **judge})


def test_a_key_that_is_not_set_is_named_before_anything_starts(
    tiny_model: Path, rubric: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from congrad_ray.runtime.context import Context
    from congrad_ray.stages.judge import stage

    monkeypatch.delenv("JUDGE_KEY", raising=False)
    run = _run(tmp_path / "run")
    endpoint = {"url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "JUDGE_KEY"}
    recipe = _recipe(tiny_model, rubric, judge={"endpoint": endpoint, "rubric": str(rubric)})
    with pytest.raises(SettingsError, match="the environment has no JUDGE_KEY"):
        stage.run(Context(recipe, PROFILE, run, 0, run.stage("judgements", 0)))
    assert not issubclass(EngineFailed, SettingsError)
    demand = STAGE.demand(recipe, PROFILE)
    assert (demand.what, demand.min_cpus, demand.setting) == ("requests to a server", 1.0, "")
