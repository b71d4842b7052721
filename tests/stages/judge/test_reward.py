"""The reward model as a judge: its logits against transformers' own, and checkpoints that are none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from congrad_ray.config.recipe import Model
from congrad_ray.modeling.source import ModelError, ModelSource, named_model
from congrad_ray.runtime.notices import Notify
from congrad_ray.stages.judge import reward
from congrad_ray.stages.judge.reward import RewardModel, load_reward_model, rewards
from tiny_models import make_reward_model


def _source(folder: Path, max_length: int = 128) -> ModelSource:
    return named_model(str(folder), Model(name=str(folder), dtype="float32", max_length=max_length))


def _row(number: int, prompt: str, response: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
    about = {"judgement_id": f"j{number}", "response_id": f"r{number}", "prompt_id": "p", "language": "en"}
    return {**about, "prompt": messages, "response": response, "judge": "reward"}


@pytest.mark.parametrize("pad", [None, 2], ids=["no-pad-token", "pad-token"])
def test_scores_are_the_logits_of_one_row_at_a_time(
    tiny_model: Path, tmp_path: Path, pad: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_reward_model(tiny_model, tmp_path / "reward", pad=pad)

    def attempt(actor: Any, keys: list[str], work: Any) -> list[int]:
        work(list(range(len(keys))))
        return []

    monkeypatch.setattr(reward, "attempt", attempt)
    rows = [_row(n, "fox " * (1 + 3 * n), "dog " * (7 - n)) for n in range(7)] + [_row(7, "fox " * 200, "dog")]
    judge = RewardModel(_source(folder), "cpu", 1, 1, "judge.max_length", None, Notify())
    found = judge(pa.Table.from_pylist(rows)).to_pylist()
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row, given in zip(found, rows, strict=True):
        conversation = [*given["prompt"], {"role": "assistant", "content": given["response"]}]
        ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]
        assert row["prompt_tokens"] == len(ids) and row["output_tokens"] == 0 and row["output"] is None
        if len(ids) > 128:
            assert row["score"] is None
            assert (
                row["failure"]["reason"] == "prompt_too_long"
                and "judge.max_length 128" in row["failure"]["detail"]
            )
            continue
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits.item()
        assert row["score"] == pytest.approx(expected, abs=1e-5) and row["failure"] is None
    assert [row["failure"] is None for row in found] == [True] * 7 + [False]


def test_batches_do_not_change_a_score(tiny_model: Path, tmp_path: Path) -> None:
    model = load_reward_model(_source(make_reward_model(tiny_model, tmp_path / "reward")), "cpu")
    sequences = [[5 + n, *range(20, 20 + 2 * n)] for n in range(9)]
    together, apart = rewards(model, sequences, 10_000), rewards(model, sequences, 1)
    assert together == pytest.approx(apart, abs=1e-5)
    assert len(set(together)) == 9


def test_what_is_no_reward_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no reward model: the weight score\.weight .* would be random"):
        load_reward_model(_source(_headless(tiny_model, tmp_path / "headless")), "meta")
    many = make_reward_model(tiny_model, tmp_path / "many", labels=3)
    with pytest.raises(ModelError, match="has 3 labels \\(LABEL_0, LABEL_1, LABEL_2\\)"):
        load_reward_model(_source(many), "meta")
    # A causal model that says nothing of labels has two by transformers' default.
    with pytest.raises(ModelError, match="has 2 labels"):
        load_reward_model(_source(tiny_model), "meta")
    with pytest.raises(ModelError, match="cannot load the reward model"):
        load_reward_model(replace(_source(tiny_model), name=str(tmp_path)), "meta")


def _headless(base: Path, folder: Path) -> Path:
    """A causal model whose configuration says that it has one label."""
    model = LlamaForCausalLM.from_pretrained(base)
    model.config.num_labels = 1
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_a_whole_reward_model_is_seen_without_its_weights(tiny_model: Path, tmp_path: Path) -> None:
    model = load_reward_model(_source(make_reward_model(tiny_model, tmp_path / "reward")), "meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
