"""How many rows and tokens every stage will see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from congrad_ray.config.recipe import BUILTIN_WORLD, Recipe
from congrad_ray.planning.assumptions import Assumptions
from congrad_ray.rundir.directory import Manifest
from congrad_ray.runtime.resources import rows_of
from congrad_ray.stages.evaluate.pairwise import pairwise_template
from congrad_ray.stages.judge.rubric import load_rubric


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
class StageCount:
    """One stage of one iteration.

    `prefill`: tokens read by an engine, prompts counted for every request although vLLM finds many of them in its
    prefix cache. `decode`: tokens it generates. `trained`: tokens that go forward and backward, padding not
    counted; `completions` of them are predicted. `requests`: sequences of an engine, or rows of a micro-batch.
    """

    stage: str
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


def assumed_lengths(recipe: Recipe, assumptions: Assumptions) -> Lengths:
    """Lengths before anything has run."""
    room = recipe.model.max_length - recipe.generate.max_tokens
    response = assumptions.response_share * recipe.generate.max_tokens
    by_distribution = recipe.judge.method == "expected_score"
    return Lengths(
        prompt=assumptions.prompt_share * room,
        response=response,
        paired_response=response,
        answer=assumptions.response_share * recipe.evaluate.max_tokens,
        judgement=1.0 if by_distribution else assumptions.judgement_share * recipe.judge.max_tokens,
        verdict=assumptions.judgement_share * recipe.evaluate.judge_max_tokens,
        pairs_per_prompt=assumptions.pairs_per_prompt,
    )


def with_measured(lengths: Lengths, recipe: Recipe, manifests: Mapping[str, Manifest]) -> Lengths:
    """The lengths with what the finished stages of a run know of them; `manifests` are by stage."""
    known: dict[str, float] = {}
    measured = []
    if generate := manifests.get("generate"):
        counts, means = generate.counters.get("responses", {}), generate.counters.get("mean_tokens", {})
        if counts and counts.keys() == means.keys():
            known["response"] = sum(counts[tag] * means[tag] for tag in counts) / sum(counts.values())
            known["paired_response"] = known["answer"] = known["response"]
            measured.append("generate")
        if "mean_prompt_tokens" in generate.counters:
            known["prompt"] = generate.counters["mean_prompt_tokens"]
    judge = manifests.get("judge")
    if judge and judge.counters.get("mean_prompt_tokens") is not None:
        known["judge_prompt"] = judge.counters["mean_prompt_tokens"]
        known["judgement"] = judge.counters["mean_output_tokens"]
        measured.append("judge")
    if (pair := manifests.get("pair")) and generate:
        known["pairs_per_prompt"] = pair.rows * recipe.generate.num_generations / generate.rows
        measured.append("pair")
    if (sketch := manifests.get("sketch")) and sketch.rows:
        known["prompt"] = sketch.counters["prompt_tokens"] / sketch.rows
        known["paired_response"] = sketch.counters["response_tokens"] / (2 * sketch.rows)
        measured.append("sketch")
    if (evaluate := manifests.get("evaluate")) and "mean_answer_tokens" in evaluate.counters:
        known["answer"] = evaluate.counters["mean_answer_tokens"]
        measured.append("evaluate")
    return Lengths(**{**vars(lengths), **known, "measured": tuple(measured)})


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


def stage_counts(
    recipe: Recipe, lengths: Lengths, assumptions: Assumptions, iteration: int = 0
) -> list[StageCount]:
    """The stages of one iteration in order, expected numbers. M_0 is evaluated in the first iteration only."""
    train, asked_for = recipe.train, rows_of(recipe)
    training, responses, judgements = asked_for.training, asked_for.responses, asked_for.judgements
    asked = lengths.judge_prompt
    if asked is None:
        asked = rubric_bytes(recipe) / assumptions.bytes_per_token + lengths.prompt + lengths.response
    pairs = training * lengths.pairs_per_prompt
    kept = kept_pairs(recipe, lengths, assumptions, pairs)
    seen = kept * train.num_train_epochs
    if train.max_steps is not None:
        seen = train.max_steps * min(train.batch_size, kept)
    answers = asked_for.answers * (2 if iteration == 0 else 1)
    # Both orders of every greedy answer and its baseline; the built-in world knows true scores instead.
    compared = 0 if recipe.prompts.evaluation.name == BUILTIN_WORLD else 2 * asked_for.evaluation
    question = len(pairwise_template().encode()) / assumptions.bytes_per_token + lengths.prompt
    return [
        StageCount("prompts", training + asked_for.evaluation if iteration == 0 else 0),
        StageCount("generate", responses, responses, responses * lengths.prompt, responses * lengths.response),
        StageCount("judge", judgements, judgements, judgements * asked, judgements * lengths.judgement),
        StageCount("pair", pairs),
        StageCount(
            "sketch",
            pairs,
            2 * pairs,
            trained=pairs * (lengths.prompt + 2 * lengths.paired_response),
            completions=2 * pairs * lengths.paired_response,
        ),
        StageCount("select", pairs),
        StageCount(
            "train",
            seen,
            2 * seen,
            trained=2 * seen * (lengths.prompt + lengths.paired_response),
            completions=2 * seen * lengths.paired_response,
        ),
        StageCount(
            "evaluate",
            answers,
            answers + compared,
            answers * lengths.prompt + compared * (question + 2 * lengths.answer),
            answers * lengths.answer + compared * lengths.verdict,
        ),
    ]


def rubric_bytes(recipe: Recipe) -> float:
    """UTF-8 bytes of the judge's instruction without the texts it judges, on average over the languages."""
    rubric = load_rubric(recipe.judge.rubric)
    blank = [{"role": "user", "content": ""}]
    filled = [rubric.fill(language, recipe.judge.method, blank, "") for language in recipe.prompts.languages]
    return sum(len(text.encode()) for text in filled) / len(filled)
