"""The section `judge` of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from congrad_ray.config.fields import (
    Fraction,
    Positive,
)
from congrad_ray.config.settings import Settings


class Judge(Settings):
    """How responses are scored."""

    model: str = Field("policy", description="'policy' judges itself; else a folder or hub name")
    rubric: str = Field("additive", description="a built-in rubric's name or a folder of <language>.txt")
    method: Literal["expected_score", "sampled"] = Field(
        "sampled", description="expected value over the score token, or the mean of sampled judgements"
    )
    samples: Positive = Field(3, description="judgements per response; 'sampled' only")
    temperature: float = Field(0.7, ge=0, description="'sampled' only")
    top_p: Fraction = Field(0.9, description="'sampled' only")
    max_tokens: Positive = Field(512, description="'sampled' only; a judgement that is cut off is unreadable")
    max_length: Positive | None = Field(
        None, description="tokens of a judgement with all that it is about; null: model.max_length"
    )
    min_probability_mass: float = Field(
        0.0,
        ge=0,
        le=1,
        description="'expected_score' takes the score tokens alone and divides by their probability together. "
        "Models spread much of it over other first words, so any is enough by default; it is reported, with a "
        "warning where it is tiny. Above 0: a judgement with less is unreadable",
    )
