"""WHAT to do: the strict models of a recipe YAML. Where it runs is the profile's matter."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from congrad_ray.config.benchmarks import Benchmark
from congrad_ray.config.chat_template import CHAT_TEMPLATE_DATE
from congrad_ray.config.evaluation import Evaluate
from congrad_ray.config.fields import (
    ChatTemplate,
    Day,
    Fraction,
    Language,
    Positive,
    TensorType,
    batch_tokens,
    is_null,
    regular_expression,
)
from congrad_ray.config.judging import Judge, OneJudge
from congrad_ray.config.names import Band, DirectionMethod, LeaveOut
from congrad_ray.config.settings import (
    Settings,
    apply_overrides,
    read_yaml,
    settings_in,
    validate,
    without_gone,
)
from congrad_ray.config.training import Lora, Train

BUILTIN_WORLD = "builtin-world"
_INSTRUCTION = 512  # tokens, more than any tokenizer makes of the comparison's instruction and a chat template
Strategy = Literal[
    "congrad",
    "all",
    "random",
    "reward_gap",
    "own_language",
    "no_surgery",
    "length_balanced",
    "length_gap",
    "logp_gap",
    "rip",
    "judge_agreement",
]


class Model(Settings):
    """The model to align."""

    name: str = Field(BUILTIN_WORLD, description="a folder, a Hugging Face hub name, or builtin-world")
    revision: str | None = Field(None, description="commit or branch on the hub")
    dtype: TensorType = Field("bfloat16", description="of the weights")
    attn_implementation: str | None = Field(
        None,
        exclude_if=operator.not_,
        description="attention in sketching and training, by transformers' name: sdpa, flash_attention_2, eager; "
        "null: sdpa, and eager for the few models that have no other",
    )
    chat_template: ChatTemplate | None = Field(
        None,
        description="a Jinja file (or its text) that replaces the tokenizer's template, or the name of one of its "
        "templates; null: its only one, or 'default'",
    )
    chat_template_date: Day = Field(
        CHAT_TEMPLATE_DATE,
        description="the date for templates that write today's, so that token ids do not change by day",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        exclude_if=operator.not_,
        description="what else the template is given with every conversation, {enable_thinking: false}; a row's "
        "own, in a filter's column of this name, go first",
    )
    max_length: Positive = Field(2048, description="tokens of a prompt with one response")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")

    def __hash__(self) -> int:  # a mapping among the fields has none
        return hash(self.model_dump_json())


class Source(Settings):
    """Where prompts are read from."""

    name: str = Field(BUILTIN_WORLD, description="files here or on s3://, gs://; a hub dataset; builtin-world")
    config: str | None = Field(None, description="configuration of the hub dataset")
    split: str = Field("train", description="split of the hub dataset")
    revision: str | None = Field(None, description="commit or branch of the hub dataset")
    kinds: list[str] | None = Field(None, description="builtin-world only: kinds of task; null: all")
    prompt_column: str = Field("prompt", description="with the prompts: text or chat messages")
    language_column: str = Field("language", description="with the prompts' languages")
    language_names: dict[str, Language] = Field(
        default_factory=dict,
        description="the source's own names of languages to tags, where it has other than tags, codes and common "
        "names, {Hinglish: hi}",
    )


class Prompts(Settings):
    """Which prompts, in which languages."""

    train: Source = Source()
    evaluation: Source = Source()
    languages: list[Language] = Field(
        min_length=1,
        description="trained on; tags or names. zh takes the rows of every script and region; with zh-Hant beside "
        "it those in traditional script are a group of their own",
    )
    unseen_languages: list[Language] = Field(default_factory=list, description="only evaluated on")
    clean: bool = Field(
        True,
        exclude_if=bool,
        description="bring texts into NFC without white space at their ends; false: byte for byte",
    )
    train_per_language: Positive = Field(1000, description="prompts drawn of each language to train on")
    evaluation_per_language: Positive = Field(100, description="prompts drawn of each language to evaluate on")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        every = self.languages + self.unseen_languages
        repeated = sorted({tag for tag in every if every.count(tag) > 1})
        if repeated:
            raise ValueError(f"languages named twice, or both seen and unseen: {', '.join(repeated)}")
        return self


class Generate(Settings):
    """Sampling of responses; the defaults are those of Self-Rewarding Language Models (2401.10020)."""

    num_generations: int = Field(4, ge=2, description="responses sampled for each prompt")
    temperature: float = Field(0.7, gt=0, description="of sampling responses")
    top_p: Fraction = Field(0.9, description="of sampling responses")
    top_k: Positive | None = Field(
        None, exclude_if=is_null, description="sample from the likeliest tokens, so many of them; null: from all"
    )
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        exclude_if=operator.not_,
        description="leave out tokens less likely than this share of the likeliest one's probability",
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        exclude_if=lambda penalty: penalty == 1,
        description="above 1: tokens of the prompt and of the response so far become less likely",
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        exclude_if=operator.not_,
        description="texts that end a response, and are not part of it",
    )
    max_tokens: Positive = Field(512, description="of a response")


class Pair(Settings):
    """How judged responses become preference pairs."""

    min_margin: float = Field(
        0.0,
        ge=0,
        description="pairs whose scores differ by no more than this are dropped; in the judge's units: 0..5, a "
        "reward model's own, or standard deviations where there are several judges",
    )
    truncated: Literal["drop", "reject_only", "keep"] = Field(
        "reject_only", description="a truncated response may not be paired, only as rejected, or freely"
    )
    language_check: bool = Field(
        True, description="whether responses in another language than their prompt are looked for"
    )
    wrong_language: Literal["drop", "reject_only"] = Field(
        "reject_only", description="what becomes of a response in another language than its prompt"
    )
    language_confidence: float = Field(
        0.5, ge=0, le=1, description="a sentence counts only if the identifier is this sure of its language"
    )
    language_min_characters: int = Field(10, ge=0, description="shorter responses are not checked")


class Sketch(Settings):
    """What is kept of every pair's gradient; docs/results/engine.md has the measurements behind the defaults."""

    gone: ClassVar = {"average_log_prob": "leave it out: train.loss_type decides whether means are taken"}

    method: Literal["count_sketch", "exact"] = Field(
        "count_sketch",
        description="'exact' goes over the pairs twice and holds a copy of the gradient per language",
    )
    width: int = Field(131072, ge=64, description="numbers stored per pair")
    dtype: Literal["int8", "float16", "float32"] = Field("int8", description="of the numbers stored")
    fold: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = Field(
        "auto", description="how far layers are shortened before their gradients are formed; auto: by their sides"
    )
    min_side: int = Field(512, ge=1, description="'auto' leaves this many features of a side, or more")
    groups: Positive = Field(1, description="parts of a sketch, each for one block of layers")
    seed: int = Field(0, ge=0, description="of the sketch's hashes")
    layers: Annotated[str, AfterValidator(regular_expression)] | None = Field(
        None, description="regular expression on module names; null: every linear layer"
    )
    parameters: Literal["trained", "linear"] | None = Field(
        None,
        exclude_if=is_null,
        description="whose gradients: 'trained' are those of the adapter of train.lora, 'linear' those of the "
        "linear layers themselves; null: trained with train.lora, else linear",
    )
    compute_dtype: TensorType | None = Field(None, description="of the products; null: the model's")
    gradient_checkpointing: bool = Field(False, description="less memory for a third more time")
    max_tokens_per_batch: Positive | None = Field(
        None, description="padded tokens of both responses in a micro-batch; null: 8192, on a CPU 4096"
    )
    audit_pairs: int = Field(
        32,
        ge=0,
        description="at most about this many pairs are checked against exact gradients, fewer where that would "
        "take more than a tenth of the stage's time",
    )

    def batch_tokens(self, device: str) -> int:
        """`max_tokens_per_batch` on a device."""
        return batch_tokens(self.max_tokens_per_batch, device)

    @property
    def stored_dtype(self) -> str:
        """The NumPy dtype of the numbers in the sketch column."""
        return "float32" if self.method == "exact" else self.dtype

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.width % self.groups:
            raise ValueError(f"width ({self.width}) should be a multiple of groups ({self.groups})")
        return self


