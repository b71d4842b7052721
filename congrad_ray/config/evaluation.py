"""The section `evaluate` of a recipe."""

from __future__ import annotations

from pydantic import Field

from congrad_ray.config.fields import (
    Fraction,
    Positive,
)
from congrad_ray.config.settings import Settings


class Evaluate(Settings):
    """How the model is compared with its starting point."""

    sampled: bool = Field(True, description="one sampled answer per prompt beside the greedy one")
    temperature: float = Field(0.7, gt=0, description="of the sampled answers")
    top_p: Fraction = Field(0.9, description="of the sampled answers")
    max_tokens: Positive = Field(512, description="of an answer")
    judge: str = Field("start", description="win rates: 'start' is M_0; else a folder or hub name")
    judge_max_tokens: Positive = Field(512, description="a comparison that is cut off is unreadable")
    judge_max_length: Positive | None = Field(
        None,
        description="tokens of a comparison with the prompt and both answers; null: enough for the longest of "
        "them, as far as the judge's positions go",
    )
    min_prompts: Positive = Field(
        10, description="a win rate of fewer prompts with a readable comparison is not shown, only their number"
    )
