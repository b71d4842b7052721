"""How many rows and tokens a stage will see: what all stages' estimates share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from congrad_ray.config.judging import OneJudge
from congrad_ray.config.recipe import Recipe
from congrad_ray.planning.assumptions import Assumptions


@dataclass(frozen=True)
class Lengths:
    """Means of rows: tokens, bytes, and how many prompts give a pair."""

    prompt: float
    response: float
    paired_response: float  # of chosen and rejected: the longest of several are rejected more often
    judgement: float
    answer: float  # in evaluation
    verdict: float  # what the judge of two answers writes
    pairs_per_prompt: float
    judge_prompt: float | None = None  # of what the judge is asked, where a run has measured it
    row_bytes: Mapping[str, float] = field(default_factory=dict)  # see storage.measured_row_bytes
    measured: tuple[str, ...] = ()  # the stages of a run that some of these were taken from


@dataclass(frozen=True)
class Volume:
    """What one stage works through in one iteration.

    `prefill`: tokens read by an engine, prompts counted for every request although vLLM finds many of them in its
    prefix cache. `decode`: tokens it generates. `trained`: tokens that go forward and backward, padding not
    counted; `completions` of them are predicted. `requests`: sequences of an engine, or rows of a micro-batch.
    """

    rows: float
    requests: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    trained: float = 0.0
    completions: float = 0.0

    @property
    def tokens(self) -> float:
        """All tokens."""
        return self.prefill + self.decode + self.trained


@dataclass(frozen=True)
class Rows:
    """What a recipe asks for in one iteration."""

    training: int  # prompts
    evaluation: int  # prompts
    responses: int
    judgements: int
    answers: int  # of one model to the evaluation prompts


def rows_of(recipe: Recipe) -> Rows:
    """The numbers of rows that follow from the recipe alone."""
    prompts = recipe.prompts
    training = len(prompts.languages) * prompts.train_per_language
    evaluation = (len(prompts.languages) + len(prompts.unseen_languages)) * prompts.evaluation_per_language
    responses = training * recipe.generate.num_generations
    judges = recipe.judge.judges.values()
    return Rows(
        training,
        evaluation,
        responses,
        training * sum(judge.judgements_of(recipe.generate.num_generations) for judge in judges),
        evaluation * (2 if recipe.evaluate.sampled else 1),
    )


def assumed_lengths(recipe: Recipe, assumptions: Assumptions) -> Lengths:
    """Lengths before anything has run."""
    room = recipe.model.max_length - recipe.generate.max_tokens
    response = assumptions.response_share * recipe.generate.max_tokens
    return Lengths(
        prompt=assumptions.prompt_share * room,
        response=response,
        paired_response=response,
        answer=assumptions.response_share * recipe.evaluate.max_tokens,
        judgement=judgement_tokens(recipe.judge, assumptions),
        verdict=assumptions.judgement_share * recipe.evaluate.judge_max_tokens,
        pairs_per_prompt=assumptions.pairs_per_prompt,
    )


def judgement_tokens(judge: OneJudge, assumptions: Assumptions) -> float:
    """Mean tokens that a judge writes for one judgement, before anything has run."""
    return judge.writes * assumptions.judgement_share if judge.writes > 1 else float(judge.writes)


def pairs_of(recipe: Recipe, lengths: Lengths) -> float:
    """How many pairs one iteration gives."""
    return rows_of(recipe).training * lengths.pairs_per_prompt


def kept_pairs(recipe: Recipe, lengths: Lengths, assumptions: Assumptions, pairs: float) -> float:
    """How many of the pairs the keep rule will keep."""
    select = recipe.select
    if select.strategy == "all":
        return pairs
    if select.keep_rule == "threshold":
        return pairs * assumptions.kept_above_threshold
    if select.keep_rule == "token_budget":
        assert select.token_budget is not None
        return min(pairs, select.token_budget / (lengths.prompt + 2 * lengths.paired_response))
    return pairs * select.keep
