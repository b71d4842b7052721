"""A tiny random chat model, and preference pairs with its own reference log-probabilities."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from congrad_ray.data.tables import pair_id, prompt_id, table_of
from congrad_ray.modeling.batching import collate_pairs
from congrad_ray.modeling.logprobs import completion_logprobs
from congrad_ray.modeling.tokenization import load_tokenizer, tokenize_pair
from congrad_ray.rundir.directory import RunDirectory, StageFolder
from congrad_ray.stages.select.schema import SELECTED

os.environ["HF_HUB_OFFLINE"] = "1"

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers over characters, saved as a checkpoint with tokenizer and chat template."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>"]
    vocabulary = {token: number for number, token in enumerate(special + list("abcdefghijklmnopqrstuvwxyz .?!"))}
    characters = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=True,
            attention_dropout=0.1,
        )
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _preference_rows(model_folder: Path, count: int) -> list[dict[str, Any]]:
    """Rows of tables.SELECTED: the chosen answers speak of cats, the rejected ones of dogs, in two 'languages'."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(str(model_folder))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    rows = []
    for number in range(count):
        language = "en" if number % 2 else "sw"
        prompt = [{"role": "user", "content": f"who are you {chr(97 + number % 26)}?" + " ok" * (number % 5)}]
        identifier = prompt_id(language, [*prompt, {"role": "user", "content": str(number)}])
        chosen = [{"role": "assistant", "content": "a cat" + " purrs" * (number % 4)}]
        rejected = [{"role": "assistant", "content": "the dog" + " barks" * (number % 3)}]
        pair = tokenize_pair(tokenizer, prompt, chosen, rejected, 256)
        with torch.no_grad():
            logps = completion_logprobs(model, collate_pairs([pair], 0)).tolist()
        rows.append(
            {
                "pair_id": pair_id(identifier, 0),
                "language": language,
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "ref_chosen_logps": logps[0],
                "ref_rejected_logps": logps[1],
                "congrad_score": 0.5,
                "prompt_tokens": len(pair.prompt_ids),
                "chosen_tokens": len(pair.chosen_ids),
                "rejected_tokens": len(pair.rejected_ids),
                "chosen_score": 4.0,
                "rejected_score": 1.0,
            }
        )
    return rows


@pytest.fixture(scope="session")
def preference_rows() -> Callable[[Path, int], list[dict[str, Any]]]:
    return _preference_rows


MakeSelection = Callable[..., StageFolder]


@pytest.fixture
def make_selection(tiny_model: Path) -> MakeSelection:
    """Makes a finished selection stage of `count` pairs in a run directory; `change` edits its rows."""

    def make(
        run: RunDirectory, count: int, change: Callable[[list[dict[str, Any]]], None] | None = None
    ) -> StageFolder:
        rows = _preference_rows(tiny_model, count)
        if change:
            change(rows)
        selection = run.stage("selection", 0)
        selection.write_table("selected.parquet", table_of(rows, SELECTED))
        return selection

    return make


@pytest.fixture
def ray_cluster(shared_ray: None) -> None:
    """A local Ray with enough logical CPUs for two workers."""
