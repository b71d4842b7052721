"""ZeRO 3 on two workers whose completions differ in length, with an output embedding that is partitioned."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from congrad_ray.config.recipe import Recipe
from congrad_ray.config.training import Lora
from congrad_ray.data.tables import table_of
from congrad_ray.modeling.batching import collate_pairs
from congrad_ray.modeling.logprobs import chunk_tokens_of, completion_logprobs
from congrad_ray.modeling.source import ModelSource
from congrad_ray.modeling.tokenization import load_tokenizer, tokenize_pair
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.select.schema import SELECTED
from congrad_ray.stages.train.loop import TrainingJob, start
from congrad_ray.stages.train.policy import save_policy
from plain_training import largest_difference, plain_training, recipe_of, weights_of

# Llama 3's. Its output embedding has 4 million numbers here: DeepSpeed leaves up to 100,000 whole on every worker.
VOCABULARY, HIDDEN = 128_256, 32
LENGTHS = (900, 100)  # tokens of a completion: several chunks of logits, and one


def make_model(folder: Path, tokenizer_of: Path, tied: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in tokenizer_of.iterdir():
        if file.name.startswith(("tokenizer", "special", "chat_template")):
            shutil.copy(file, folder)


def rows_of(model_folder: Path) -> list[dict[str, Any]]:
    """A pair for each worker, with the model's own reference."""
    tokenizer = load_tokenizer(str(model_folder))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    rows = []
    for number, length in enumerate(LENGTHS):
        texts = {"prompt": "who are you", "chosen": "ab" * (length // 2), "rejected": "ba " * (length // 3)}
        messages = {
            name: [{"role": "user" if name == "prompt" else "assistant", "content": text}]
            for name, text in texts.items()
        }
        pair = tokenize_pair(tokenizer, max_length=2000, **messages)
        with torch.no_grad():
            logps = completion_logprobs(model, collate_pairs([pair], 0)).tolist()
        rows.append(
            {
                "pair_id": f"pair-{number}",
                "language": "en",
                **messages,
                "ref_chosen_logps": logps[0],
                "ref_rejected_logps": logps[1],
                "congrad_score": 0.5,
                "prompt_tokens": len(pair.prompt_ids),
                "chosen_tokens": len(pair.chosen_ids),
                "rejected_tokens": len(pair.rejected_ids),
                "chosen_score": None,
                "rejected_score": None,
            }
        )
    return rows


def train(rank: int, folder: str, recipe: Recipe) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    run = RunDirectory.open(folder)
    source = ModelSource(recipe.model.name, recipe.model)
    job = TrainingJob(recipe, source, run.stage("selection", 0), run.stage("policy", 0), threads=1)
    trainer = start(job, f"{folder}/scratch-{rank}", torch.device("cpu"), 2, None)
    trainer.args.save_strategy = "no"
    trainer.train()
    save_policy(trainer, source, recipe.train, job.output)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("tied", "checkpointing", "lora"),
    [
        pytest.param(True, False, None, marks=pytest.mark.slow, id="tied"),
        pytest.param(False, True, None, id="untied"),
        pytest.param(True, True, Lora(r=4), id="lora"),
        pytest.param(False, False, Lora(r=4, use_dora=True), marks=pytest.mark.slow, id="dora"),
    ],
)
def test_workers_with_different_numbers_of_chunks(
    tmp_path: Path, tiny_model: Path, tied: bool, checkpointing: bool, lora: Lora | None
) -> None:
    chunks = [2 * length // chunk_tokens_of(VOCABULARY, "cpu") for length in LENGTHS]
    assert chunks[0] > 2 and chunks[1] == 0
    model = tmp_path / "model"
    make_model(model, tiny_model, tied)
    rows = rows_of(model)
    recipe = recipe_of(
        model,
        batch_size=2,
        max_tokens_per_batch=1,
        max_steps=3,
        warmup_ratio=0.0,
        lr_scheduler_type="constant",
        zero_stage=3,
        gradient_checkpointing=checkpointing,
        lora=lora,
    )
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"max_length": 2000})})
    RunDirectory.open(tmp_path).stage("selection", 0).write_table("selected.parquet", table_of(rows, SELECTED))
    multiprocessing.spawn(train, (str(tmp_path), recipe), nprocs=2)

    trained = weights_of(tmp_path / "iteration-0/policy")
    expected = plain_training(model, rows, recipe.train, max_length=2000)
    assert largest_difference(trained, weights_of(model)) > 1e-3
    for name, value in expected.items():
        # Where a gradient is next to nothing Adam's steps are anybody's.
        differs = (trained[name] - value).abs() > recipe.train.learning_rate / 10
        assert differs.float().mean() < 1e-3, name
