"""The section `benchmark` of a recipe."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from congrad_ray.config.fields import Language, Positive
from congrad_ray.config.settings import Settings


class Benchmark(Settings):
    """What the trained model has lost or gained elsewhere: tasks of lm-evaluation-harness, and held-out pairs.

    docs/how-to/benchmark.md. Nothing is done without `tasks` or `preferences`.
    """

    tasks: list[str] = Field(
        default_factory=list,
        description="names of lm-evaluation-harness: tasks, groups, tags, or the start of a family's names that "
        "end in languages: belebele, xcopa, xnli, global_mmlu, mgsm_direct",
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="examples before each question; null: as many as the task has"
    )
    limit: Positive | None = Field(None, description="documents of each task, its first; null: all")
    include_path: str | None = Field(
        None, description="a folder with tasks of your own in YAML, which every node must have; their code is run"
    )
    apply_chat_template: bool = Field(False, description="put questions as chat messages")
    download: bool = Field(
        False, description="whether datasets of tasks may be fetched from the hub; false: those in the cache only"
    )
    languages: dict[str, Language] = Field(
        default_factory=dict, description="languages of tasks whose names do not carry one, {my_task: de}"
    )
    preferences: str | None = Field(
        None,
        description="pairs held out: prompt, chosen, rejected, language; files here or on s3://, gs://, or a hub "
        "dataset",
    )
    preferences_chat: bool = Field(False, description="take strings among them for chat messages")
    preferences_per_language: Positive = Field(200, description="pairs drawn of each language")
    seed: int = Field(0, ge=0, description="of the examples before questions, drawn pairs, and intervals")

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.tasks or self.preferences)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        repeated = sorted({name for name in self.tasks if self.tasks.count(name) > 1})
        if repeated:
            raise ValueError(f"tasks named twice: {', '.join(repeated)}")
        return self
