"""Replicas that sketch an adapter: the one that training starts from, new or the policy's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow.fs import LocalFileSystem

from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import validate
from congrad_ray.data.tables import FAILURE, table_of
from congrad_ray.modeling.adapters import model_to_train, save_adapter
from congrad_ray.modeling.batching import collate_pairs
from congrad_ray.modeling.source import ModelSource
from congrad_ray.modeling.tokenization import tokenize_pair
from congrad_ray.rundir.directory import Folder
from congrad_ray.stages.sketch import stage as sketch_stage
from congrad_ray.stages.sketch.countsketch import CountSketch
from congrad_ray.stages.sketch.exact import pair_gradient
from congrad_ray.stages.sketch.replicas import ReplicaSpec, SketchReplica
from congrad_ray.stages.sketch.schema import sketch_numbers, sketches_schema

TEXTS = [
    ("How are you?", "Fine, the fox is quick.", "The dog"),
    ("Wie geht es dir?", "Der Fuchs ist schnell.", "Faul"),
    ("2 + 2", "4", "5 6 7 8 9 0 1 2 3"),
]
ROWS = [
    {
        "pair_id": f"pair-{number}",
        "language": "en",
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    for number, (prompt, chosen, rejected) in enumerate(TEXTS)
]


def recipe_for(model: Path, train: dict[str, Any], **sketch: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "test",
        "model": {"name": str(model), "dtype": "float32", "max_length": 64},
        "prompts": {"languages": ["en", "de"]},
        "generate": {"max_tokens": 16},
        "judge": {"max_tokens": 16},
        "evaluate": {"max_tokens": 16},
        "sketch": {"width": 256, "dtype": "float32", "max_tokens_per_batch": 256} | sketch,
        "train": train,
    }
    return validate(Recipe, values, "test")


@pytest.mark.parametrize("lora", [{"r": 4}, {"r": 4, "use_dora": True}], ids=["lora", "dora"])
def test_a_replica_sketches_the_adapter_that_training_starts_from(
    tiny_model: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    recipe = recipe_for(tiny_model, train={"seed": 3, "lora": lora})
    start = ModelSource(str(tiny_model), recipe.model)
    tokenizer, table = start.load_tokenizer(), pa.Table.from_pylist(ROWS)

    def sketches_of(source: ModelSource, recipe: Recipe = recipe) -> np.ndarray:
        found = SketchReplica(ReplicaSpec(source, recipe))(table).to_pylist()
        assert [row[FAILURE] for row in found] == [None] * 3
        width, dtype = recipe.sketch.width, recipe.sketch.dtype
        return sketch_numbers(table_of(found, sketches_schema(width, dtype)), dtype)

    adapted: Any = model_to_train(start, recipe.train, "cpu")
    sources = [start]
    for step in range(2):
        sketches = sketches_of(sources[-1])
        for row, sketch in zip(ROWS, sketches, strict=False):
            tokens = tokenize_pair(tokenizer, row["prompt"], row["chosen"], row["rejected"], 64)
            exact = pair_gradient(adapted.get_base_model(), collate_pairs([tokens], 2, "cpu"))
            assert any(".lora_A." in name for name in exact) == (step == 1)
            expected = CountSketch(recipe.sketch.width, 0).sketch_vector(exact).numpy()
            assert np.linalg.norm(sketch - expected) <= 1e-5 * np.linalg.norm(expected)
        # The next iteration's policy is the same adapter, trained.
        generator = torch.Generator().manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        folder = tmp_path / f"policy-{step}"
        save_adapter(adapted, folder, str(tiny_model))
        tokenizer.save_pretrained(folder)
        sources.append(ModelSource(str(folder), recipe.model, Folder(LocalFileSystem(), str(folder)), base=start))
    # The full layers, on request: those of the model with the adapter merged.
    linear = recipe_for(tiny_model, train={"lora": lora}, parameters="linear")
    merged = ModelSource(str(tmp_path / "merged"), recipe.model)
    sources[1].load_model("cpu").save_pretrained(merged.name)
    tokenizer.save_pretrained(merged.name)
    assert np.array_equal(sketches_of(sources[1], linear), sketches_of(merged, linear))


def test_what_an_adapters_sketches_depend_on_is_in_their_fingerprint(tiny_model: Path) -> None:
    def settings(lora: dict[str, Any] | None, seed: int = 0, **sketch: Any) -> Any:
        recipe = recipe_for(tiny_model, train={"lora": lora, "seed": seed}, **sketch)
        return sketch_stage.STAGE.settings(recipe, 0)

    plain = settings(None)
    assert len(plain) == 4 and plain == settings(None, seed=1)
    # Which layers' gradients alone matters, not how the training after it goes.
    assert plain == settings({"r": 4}, parameters="linear") == settings(None, parameters="linear")
    assert settings({"r": 4}) == settings({"r": 4, "merge": False, "lora_dropout": 0.1}, parameters="trained")
    different = [
        {"r": 8},
        {"r": 4, "lora_alpha": 4},
        {"r": 4, "use_dora": True},
        {"r": 4, "target_modules": ["q_proj"]},
    ]
    for lora in different:
        assert settings({"r": 4}) != settings(lora)
    assert settings({"r": 4}) != settings({"r": 4}, seed=1) != plain
