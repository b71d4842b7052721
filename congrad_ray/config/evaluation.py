"""The section `evaluate` of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from congrad_ray.config.endpoint import Endpoint
from congrad_ray.config.fields import (
    Fraction,
    Positive,
    is_null,
)
from congrad_ray.config.settings import Settings


class Evaluate(Settings):
    """How the model is compared with others, its starting point above all."""

    sampled: bool = Field(True, description="one sampled answer per prompt beside the greedy one")
    temperature: float = Field(0.7, gt=0, description="of the sampled answers")
    top_p: Fraction = Field(0.9, description="of the sampled answers")
    max_tokens: Positive = Field(512, description="of an answer")
    baselines: list[Literal["start", "previous"]] = Field(
        ["start"],
        exclude_if=lambda names: names == ["start"],
        description="win rates against these: 'start' is M_0, 'previous' the model that the iteration began with; "
        "empty: against the references alone",
    )
    references: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        exclude_if=is_null,
        description="also against these answers: a file with the columns prompt, language, and response, output "
        "or chosen, of which those to the evaluation prompts are taken",
    )
    judge: str = Field("start", description="win rates: 'start' is M_0; else a folder or hub name")
    endpoint: Endpoint | None = Field(
        None, exclude_if=is_null, description="a server that judges in place of evaluate.judge"
    )
    judge_max_tokens: Positive = Field(512, description="a comparison that is cut off is unreadable")
    judge_max_length: Positive | None = Field(
        None,
        description="tokens of a comparison with the prompt and both answers; null: enough for the longest of "
        "them, as far as the judge's positions go",
    )
    min_prompts: Positive = Field(
        10, description="a win rate of fewer prompts with a readable comparison is not shown, only their number"
    )

    @model_validator(mode="after")
    def _against_something(self) -> Self:
        if len(set(self.baselines)) < len(self.baselines):
            raise ValueError(f"baselines named twice: {', '.join(self.baselines)}")
        if not self.baselines and self.references is None:
            raise ValueError("baselines is empty and there are no references: name one of them")
        if self.endpoint is not None and self.judge != "start":
            raise ValueError(f"the judge is {self.judge} and an endpoint: leave one of them out")
        return self