class Select(Settings):
    """Which pairs are kept: how the direction is made, how a pair is scored against it, and the keep rule."""

    strategy: Strategy = Field(
        "congrad",
        description="'congrad' goes by the settings below; the others are baselines under the same keep rule. "
        "reward_gap: largest difference of the judge's scores; own_language: cosine with the own language's "
        "gradient; no_surgery: cosine with the plain mean; length_balanced: responses of like length; length_gap: "
        "chosen longer than rejected, in tokens; logp_gap: difference of the policy's log-probabilities by token; "
        "rip: a good and long rejected response, a small gap (2501.18578); judge_agreement: largest of what the "
        "least convinced of judge.also's judges gives",
    )
    direction: DirectionMethod = Field("pcgrad", description="how the languages' gradients become one direction")
    orders: Positive = Field(1, description="random orders of projection to average over (pcgrad, gradvac)")
    per_block: bool = Field(False, description="a surgery for each of sketch.groups blocks of layers")
    leave_out: LeaveOut = Field(
        "nothing", description="what is taken out of the direction that a pair is scored against: pair, language"
    )
    language_gradient: Literal["mean", "ema"] = Field("mean", description="of a language's pairs")
    ema_decay: float = Field(0.9, ge=0, lt=1, description="'ema' only")
    ema_batch_size: Positive = Field(32, description="'ema' only: pairs in a mini-batch")
    language_weights: dict[Language, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="factors on the languages' gradients, {de: 2}; 1 where not named; direction raco: the shares "
        "that its mean has and its correction is clipped to",
    )
    min_pairs: Positive = Field(
        1, description="a language with fewer pairs takes no part in the direction; its pairs are still scored"
    )
    score: Literal["cosine", "dot", "worst_cosine"] = Field(
        "cosine", description="with the direction; worst_cosine: the least over the languages' gradients"
    )
    keep_rule: Literal["per_language", "overall", "threshold", "token_budget"] = Field(
        "per_language",
        description="the top fraction of each language or of all; scores above a threshold; the best that fit "
        "into a number of tokens",
    )
    band: Band = Field(
        "highest",
        exclude_if=lambda band: band == "highest",
        description="which part of the ranking is kept: pairs of the highest scores, the lowest, or those nearest "
        "to the median of what keep_rule ranks (each language, or all)",
    )
    keep: Fraction = Field(0.5, description="top fraction; per_language and overall")
    threshold: float = Field(0.0, description="keep_rule 'threshold': scores above it")
    token_budget: Positive | None = Field(
        None, description="keep_rule 'token_budget': tokens of the kept pairs, prompts counted once"
    )
    seed: int = Field(0, ge=0, description="order of projections, mini-batches of ema, strategy 'random'")

    @model_validator(mode="after")
    def _budget(self) -> Self:
        if self.keep_rule == "token_budget" and self.token_budget is None:
            raise ValueError("keep_rule 'token_budget' needs token_budget, a number of tokens")
        if self.keep_rule == "threshold" and self.band != "highest":
            raise ValueError(
                f"keep_rule 'threshold' keeps what is above it: band '{self.band}' needs another keep_rule"
            )
        return self


