"""Real engines under Ray: generate and judge, and what a judge's distribution is checked against.

All slow: answers and judgements of a whole run are checked in the fast tests, in pipeline/test_end_to_end.py.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.data.tables import prompt_id, response_id, table_of
from congrad_ray.modeling.adapters import model_to_train, save_adapter
from congrad_ray.modeling.source import named_model, policy
from congrad_ray.modeling.tokenization import chat_prompt_ids
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.rundir.directory import RunDirectory, RunDirectoryError
from congrad_ray.stages.generate.schema import RESPONSES
from congrad_ray.stages.generate.stage import STAGE as GENERATE
from congrad_ray.stages.judge.rubric import load_rubric
from congrad_ray.stages.judge.schema import JUDGEMENTS
from congrad_ray.stages.judge.scores import expected_score, score_token_ids
from congrad_ray.stages.judge.stage import STAGE as JUDGE
from congrad_ray.stages.prompts.schema import PROMPTS

WORDS = ["fox", "dog", "Hund", "Fuchs", "perro", "zorro", "chien", "renard"]
TOO_LONG = "fox " * 300
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_ray")]


def _prompts(run: RunDirectory, contents: list[str], split: str = "train") -> list[dict[str, Any]]:
    rows = []
    for number, content in enumerate(contents):
        messages = [{"role": "user", "content": content}]
        language = ("en", "de")[number % 2]
        rows.append(
            {
                "prompt_id": prompt_id(language, messages),
                "language": language,
                "prompt": messages,
                "split": split,
                "seen": True,
                "task": None,
            }
        )
    folder = run.stage("prompts", None)
    folder.begin("fingerprint", False, "prompts")
    folder.write_table("part-0.parquet", table_of(rows, PROMPTS))
    folder.commit("prompts", None, "fingerprint", {}, {}, len(rows), 0.0, {})
    return rows


def _recipe(model: Path, rubric: Path, max_length: int = 128, **sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "test",
        "model": {"name": str(model), "dtype": "float32", "max_length": max_length},
        "prompts": {"languages": ["en", "de"]},
        "generate": {"num_generations": 2, "max_tokens": 16, "temperature": 1.0, "top_p": 1.0},
        "evaluate": {"max_tokens": 16, "judge_max_tokens": 8},
        "judge": {"rubric": str(rubric), "method": "expected_score"},
    }
    return Recipe.model_validate(values | sections)


@pytest.fixture
def rubric(tmp_path: Path) -> Path:
    folder = tmp_path / "rubric"
    folder.mkdir()
    (folder / "en.txt").write_text("{prompt}?{response}:")
    return folder


@pytest.mark.timeout(600)
def test_eight_prompts_are_answered_and_judged(
    tiny_model: Path, rubric: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory.open(tmp_path / "run")
    prompts = _prompts(run, [*WORDS, TOO_LONG])
    recipe = _recipe(tiny_model, rubric)
    profile = Profile(name="local")

    manifest = run_stage(GENERATE, recipe, profile, run)
    responses = run.stage("responses", 0).read_table()
    assert responses.schema.equals(RESPONSES)
    rows = responses.to_pylist()
    wanted = {response_id(row["prompt_id"], 0, sample) for row in prompts[:8] for sample in (0, 1)}
    assert {row["response_id"] for row in rows} == wanted
    assert len({row["seed"] for row in rows}) == len({row["response"] for row in rows}) == 16
    tokenizer = policy(recipe, run, 0).load_tokenizer()
    for row in rows:
        assert row["prompt_tokens"] == len(chat_prompt_ids(tokenizer, row["prompt"]))
        assert 1 <= row["response_tokens"] <= 16
    assert manifest.counters["quarantined"] == {"prompt_too_long": 2}
    assert manifest.counters["responses"] == {"de": 8, "en": 8}
    assert any("18/18 rows, 2 failed" in line for line in caplog.messages)

    manifest = run_stage(JUDGE, recipe, profile, run)
    judgements = run.stage("judgements", 0).read_table()
    assert judgements.schema.equals(JUDGEMENTS)
    scores = {row["response_id"]: row["score"] for row in judgements.to_pylist()}
    assert set(scores) == wanted
    model = policy(recipe, run, 0).load_model("cpu")
    digits = score_token_ids(tokenizer.get_vocab())
    template = load_rubric(str(rubric))
    readable = 0
    for row in rows:
        text = template.fill(row["language"], "expected_score", row["prompt"], row["response"])
        ids = chat_prompt_ids(tokenizer, [{"role": "user", "content": text}])
        if len(ids) + 1 > 128:
            assert scores[row["response_id"]] is None
            continue
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        expected, _ = expected_score(dict(enumerate(logprobs.tolist())), digits)
        assert scores[row["response_id"]] == pytest.approx(expected, abs=1e-4)
        readable += 1
    assert readable == len(scores) - manifest.counters["unreadable"] > 8
    # The judge is random and wrote a digit all the same; its mass is that before the restriction.
    asked = (run.stage("judgements", 0) / "samples").read_table().to_pylist()
    judged = [row for row in asked if row["unreadable"] is None]
    assert len(judged) == readable and {row["output"] for row in judged} <= set("012345")
    assert all(0 < row["mass"] < 0.5 for row in judged)
    for language, row in manifest.counters["judgements"].items():
        assert row["asked"] == 8 == row["readable"] + sum(row["unreadable"].values()), language
    assert set(row["unreadable"] for row in asked) <= {None, "prompt_too_long"}


@pytest.mark.timeout(600)
def test_a_policy_that_is_an_adapter_answers_as_base_and_adapter(
    tiny_model: Path, rubric: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONGRAD_RAY_CACHE", str(tmp_path / "cache"))
    run = RunDirectory.open(tmp_path / "run")
    prompts = _prompts(run, WORDS)
    # So small a top_p leaves the likeliest token alone.
    generate = {"num_generations": 2, "max_tokens": 16, "temperature": 1.0, "top_p": 1e-6}
    train = {"lora": {"r": 4, "use_dora": True, "merge": False}}
    recipe = _recipe(tiny_model, rubric, iterations=2, generate=generate, train=train)
    start = policy(recipe, run, 0)
    adapted: Any = model_to_train(start, recipe.train, "cpu")
    generator = torch.Generator().manual_seed(0)
    for name, values in adapted.named_parameters():
        if ".lora_B." in name:
            values.data += 0.3 * torch.randn(values.shape, generator=generator)
    folder = run.stage("policy", 0)
    folder.begin("fingerprint", False, "train")
    tokenizer = start.load_tokenizer()
    save_adapter(adapted, folder.path, str(tiny_model))
    tokenizer.save_pretrained(folder.path)
    folder.commit("train", 0, "fingerprint", {}, {}, 1, 0.0, {})
    run_stage(GENERATE, recipe, Profile(name="local"), run, 1)
    found = {row["prompt_id"]: row["response"] for row in run.stage("responses", 1).read_table().to_pylist()}

    def answer(model: Any, prompt: Any) -> str:
        ids = torch.tensor([chat_prompt_ids(tokenizer, prompt)])
        output = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        return str(tokenizer.decode(output, skip_special_tokens=True))

    base = start.load_model("cpu")
    for row in prompts:
        written, expected = found[row["prompt_id"]], answer(adapted, row["prompt"])
        # vLLM leaves out a last character whose bytes are not complete.
        assert expected.startswith(written) and len(written) >= len(expected) - 2 > 2
        assert not answer(base, row["prompt"]).startswith(written)


@pytest.mark.timeout(600)
def test_sampled_judgements_resume_and_are_averaged(
    tiny_model: Path, rubric: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory.open(tmp_path / "run")
    # Together more prompt tokens than an engine takes at once, each request with its own seed: on a CPU this
    # ends vLLM 0.29 unless whole prompts are computed (see enable_chunked_prefill in the engine's settings).
    _prompts(run, [f"{number} " + "fox " * 60 for number in range(64)])
    judge = {"rubric": str(rubric), "method": "sampled", "samples": 3, "temperature": 1.0, "max_tokens": 4}
    recipe = _recipe(tiny_model, rubric, max_length=512, judge=judge)
    profile = Profile(name="local")
    run_stage(GENERATE, recipe, profile, run)
    first = {row["response_id"]: row for row in run.stage("responses", 0).read_table().to_pylist()}

    # A random judge is cut off nearly every time, and that is reported before all has been asked.
    with pytest.raises(RunDirectoryError, match=r"(?s)cannot be read:.*truncated: .*raise judge.max_tokens \(4\)"):
        run_stage(JUDGE, recipe, profile, run)
    assert 20 <= (run.stage("judgements", 0) / "samples").read_table().num_rows < 3 * 128
    recipe = _recipe(tiny_model, rubric, max_length=512, judge=judge, limits={"unreadable_share": 1.0})
    run_stage(JUDGE, recipe, profile, run)
    output = run.stage("judgements", 0)
    before = sorted(output.read_table().to_pylist(), key=lambda row: str(row["response_id"]))
    assert {row["asked"] for row in before} == {3}
    assert all(len(row["outputs"]) == 3 for row in before)

    # A killed run: no manifest, no judgements yet, and a third of the samples lost.
    samples = output / "samples"
    table = samples.read_table()
    for path in samples.files(".parquet"):
        samples.filesystem.delete_file(path)
    samples.write_table("part-left.parquet", table.slice(0, 2 * len(table) // 3))
    for path in output.files(".parquet"):
        output.filesystem.delete_file(path)
    output.filesystem.delete_file(f"{output.path}/_manifest.json")
    run_stage(JUDGE, recipe, profile, run)
    assert any(f"{len(table) // 3}/{len(table) // 3} rows" in line for line in caplog.messages)
    after = sorted(output.read_table().to_pylist(), key=lambda row: str(row["response_id"]))
    assert [row["response_id"] for row in after] == [row["response_id"] for row in before] == sorted(first)


@pytest.mark.timeout(600)
def test_a_checkpoint_that_is_not_on_a_local_filesystem_is_fetched(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.fs as pafs
    import ray

    from congrad_ray.rundir.directory import Folder
    from congrad_ray.runtime.engines import Completion, Request, Task, complete
    from congrad_ray.runtime.notices import Notify
    from congrad_ray.runtime.session import connect

    monkeypatch.setenv("CONGRAD_RAY_CACHE", str(tmp_path / "cache"))
    profile = Profile(name="local")
    connect(profile, 2)
    remote = Folder(pafs.SubTreeFileSystem(str(tiny_model), pafs.LocalFileSystem()), "")
    settings = _recipe(tiny_model, tiny_model).model
    source = replace(named_model(str(tiny_model), settings), folder=remote, fingerprint="f" * 16)
    schema = pa.schema([pa.field("id", pa.string()), pa.field("text", pa.string())])
    rows = ray.data.from_items([{"id": str(number)} for number in range(4)])

    def request(row: dict[str, Any]) -> Request:
        return Request([{"role": "user", "content": "fox"}], 4)

    def answer(row: dict[str, Any], completion: Completion) -> dict[str, Any]:
        return {**row, "text": completion.text}

    found = complete(rows, rows.count(), source, profile, Task(request, answer, schema, 4), Notify()).take_all()
    assert sorted(row["id"] for row in found) == ["0", "1", "2", "3"]
    assert len({row["text"] for row in found}) == 1  # greedy: the same question has the same answer
    assert (tmp_path / "cache" / "checkpoints" / ("f" * 16) / "config.json").exists()


@pytest.mark.timeout(1200)
def test_a_prompt_that_kills_its_engine_is_set_apart_and_no_other_is_lost(
    tiny_model: Path, rubric: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real engines in real processes, which end when they are asked a certain prompt."""
    from congrad_ray.runtime import pools
    from congrad_ray.runtime.vllm_engine import Answered, Asked, VLLMEngine

    tokenizer = named_model(str(tiny_model), _recipe(tiny_model, rubric).model).load_tokenizer()
    deadly = chat_prompt_ids(tokenizer, [{"role": "user", "content": "zorro"}])

    class Deadly(VLLMEngine):
        async def _answer(self, asked: Asked) -> Answered:
            if list(asked.ids) == deadly:
                os._exit(1)
            return await super()._answer(asked)

    monkeypatch.setattr(pools, "VLLMEngine", Deadly)
    run = RunDirectory.open(tmp_path / "run")
    prompts = _prompts(run, WORDS)
    profile = Profile.model_validate({"name": "local", "engines": {"batch_size": 4}})
    manifest = run_stage(GENERATE, _recipe(tiny_model, rubric), profile, run)
    assert manifest.counters["quarantined"] == {"killed_worker": 2}
    wanted = {response_id(row["prompt_id"], 0, sample) for row in prompts for sample in (0, 1)}
    bad = {response_id(prompts[WORDS.index("zorro")]["prompt_id"], 0, sample) for sample in (0, 1)}
    output = run.stage("responses", 0)
    assert set(output.read_table(["response_id"])["response_id"].to_pylist()) == wanted - bad
    assert set((output / "quarantine").read_table(["row_id"])["row_id"].to_pylist()) == bad
