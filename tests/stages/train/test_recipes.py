"""Every recipe for a real model goes through sketch, select and train: same family and vocabulary, tiny layers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from congrad_ray.config.profile import load_profile
from congrad_ray.config.recipe import BUILTIN_WORLD, load_recipe
from congrad_ray.data.tables import table_of
from congrad_ray.modeling.source import named_model
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.pair.schema import PAIRS
from congrad_ray.stages.select import stage as select
from congrad_ray.stages.sketch import stage as sketch
from congrad_ray.stages.train import stage as train
from congrad_ray.stages.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "tests" / "planning" / "configs"
RECIPES = [
    path
    for path in sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))
    if load_recipe(path).model.name != BUILTIN_WORLD  # the demo's tests do that one
]
LONGEST, MAX_LENGTH, STEPS = 300, 384, 2


def model_like(config_file: Path, folder: Path) -> Path:
    """A random model with the vocabulary and tied weights that the configuration has, and little else of it."""
    values = json.loads(config_file.read_text())
    groups = values["num_attention_heads"] // values["num_key_value_heads"]
    small = {
        "num_hidden_layers": 2,
        "hidden_size": 8 * groups,
        "intermediate_size": 32,
        "num_attention_heads": 2 * groups,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = AutoConfig.for_model(**{**values, **small})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert model.get_input_embeddings().weight.shape[0] == values["vocab_size"]
    model.save_pretrained(folder)
    words(values["vocab_size"], config.eos_token_id).save_pretrained(folder)
    return folder


def words(size: int, end: int | list[int]) -> PreTrainedTokenizerFast:
    """A tokenizer of the words w0, w1, ... for all ids but that of the end."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    vocabulary = {f"w{place}": place for place in range(size)}
    first = end if isinstance(end, int) else end[0]
    del vocabulary[f"w{first}"]  # a special token w1 would be cut out of w17
    vocabulary["</s>"] = first
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=f"w{size - 1}"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}{{ 'w3 ' if m.role == 'user' else 'w4 ' }}{{ m.content + ' ' + eos_token + ' ' }}"
        "{% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
    )
    return fast


def pairs_of(vocabulary: int, count: int) -> list[dict[str, Any]]:
    """Pairs in two languages whose completions have 5 to LONGEST tokens, so that no two workers have like rows."""
    draw = random.Random(0)

    def message(role: str, length: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(f"w{draw.randrange(5, vocabulary)}" for _ in range(length))}]

    lengths = [5 + round((LONGEST - 5) * place / (2 * count - 1)) for place in range(2 * count)]
    draw.shuffle(lengths)
    return [
        {
            "pair_id": f"pair-{number:02}",
            "prompt_id": f"prompt-{number:02}",
            "language": ("en", "hi")[number % 2],
            "prompt": message("user", draw.randrange(3, 30)),
            "chosen": message("assistant", lengths[2 * number]),
            "rejected": message("assistant", lengths[2 * number + 1]),
            "chosen_score": 4.0,
            "rejected_score": 2.0,
            "chosen_response_id": f"c{number}",
            "rejected_response_id": f"r{number}",
        }
        for number in range(count)
    ]


@pytest.fixture(autouse=True)
def _a_ray_of_the_profile() -> Iterator[None]:
    import ray

    ray.shutdown()
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_rehearsed(path: Path, tmp_path: Path, warned: Callable[[], list[str]]) -> None:
    config = CONFIGS / path.stem / "config.json"
    assert config.exists(), f"write {config}: the model's own, as in the folders beside it"
    model = model_like(config, tmp_path / "model")
    recipe = load_recipe(
        path,
        [
            f"model.name={model}",
            f"model.max_length={MAX_LENGTH}",
            "generate.max_tokens=32",
            "judge.max_tokens=64",
            "evaluate.max_tokens=32",
            f"sketch.max_tokens_per_batch={4 * MAX_LENGTH}",
            "sketch.audit_pairs=0",
            f"train.max_steps={STEPS}",
            "train.save_steps=1",
        ],
    )
    profile, run, count = load_profile("local"), RunDirectory.open(tmp_path / "run"), 8
    assert profile.trainers.num_workers == 2
    pairs = run.stage("pairs", 0)
    rows = pairs_of(AutoConfig.from_pretrained(model).vocab_size, count)
    pairs.write_table("pairs.parquet", table_of(rows, PAIRS))
    pairs.commit("pair", 0, "pairs", None, {}, count, 0.0, {})
    done = [run_stage(stage, recipe, profile, run) for stage in (sketch.STAGE, select.STAGE, train.STAGE)]

    assert [manifest.rows for manifest in done[:2]] == [count, count]
    assert done[2].rows == round(count * recipe.select.keep)
    assert not warned()  # of a reference that is another's, or idle workers
    metrics = read_metrics(run.stage("policy", 0))
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in metrics)
    trained = named_model(run.stage("policy", 0).path, recipe.model).load_model("cpu")
    before = named_model(str(model), recipe.model).load_model("cpu")
    assert trained.config.tie_word_embeddings == before.config.tie_word_embeddings
    tied = trained.get_output_embeddings().weight is trained.get_input_embeddings().weight
    assert tied == before.config.tie_word_embeddings
    assert all(weight.isfinite().all() for weight in trained.parameters())
    # bfloat16 rounds away most of a step of 5e-7; some of it has to be there.
    assert any(
        not torch.equal(old, new) for old, new in zip(before.parameters(), trained.parameters(), strict=True)
    )
