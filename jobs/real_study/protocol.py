"""What the study on a real model compares, written down before its seeds are run: the protocol's models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from congrad_ray.config.fields import Fraction, Language, Positive, TensorType
from congrad_ray.config.recipe import Model, Recipe, Select, Sketch
from congrad_ray.config.settings import Settings, read_yaml, validate
from congrad_ray.config.training import Train

DatasetName = Literal["alpaca", "tata"]
DATASETS: tuple[DatasetName, ...] = ("alpaca", "tata")
KeepRule = Literal["per_language", "overall", "threshold"]
# Knows which labels were flipped; keeps of each language, or of all.
Oracle = Literal["oracle", "oracle_overall"]
ALL = "all"
START = "start"

# Of each kind of result, what it is about; see study.results.
KEYS: dict[str, dict[str, Any]] = {
    "labels": {"dataset": str},
    "cosines": {"dataset": str},
    "selection": {"dataset": str, "planting": str, "strategy": str},
    "against": {"against": str, "strategy": str},
    "start": {},
    "cell": {"variant": str, "strategy": str, "seed": int, "learning_rate": (int, float)},
}


class Alpaca(Settings):
    """Pairs of preferences.jsonl, whose files of languages have the same instructions in the same order."""

    max_prompt_tokens: Positive = Field(64, description="longer prompts are left out")
    max_response_tokens: Positive = Field(48, description="both responses are cut to no more than this")
    min_response_tokens: Positive = Field(16, description="pairs that would be cut to less are left out")
    dtype: TensorType = Field("float32", description="that pairs are sketched in")
    rows: Positive = Field(300, description="so many first rows of each language are selected from")
    gap: Positive = Field(20, description="rows after them that are not used: more than the languages drift apart")
    pairs_per_language: Positive = Field(80, description="to select from")
    held_out_per_language: Positive = Field(40, description="from the rows after the gap")


class Tata(Settings):
    """Pairs of tata.jsonl with a chosen response that people found understandable and true."""

    max_tokens: Positive = Field(600, description="of prompt and both responses; larger pairs are left out")
    pairs_per_language: Positive = Field(60, description="to select from")
    min_pairs: Positive = Field(12, description="a language with fewer pairs is left out")
    held_out_share: Fraction = Field(0.2, description="of the tables, each in all its languages")
    dtype: TensorType = Field("float32", description="that pairs are sketched in")


class Planting(Settings):
    """Labels that are made wrong on purpose."""

    languages: int = Field(0, ge=0, description="how many languages are planted in, drawn in each draw")
    share: float = Field(0.4, ge=0, le=1, description="of their pairs have their labels flipped")
    elsewhere: float = Field(0.0, ge=0, le=1, description="share flipped in all other languages")
    longer: bool = Field(False, description="in those languages the longer response is chosen, instead of flips")
    datasets: list[DatasetName] = Field(list(DATASETS), min_length=1)

    @property
    def nothing(self) -> bool:
        """Whether labels stay as they are."""
        return not (self.languages or self.elsewhere)


class Strategy(Select):
    """A section `select`, and what the study varies beside it."""

    normalise: Literal["nothing", "tokens", "norm"] = Field(
        "nothing",
        description="what each pair's gradient is divided by before the mean: its response's tokens, its length",
    )
    blocks: list[int] = Field(default_factory=list, description="blocks of layers alone, from 0; none: all")


class Selection(Settings):
    """The study of what is kept."""

    draws: Positive = 40
    share: Fraction = Field(0.75, description="of each language's pairs, drawn in each draw")
    keep: Fraction = 0.5
    rules: list[KeepRule] = Field(
        ["per_language", "overall", "threshold"],
        min_length=1,
        description="each strategy is tried with all; one with another rule than per_language is for training",
    )
    detailed: str = Field("flipped2", description="the planting that more is said about")
    blocks: list[list[int]] = Field(
        default_factory=list, description="blocks of layers that `block_strategies` are repeated on, from 0"
    )
    block_strategies: list[str] = Field(default_factory=list)
    block_plantings: list[str] = Field(default_factory=list)
    subset_per_language: Positive = Field(
        12, description="pairs of alpaca that are compared with exact gradients and with the embedding's"
    )
    subset_strategies: list[str] = Field(default_factory=list)


class Connectives(Settings):
    """What joins a premise and its alternative, by XCOPA's question."""

    cause: str = Field(min_length=1, description="because")
    effect: str = Field(min_length=1, description="therefore")


class Measures(Settings):
    """What is measured of a trained model."""

    held_out_per_language: Positive = Field(24, description="held-out pairs of alpaca, in each of its languages")
    tata_languages: list[Language] = Field(["sw", "yo", "ha", "ig"], description="never trained on")
    tata_per_language: Positive = 12
    xcopa: dict[Language, Connectives] = Field(default_factory=dict, description="languages asked in")
    xcopa_per_language: Positive = 40


