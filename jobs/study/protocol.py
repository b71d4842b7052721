"""What the study compares, written down before its seeds are run: the strict models of a protocol YAML."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from congrad_ray.config.fields import Fraction, Language, Positive
from congrad_ray.config.recipe import Recipe, Select
from congrad_ray.config.settings import Settings, read_yaml, validate
from congrad_ray.world.corpus import JudgeBias

ORACLE = "oracle"
START = "start"
# Keeps the pairs of the largest true margin, of each language or of all.
Oracle = Literal["oracle", "oracle_overall"]
EVERYTHING = "all"


class Variant(Settings):
    """A version of the world: whose judgements are biased, and of which language there are few pairs."""

    judge: dict[Language, JudgeBias] = Field(
        default_factory=dict, description="bias by language, taught to the judge; none: the model judges itself"
    )
    pairs: dict[Language, Positive] = Field(
        default_factory=dict, description="maximum number of pairs by language"
    )


class Block(Settings):
    """Cells to run: every combination of these."""

    seeds: list[int] = Field(min_length=1)
    variants: list[str] = Field(min_length=1)
    strategies: list[str] = Field(min_length=1)
    keeps: list[Fraction] = Field(min_length=1)
    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)
    iterations: Positive = Field(1, description="above 1: the pipeline itself, self-rewarding")


class ExactCheck(Settings):
    """Selections that are repeated with exact gradients instead of sketches."""

    seeds: list[int] = Field(default_factory=list)
    variants: list[str] = Field(default_factory=list)
    keep: Fraction = 0.5


class Evaluation(Settings):
    """Fresh prompts whose sampled answers get their true score."""

    prompts_per_language: Positive = Field(300, description="kinds of task that are trained on, each language")
    held_out_prompts_per_language: Positive = Field(100, description="kinds of task that are not trained on")
    max_tokens: Positive = 48
    batch_size: Positive = 256
    seed: int = 0


class Protocol(Settings):
    """The whole study."""

    recipe: Recipe
    held_out_kinds: list[str] = Field(min_length=1, description="kinds of task not among the training prompts")
    evaluation: Evaluation = Evaluation()
    variants: dict[str, Variant]
    strategies: dict[str, Select | Oracle]
    tuning: Block
    blocks: list[Block]
    exact: ExactCheck = ExactCheck()

    @model_validator(mode="after")
    def _known(self) -> Self:
        for block in (self.tuning, *self.blocks):
            for name, known in (("variants", self.variants), ("strategies", self.strategies)):
                unknown = sorted(set(getattr(block, name)) - set(known))
                if unknown:
                    raise ValueError(f"no such {name}: {', '.join(unknown)}; known are {', '.join(known)}")
            if block is not self.tuning and set(block.seeds) & set(self.tuning.seeds):
                raise ValueError("a seed that hyperparameters were chosen on must not be compared on")
        return self


@dataclass(frozen=True)
class Cell:
    """One trained model: a seed's start, trained on one strategy's selection from one variant's pairs."""

    seed: int
    variant: str
    strategy: str
    keep: float
    learning_rate: float
    iterations: int = 1


def cells(block: Block) -> Iterator[Cell]:
    """The cells of a block. `all` keeps everything, so it has one cell whatever the keep ratios."""
    for variant in block.variants:
        for rate in block.learning_rates:
            for strategy in block.strategies:
                for keep in [1.0] if strategy == EVERYTHING else block.keeps:
                    for seed in block.seeds:
                        yield Cell(seed, variant, strategy, keep, rate, block.iterations)


def load_protocol(path: str | Path) -> Protocol:
    """The protocol in a YAML file. Raises SettingsError."""
    return validate(Protocol, read_yaml(Path(path)), f"protocol {path}")
