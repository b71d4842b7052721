"""The section `judge` of a recipe."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from congrad_ray.config.endpoint import Endpoint
from congrad_ray.config.fields import (
    Fraction,
    Positive,
    TensorType,
    is_null,
)
from congrad_ray.config.settings import Settings

Ending = Literal["expected_score", "sampled", "structured"]
JudgeMethod = Literal["expected_score", "sampled", "reward_model", "pairwise"]


class OneJudge(Settings):
    """A model that scores responses, and how it is asked."""

    model: str = Field("policy", description="'policy' judges itself; else a folder or hub name")
    endpoint: Endpoint | None = Field(
        None, exclude_if=is_null, description="a model behind HTTP that judges in place of `model`"
    )
    rubric: str = Field("additive", description="a built-in rubric's name or a folder of <language>.txt")
    method: JudgeMethod = Field(
        "sampled",
        description="the mean of sampled judgements; expected_score: expected value over the score token; "
        "reward_model: what a sequence classifier gives prompt and response, in units of its own; pairwise: share "
        "of comparisons won, times 5",
    )
    structured: bool = Field(
        False,
        exclude_if=operator.not_,
        description="'sampled' only: the judge can write nothing but a JSON object with reasons and score",
    )
    samples: Positive = Field(3, description="judgements per response; 'sampled' only")
    comparisons: Positive | None = Field(
        None,
        exclude_if=is_null,
        description="'pairwise' only: pairs compared of each prompt's responses, each in both orders; null: all",
    )
    temperature: float = Field(0.7, ge=0, description="'sampled' only")
    top_p: Fraction = Field(0.9, description="'sampled' only")
    top_k: Positive | None = Field(
        None, exclude_if=is_null, description="'sampled' only: sample from so many tokens; null: from all"
    )
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        exclude_if=operator.not_,
        description="'sampled' only: tokens less likely than this share of the likeliest are left out",
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        exclude_if=lambda penalty: penalty == 1.0,
        description="above 1 tokens that are there already become less likely; 'sampled' and 'pairwise'",
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        exclude_if=operator.not_,
        description="texts at which a judgement ends; 'sampled' and 'pairwise'",
    )
    max_tokens: Positive = Field(
        512, description="of a judgement, 'sampled' and 'pairwise'; one that is cut off is unreadable"
    )
    max_length: Positive | None = Field(
        None,
        description="tokens of a judgement with all that it is about; null: model.max_length, and room for a "
        "second response for 'pairwise'; a server has a length of its own",
    )
    dtype: TensorType | None = Field(
        None, exclude_if=is_null, description="of the judge's weights; null: model.dtype"
    )
    min_probability_mass: float = Field(
        0.0,
        ge=0,
        le=1,
        description="'expected_score' takes the score tokens alone and divides by their probability together. "
        "Models spread much of it over other first words, so any is enough by default; it is reported, with a "
        "warning where it is tiny. Above 0: a judgement with less is unreadable",
    )

    @property
    def writes(self) -> int:
        """The most tokens that it writes for one judgement."""
        return {"expected_score": 1, "reward_model": 0}.get(self.method, self.max_tokens)

    @property
    def ending(self) -> Ending:
        """How its rubric ends, where it has one."""
        if self.structured:
            return "structured"
        return "expected_score" if self.method == "expected_score" else "sampled"

    @property
    def called(self) -> str:
        """What it is called on the screen and in tables."""
        return self.endpoint.model if self.endpoint else self.model

    def judgements_of(self, responses: int) -> int:
        """How many judgements a prompt with this many responses takes."""
        if self.method == "pairwise":
            return 2 * len(compared(responses, self.comparisons))
        return responses * (self.samples if self.method == "sampled" else 1)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.endpoint is not None:
            if self.model != "policy":
                raise ValueError(
                    f"judge.endpoint ({self.endpoint.model}) and judge.model ({self.model}) both name a judge: "
                    "leave one of them out (a second judge goes to judge.also)"
                )
            if self.method == "reward_model":
                raise ValueError(
                    "judge.method reward_model needs judge.model, a checkpoint; a server (judge.endpoint) answers "
                    "chats: set judge.method to sampled, pairwise, or expected_score"
                )
            if self.dtype is not None:
                raise ValueError(
                    "judge.dtype is for judge.model; a server (judge.endpoint) has its own: leave it out"
                )
        if self.method == "reward_model" and self.model == "policy":
            raise ValueError(
                "judge.method reward_model needs a judge.model of its own, a checkpoint for sequence "
                "classification with one label; the policy is none"
            )
        if self.structured and self.method != "sampled":
            raise ValueError(f"judge.structured is for judge.method sampled (found {self.method}): leave it out")
        if self.comparisons is not None and self.method != "pairwise":
            raise ValueError(f"judge.comparisons is for judge.method pairwise (found {self.method}): leave it out")
        if self.dtype is not None and self.model == "policy":
            raise ValueError(
                "judge.dtype is for a judge.model of its own; the policy has model.dtype: leave it out"
            )
        return self


class Judge(OneJudge):
    """How responses are scored."""

    also: list[OneJudge] = Field(
        default_factory=list,
        exclude_if=operator.not_,
        description="more judges, each with the settings above: scores become the mean of the judges' "
        "standardised ones, and their agreement is reported by language",
    )
    min_agreement: float | None = Field(
        None,
        ge=-1,
        le=1,
        exclude_if=is_null,
        description="languages whose judges agree less (mean Kendall's tau-b over prompts) are named in a "
        "warning; null: only reported",
    )
    disagreement: Literal["keep", "weight", "leave_out"] = Field(
        "keep",
        exclude_if=lambda name: name == "keep",
        description="what becomes of the languages below min_agreement: nothing; their gradient counts only tau, "
        "at least .05, in the direction; no pairs are made of them",
    )

    @property
    def judges(self) -> dict[str, OneJudge]:
        """All judges by what they are called; those called the same are numbered."""
        found: dict[str, OneJudge] = {}
        for judge in (self, *self.also):
            name, number = judge.called, 1
            while name in found:
                number += 1
                name = f"{judge.called} ({number})"
            found[name] = judge
        return found

    @model_validator(mode="after")
    def _several(self) -> Self:
        if self.min_agreement is not None and not self.also:
            raise ValueError("judge.min_agreement is between judges: name more of them in judge.also")
        if self.disagreement != "keep" and self.min_agreement is None:
            raise ValueError(
                f"judge.disagreement {self.disagreement} is for languages below judge.min_agreement, which is "
                "null: set it, such as 0.3"
            )
        return self


def compared(responses: int, comparisons: int | None) -> Sequence[tuple[int, int]]:
    """Which pairs of a prompt's responses are compared, by their places in the order of samples; all for null.

    The responses stand in a ring. First come neighbours, then those two places apart, and so on, so that each
    response takes part about equally often however many pairs there are.
    """
    ring = (
        tuple(sorted((place, (place + distance) % responses)))
        for distance in range(1, responses // 2 + 1)
        for place in range(responses)
    )
    pairs = [(first, second) for first, second in dict.fromkeys(ring)]
    return pairs if comparisons is None else pairs[:comparisons]
