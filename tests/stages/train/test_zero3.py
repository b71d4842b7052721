"""ZeRO 3 on two workers whose completions differ in length, with an output embedding that is partitioned."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing
from transformers import LlamaConfig, LlamaForCausalLM

from congrad_ray.config.recipe import Model, Train
from congrad_ray.modeling.batching import collate_pairs
from congrad_ray.modeling.logprobs import chunk_tokens_of, completion_logprobs
from congrad_ray.modeling.source import ModelSource
from congrad_ray.modeling.tokenization import TokenizedPair
from congrad_ray.stages.train.engine import consolidated_weights, start_engine
from congrad_ray.stages.train.schedule import make_schedule

# Llama 3's. Its output embedding has 4 million numbers here: DeepSpeed leaves up to 100,000 whole on every worker.
VOCABULARY, HIDDEN = 128_256, 32
LENGTHS = (900, 100)  # tokens of a completion, by worker: several chunks of logits, and one
LEARNING_RATE = 1e-2


def pairs_of(worker: int) -> list[TokenizedPair]:
    tokens = torch.randint(3, VOCABULARY, (2, LENGTHS[worker]), generator=torch.Generator().manual_seed(worker))
    return [TokenizedPair([5, 6, 7], *tokens.tolist())]


def objective(logps: torch.Tensor) -> torch.Tensor:
    return (logps[1] - logps[0]) / 1000


def train_step(rank: int, folder: str, tied: str, checkpointing: bool) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store-{tied}", rank=rank, world_size=2)
    train = Train(
        learning_rate=LEARNING_RATE,
        batch_size=2,
        micro_batch_size=1,
        zero_stage=3,
        gradient_checkpointing=checkpointing,
        max_grad_norm=1e9,
    )
    source = ModelSource(f"{folder}/{tied}", Model(dtype="float32"))
    engine, _ = start_engine(train, make_schedule(train, 2, 2), source, torch.device("cpu"))
    batch = collate_pairs(pairs_of(rank), 0)
    logps = engine(batch.input_ids, batch.attention_mask, batch.completion_mask)
    engine.backward(objective(logps))
    engine.step()
    weights = consolidated_weights(engine)
    torch.save((logps.detach(), weights), f"{folder}/result-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("tied", "checkpointing"), [pytest.param("tied", False, marks=pytest.mark.slow), ("untied", True)]
)
def test_workers_with_different_numbers_of_chunks(tmp_path: Path, tied: str, checkpointing: bool) -> None:
    chunks = [2 * length // chunk_tokens_of(VOCABULARY, "cpu") for length in LENGTHS]
    assert chunks[0] > 2 and chunks[1] == 0
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied == "tied",
        )
    )
    model.save_pretrained(tmp_path / tied)
    multiprocessing.spawn(train_step, (str(tmp_path), tied, checkpointing), nprocs=2)
    found: list[Any] = [torch.load(tmp_path / f"result-{rank}.pt", weights_only=True) for rank in range(2)]

    # The same step in one process, each worker's objective averaged: Adam's first step goes by the sign.
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for rank, (logps, _) in enumerate(found):
        expected = completion_logprobs(model, collate_pairs(pairs_of(rank), 0))
        torch.testing.assert_close(logps, expected.detach(), rtol=1e-5, atol=1e-2)
        (objective(expected) / 2).backward()
    optimizer.step()
    weights = found[0][1]
    for name, value in model.state_dict().items():
        # Where a gradient is next to nothing its sign is anybody's.
        differs = (weights[name] - value).abs() > LEARNING_RATE / 10
        assert differs.float().mean() < 1e-3, name