class Training(Settings):
    """The study of what a selection is worth."""

    languages: list[Language] = Field(min_length=2, description="of alpaca, trained on; its others are unseen")
    train: Train
    dtype: TensorType = Field("float32", description="of training and of measuring")
    share: Fraction = Field(0.75, description="of each language's pairs, drawn by the seed")
    keep: Fraction = 0.5
    variants: list[str] = Field(min_length=1, description="plantings")
    strategies: list[str] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    learning_rate: Annotated[float, Field(gt=0)]
    tuning_seeds: list[int] = Field(min_length=1)
    tuning_learning_rates: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)
    measures: Measures = Measures()


class Protocol(Settings):
    """The whole study."""

    seed: int = Field(0, ge=0, description="of the pairs that are drawn from the files")
    max_length: Positive = Field(1024, description="tokens of a prompt with one response")
    sketch: Sketch
    pairs_per_piece: Positive = Field(16, description="what a kill can cost of the sketching")
    alpaca: Alpaca = Alpaca()
    tata: Tata = Tata()
    plantings: dict[str, Planting]
    strategies: dict[str, Strategy | Oracle]
    selection: Selection
    training: Training

    @model_validator(mode="after")
    def _known(self) -> Self:
        selection, training = self.selection, self.training
        for names, known, where in (
            (selection.block_strategies, self.strategies, "selection.block_strategies"),
            (selection.subset_strategies, self.strategies, "selection.subset_strategies"),
            (training.strategies, self.strategies, "training.strategies"),
            (training.variants, self.plantings, "training.variants"),
            ([selection.detailed], self.plantings, "selection.detailed"),
            (selection.block_plantings, self.plantings, "selection.block_plantings"),
        ):
            unknown = sorted(set(names) - set(known))
            if unknown:
                raise ValueError(f"{where}: no such {', '.join(unknown)}; known are {', '.join(known)}")
        for blocks in selection.blocks:
            if not blocks or not set(blocks) <= set(range(self.sketch.groups)):
                raise ValueError(f"selection.blocks: {blocks}; sketch.groups ({self.sketch.groups}) counts from 0")
        if set(training.seeds) & set(training.tuning_seeds):
            raise ValueError("a seed that the learning rate was chosen on must not be compared on")
        for name, strategy in self.strategies.items():
            if not isinstance(strategy, str) and strategy.keep_rule == "token_budget":
                raise ValueError(f"strategies.{name}: the study has no keep_rule 'token_budget'; leave it out")
        for variant in training.variants:
            if "alpaca" not in self.plantings[variant].datasets:
                raise ValueError(f"training.variants: {variant} is not a planting of alpaca, which is trained on")
        return self


@dataclass(frozen=True)
class Cell:
    """One trained model."""

    variant: str
    strategy: str
    seed: int
    learning_rate: float


def cells(protocol: Protocol) -> Iterator[Cell]:
    """The cells of the comparison, seed by seed, so that an unfinished study has whole seeds.

    An oracle is left out where no label is wrong: it would be `random` there.
    """
    training = protocol.training
    for seed in training.seeds:
        for variant in training.variants:
            for strategy in training.strategies:
                oracle = isinstance(protocol.strategies[strategy], str)
                if not (oracle and protocol.plantings[variant].nothing):
                    yield Cell(variant, strategy, seed, training.learning_rate)


def tuning_cells(training: Training) -> Iterator[Cell]:
    """The cells that the learning rate is chosen on: plain training on all pairs, on seeds of their own."""
    for seed in training.tuning_seeds:
        for rate in training.tuning_learning_rates:
            yield Cell(training.variants[0], ALL, seed, rate)


def load_protocol(path: str | Path) -> Protocol:
    """The protocol in a YAML file. Raises SettingsError."""
    return validate(Protocol, read_yaml(Path(path)), f"protocol {path}")


def recipe_for(protocol: Protocol, model: str, chat_template: Path, dtype: TensorType = "float32") -> Recipe:
    """What the library's stages are told: the model, and how its gradients are sketched."""
    return validate(
        Recipe,
        {
            "name": "real study",
            "model": Model(
                name=model,
                dtype=dtype,
                max_length=protocol.max_length,
                chat_template=chat_template.read_text(encoding="utf-8"),
            ),
            "prompts": {"languages": ["und"]},
            "generate": {"max_tokens": 1},  # nothing is generated
            "judge": {"max_tokens": 1},
            "evaluate": {"max_tokens": 1},
            "sketch": protocol.sketch,
            "train": Train(),
        },
        "the study's recipe",
    )