class Limits(Settings):
    """When a stage is stopped instead of going on in vain; changes no result."""

    stall_timeout_s: float = Field(
        1800.0, gt=0, description="seconds in which nothing comes of a stage, loading a model included"
    )
    failed_share: float = Field(
        0.2, ge=0, le=1, description="share of a stage's rows that may go to quarantine; more stop it"
    )
    unreadable_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of judgements that may be unreadable: more stop the judge stage as soon as it is "
        "known, and make evaluate warn about its comparisons",
    )


class Recipe(Settings):
    """A whole run."""

    name: str = Field(min_length=1, description="of the recipe, for people")
    seed: int = Field(0, ge=0, description="of the built-in world, prompt choice and sampling")
    iterations: Positive = Field(1, description="rounds of generating, selecting and training")
    model: Model = Model()
    prompts: Prompts
    generate: Generate = Generate()
    judge: Judge = Judge()
    pair: Pair = Pair()
    sketch: Sketch = Sketch()
    select: Select = Select()
    train: Train = Train()
    benchmark: Benchmark = Field(Benchmark(), exclude_if=lambda section: section == Benchmark())
    evaluate: Evaluate = Evaluate()
    limits: Limits = Limits()

    @property
    def sketched_adapter(self) -> Lora | None:
        """The adapter whose gradients are sketched; None: those of the linear layers themselves are."""
        return None if self.sketch.parameters == "linear" else self.train.lora

    @property
    def judgement_length(self) -> int:
        """Tokens of a judgement: rubric, prompt, response, and what the judge writes."""
        return self.length_of(self.judge)

    def length_of(self, judge: OneJudge) -> int:
        """`judgement_length` of one of the judges; two responses of it where it compares."""
        # A prompt with one response fits model.max_length.
        second = self.generate.max_tokens + judge.max_tokens + _INSTRUCTION if judge.method == "pairwise" else 0
        return judge.max_length or self.model.max_length + second

    @property
    def comparison_length(self) -> int:
        """Tokens of a comparison: instruction, prompt, both answers, and the verdict."""
        evaluate = self.evaluate
        # A prompt with one answer fits model.max_length.
        enough = self.model.max_length + evaluate.max_tokens + evaluate.judge_max_tokens + _INSTRUCTION
        return evaluate.judge_max_length or enough

    def longest_asked(self, model: str) -> int:
        """Tokens of the longest sequence that any stage asks of a model, so that one engine serves them all.

        `model`: "policy" for M_0, M_1, ..., else the name that a judge has in the recipe.
        """
        is_policy = model in ("policy", self.model.name)
        names = ("policy", "start", self.model.name) if is_policy else (model,)
        asked = [self.model.max_length] if is_policy else []
        judges = [judge for judge in self.judge.judges.values() if judge.endpoint is None]
        asked += [self.length_of(judge) for judge in judges if judge.model in names]
        compares = self.evaluate.endpoint is None and self.evaluate.judge in names
        asked += [self.comparison_length] if compares else []
        return max(asked, default=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for section, max_tokens in (
            ("generate", self.generate.max_tokens),
            ("evaluate", self.evaluate.max_tokens),
        ):
            if max_tokens >= self.model.max_length:
                raise ValueError(
                    f"{section}.max_tokens ({max_tokens}) leaves no room for a prompt in model.max_length "
                    f"({self.model.max_length})"
                )
        for judge in self.judge.judges.values():
            self._fits_judge(judge)
        both = 2 * self.evaluate.max_tokens + self.evaluate.judge_max_tokens
        if both >= self.comparison_length:
            raise ValueError(
                f"two answers of evaluate.max_tokens ({self.evaluate.max_tokens}) and a verdict of "
                f"evaluate.judge_max_tokens ({self.evaluate.judge_max_tokens}) leave no room for the prompt in "
                f"evaluate.judge_max_length ({self.comparison_length}): raise it, or set it to null"
            )
        if self.sketch.parameters == "trained" and self.train.lora is None:
            raise ValueError(
                "sketch.parameters 'trained' means the adapter of train.lora, which is null: set train.lora, or "
                "sketch.parameters to 'linear'"
            )
        if self.select.per_block and self.sketch.groups == 1:
            raise ValueError("select.per_block needs sketch.groups above 1: one part of a sketch for each block")
        if self.select.strategy == "judge_agreement" and not self.judge.also:
            raise ValueError(
                "select.strategy 'judge_agreement' is between judges: name more of them in judge.also, or take "
                "'reward_gap'"
            )
        return self

    def _fits_judge(self, judge: OneJudge) -> None:
        responses = self.generate.num_generations
        if judge.comparisons is not None and judge.comparisons < responses - 1:
            raise ValueError(
                f"judge.comparisons ({judge.comparisons}) leaves some of generate.num_generations ({responses}) "
                f"responses without a comparison: give {responses - 1} or more"
            )
        if judge.endpoint is not None and judge.max_length is None:  # the server's matter
            return
        judged = 2 if judge.method == "pairwise" else 1
        if judged * self.generate.max_tokens + judge.writes >= self.length_of(judge):
            raise ValueError(
                f"{'two responses' if judged == 2 else 'a response'} of generate.max_tokens "
                f"({self.generate.max_tokens}) and a judgement of judge.max_tokens ({judge.writes}) leave no room "
                f"for rubric and prompt in judge.max_length ({self.length_of(judge)}; null: model.max_length): "
                "raise it, or lower one of them"
            )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file with `--set` overrides applied. Raises SettingsError."""
    return validate(Recipe, apply_overrides(read_yaml(Path(path), "recipe"), overrides), f"recipe {path}")


def recipe_of_run(data: bytes, source: str) -> Recipe:
    """The recipe that a run keeps, without settings that are gone since it was written. Raises SettingsError."""
    return validate(Recipe, without_gone(Recipe, settings_in(data, source)), source)
