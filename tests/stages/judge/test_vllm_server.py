"""A judge behind vLLM's own server, with OpenAI's interface, on loopback."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.judges import vllm_server
from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import validate
from congrad_ray.data.tables import table_of
from congrad_ray.modeling.source import policy
from congrad_ray.modeling.tokenization import chat_prompt_ids
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.generate.schema import RESPONSES
from congrad_ray.stages.judge.rubric import load_rubric
from congrad_ray.stages.judge.scores import expected_score, score_token_ids
from congrad_ray.stages.judge.stage import STAGE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WORDS = ("fox", "dog", "Hund", "Fuchs")
LENGTH = 256


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, in which digits are often among the likeliest tokens."""
    folder = tmp_path_factory.mktemp("digits") / "model"
    shutil.copytree(tiny_model, folder)
    causal: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    digits = score_token_ids(AutoTokenizer.from_pretrained(tiny_model).get_vocab())
    with torch.no_grad():
        causal.get_output_embeddings().weight[[token for tokens in digits for token in tokens]] *= 8
    causal.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with vllm_server(str(model), tmp_path_factory.mktemp("server") / "log", LENGTH) as url:
        yield url


def _judged(server: str, model: Path, folder: Path, **judge: Any) -> tuple[Recipe, list[dict[str, Any]], Any]:
    """The recipe, the judge's samples and the manifest of judging eight responses."""
    rubric = folder / "rubric"
    rubric.mkdir()
    (rubric / "en.txt").write_text("{prompt}|{response}")
    values = {
        "name": "test",
        "model": {"name": str(model), "dtype": "float32", "max_length": LENGTH},
        "prompts": {"languages": ["en"]},
        "generate": {"num_generations": 2, "max_tokens": 16},
        "evaluate": {"max_tokens": 16, "judge_max_tokens": 8},
        "judge": {"rubric": str(rubric), "endpoint": {"url": server, "model": "judge"}, **judge},
        "limits": {"unreadable_share": 1.0},
    }
    recipe = validate(Recipe, values, "recipe")
    run = RunDirectory.open(folder / "run")
    rows = [
        {
            "response_id": f"{word}.{sample}",
            "prompt_id": word,
            "language": "en",
            "prompt": [{"role": "user", "content": word}],
            "sample": sample,
            "seed": 0,
            "response": f"{word} {sample}",
            "prompt_tokens": 1,
            "response_tokens": 1,
            "truncated": False,
        }
        for word in WORDS
        for sample in (0, 1)
    ]
    responses = run.stage("responses", 0)
    responses.begin("responses", False, "generate")
    responses.write_table("part-0.parquet", table_of(rows, RESPONSES))
    responses.commit("generate", 0, "responses", {}, {}, len(rows), 0.0, {})
    manifest = run_stage(STAGE, recipe, Profile(name="local"), run)
    samples = (run.stage("judgements", 0) / "samples").read_table().to_pylist()
    return recipe, samples, manifest


@pytest.mark.usefixtures("shared_ray")
def test_the_expected_score_is_that_of_the_servers_likeliest_tokens(
    server: str, model: Path, tmp_path: Path
) -> None:
    recipe, samples, _ = _judged(server, model, tmp_path, method="expected_score", min_probability_mass=0.0)
    source = policy(recipe, RunDirectory.open(tmp_path / "run"), 0)
    tokenizer, causal = source.load_tokenizer(), source.load_model("cpu")
    digits = score_token_ids(tokenizer.get_vocab())
    rubric = load_rubric(str(tmp_path / "rubric"))
    read = 0
    for sample in samples:
        word, number = sample["response_id"].split(".")
        prompt = [{"role": "user", "content": word}]
        text = rubric.fill("en", "expected_score", prompt, f"{word} {number}")
        ids = chat_prompt_ids(tokenizer, [{"role": "user", "content": text}])
        with torch.no_grad():
            logprobs = causal(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        likeliest = {int(i): float(logprobs[i]) for i in logprobs.topk(20).indices}
        if not {token for tokens in digits for token in tokens} & set(likeliest):
            assert sample["score"] is None
            continue
        score, mass = expected_score(likeliest, digits)
        assert sample["score"] == pytest.approx(score, abs=1e-4) and sample["mass"] == pytest.approx(
            mass, abs=1e-4
        )
        read += 1
    assert read


@pytest.mark.usefixtures("shared_ray")
def test_structured_judgements_are_json_or_cut_off(server: str, model: Path, tmp_path: Path) -> None:
    _, samples, manifest = _judged(
        server, model, tmp_path, method="sampled", structured=True, samples=2, max_tokens=120
    )
    assert len(samples) == 16 == sum(row["asked"] for row in manifest.counters["judgements"].values())
    for sample in samples:
        if sample["unreadable"] is None:
            assert sample["score"] == json.loads(sample["output"])["score"] in range(6)
        else:
            assert sample["unreadable"] != "inference_error" and sample["output"].startswith("{")
