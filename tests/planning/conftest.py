"""The published shapes of two models, written out by hand, and a recipe."""

from pathlib import Path

import pytest

from congrad_ray.config.recipe import Model, Recipe
from congrad_ray.config.settings import validate
from congrad_ray.modeling.shape import ModelShape, read_shape

CONFIGS = Path(__file__).parent / "configs"


@pytest.fixture(scope="session")
def llama() -> ModelShape:
    """Llama-3-8B."""
    return read_shape(str(CONFIGS / "llama3-8b"), Model())


@pytest.fixture(scope="session")
def gemma() -> ModelShape:
    """Gemma-2-2B."""
    return read_shape(str(CONFIGS / "gemma2-2b"), Model())


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """Two languages of 100 prompts, of the sizes of a real run."""
    return validate(
        Recipe,
        {
            "name": "test",
            "model": {"name": str(CONFIGS / "llama3-8b")},
            "prompts": {
                "evaluation": {"name": "prompts.jsonl"},
                "languages": ["en", "de"],
                "unseen_languages": ["fr"],
                "train_per_language": 100,
                "evaluation_per_language": 10,
            },
            "generate": {"num_generations": 4, "max_tokens": 512},
            "train": {"batch_size": 32, "max_tokens_per_batch": 4096, "gradient_checkpointing": True},
        },
        "test",
    )
