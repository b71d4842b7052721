"""`congrad evaluate MODEL BASELINE`: what is refused, what is read, and the whole of it with real engines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from commands import Ended
from congrad_ray.data.records import InputError
from congrad_ray.pipeline.comparison import Comparison, _read_prompts, compared_recipe
from congrad_ray.stages.evaluate.schema import ANSWERS, COMPARISONS

Command = Callable[..., Ended]
PROMPTS = [{"prompt": f"{word}?", "language": tag} for tag in ("en", "German") for word in ("fox", "dog", "cat")]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["r.yaml"], "give RECIPE and --run DIR, or MODEL BASELINE --prompts FILE"),
        (["r.yaml", "--run", "d", "--prompts", "p.jsonl"], "--prompts: for MODEL BASELINE"),
        (["a", "b"], "--prompts FILE is missing"),
        (["a", "b", "--prompts", "p.jsonl", "--run", "d"], "--run is for RECIPE"),
        (["a", "b", "--prompts", "p.jsonl", "--endpoint", "http://h/v1"], "--endpoint needs --endpoint-model"),
        (["a", "b", "--prompts", "p.jsonl", "--api-key-env", "KEY"], "of --endpoint URL"),
        (["a", "b", "--prompts", "p.jsonl", "--set", "evaluate.nothing=1"], "no such setting"),
        (["a", "b", "--prompts", "no.jsonl"], "no file no.jsonl"),
        (["a", "a", "--prompts", "p.jsonl"], "named twice"),
        (["./no", "b", "--prompts", "p.jsonl"], "no"),
        (["a", "b", "--prompts", "p.jsonl", "--set", "prompts.evaluation.prompt_column=x"], "no column 'x'"),
        (["a", "b", "--prompts", "p.jsonl", "--judge", "j", "--endpoint", "http://h/v1", "--endpoint-model", "m"],
         "leave one of them out"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(
    congrad: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _write(tmp_path / "p.jsonl", PROMPTS)
    result = congrad("evaluate", *arguments)
    assert result.code == 2, result.err
    assert said in " ".join(result.err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def _comparison(path: Path, **more: Any) -> Comparison:
    return Comparison("m/one", "m/two", compared_recipe("m/one", "m/two", str(path)), **more)


def test_prompts_are_read_once_each_and_bad_rows_set_apart(tmp_path: Path) -> None:
    path = _write(tmp_path / "p.jsonl", [*PROMPTS, PROMPTS[0], {"prompt": "", "language": "en"}])
    found = _read_prompts(_comparison(path))
    assert sorted(row["language"] for row in found.good) == ["de"] * 3 + ["en"] * 3
    assert {row["split"] for row in found.good} == {"evaluation"}
    assert found.repeated == 1 and [row["reason"] for row in found.bad] == ["prompt_empty"]
    fewer = _read_prompts(_comparison(path, per_language=2)).good
    assert sorted(row["language"] for row in fewer) == ["de", "de", "en", "en"]
    turned = _write(tmp_path / "t.jsonl", PROMPTS[::-1])  # the draw does not depend on the order
    again = _read_prompts(_comparison(turned, per_language=2)).good
    assert {row["prompt_id"] for row in again} == {row["prompt_id"] for row in fewer}
    plain = _write(tmp_path / "plain.jsonl", [{"prompt": "Wer?"}])
    assert _read_prompts(_comparison(plain, language="German")).good[0]["language"] == "de"
    with pytest.raises(InputError, match=r"1 of 1 rows cannot be used .*prompt_empty"):
        _read_prompts(_comparison(_write(tmp_path / "bad.jsonl", [{"prompt": " ", "language": "en"}])))


def test_models_are_called_by_the_ends_of_their_names_where_these_differ(tmp_path: Path) -> None:
    path = _write(tmp_path / "p.jsonl", PROMPTS)
    assert _comparison(path).names == ("one", "two")
    recipe = compared_recipe("a/policy", "b/policy", str(path))
    assert Comparison("a/policy", "b/policy", recipe).names == ("a/policy", "b/policy")
    recipe = compared_recipe("a/policy", str(path), str(path))
    assert recipe.model.name == "a/policy"
    assert Comparison("a/policy", str(path), recipe).names == ("policy", "references")


@pytest.mark.slow
@pytest.mark.usefixtures("no_ray")
@pytest.mark.timeout(900)
def test_a_model_against_another_and_against_answers(congrad: Command, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    prompts = _write(tmp_path / "p.jsonl", PROMPTS)
    short = ["--set=evaluate.max_tokens=8", "--set=evaluate.judge_max_tokens=8", "--set=model.max_length=512"]
    short += ["--set=limits.unreadable_share=1"]
    out = tmp_path / "out"
    arguments = ["evaluate", str(other), str(tiny_model), "--prompts", str(prompts), "--out", str(out), *short]
    result = congrad(*arguments)
    assert result.code == 0, result.err
    answers, comparisons = pq.read_table(out / "answers.parquet"), pq.read_table(out / "comparisons.parquet")
    assert answers.schema.equals(ANSWERS) and comparisons.schema.equals(COMPARISONS)
    assert len(answers) == 2 * 6 and len(comparisons) == 2 * 6
    assert set(answers["model"].to_pylist()) == {"other", tiny_model.name}
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["model"], summary["baselines"]) == ("other", [tiny_model.name])
    assert {row["language"] for row in summary["answers"]} == {"de", "en"}
    assert "too few" in result.out and "seen" not in result.out
    assert congrad(*arguments, "--redo").code == 0  # nothing differs: nothing is done again
    refused = congrad(*arguments, "--set=evaluate.max_tokens=9")
    assert refused.code == 2 and "evaluate.max_tokens: 8 -> 9" in refused.err
    given = [{**row, "output": "The fox."} for row in PROMPTS[:4]]
    references = _write(tmp_path / "answers.jsonl", given)
    out = tmp_path / "against"
    result = congrad("evaluate", str(other), str(references), "--prompts", str(prompts), "--out", str(out), *short)
    assert result.code == 0, result.err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["baselines"] == ["references"]
    assert summary["warnings"][0].endswith("answers to 4 of 6 evaluation prompts")
    assert pq.read_metadata(out / "comparisons.parquet").num_rows == 2 * 4


def test_a_server_is_looked_at_before_any_answer(congrad: Command, tiny_model: Path, tmp_path: Path) -> None:
    prompts, out = _write(tmp_path / "p.jsonl", PROMPTS), tmp_path / "out"
    other = _write(tmp_path / "answers.jsonl", [{**row, "response": "x"} for row in PROMPTS])
    arguments = ["evaluate", str(tiny_model), str(other), "--prompts", str(prompts), "--out", str(out)]
    arguments += ["--endpoint", "http://127.0.0.1:9/v1", "--endpoint-model", "m", "--set=evaluate.max_tokens=8"]
    result = congrad(*arguments, "--api-key-env", "NO_SUCH_KEY")
    assert result.code == 2 and "the environment has no NO_SUCH_KEY" in result.err
    result = congrad(*arguments, "--set=evaluate.endpoint.max_retries=0")
    assert result.code == 2 and "endpoint http://127.0.0.1:9/v1, model m" in result.err
    assert not out.exists()
