"""What a run cost and lost by stage: time, tokens, money, engine starts, quarantine, prompts without a pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from congrad_ray.rundir.directory import Manifest, StageFolder


@dataclass(frozen=True)
class StageFact:
    """A stage and its manifest; no manifest means unfinished."""

    iteration: int | None
    folder: str
    manifest: Manifest | None
    quarantine: Mapping[str, int]
    """Rows set apart, by reason."""
    tokens: int | None
    """Read and written by the stage's models; None where it is not known."""

    @property
    def cost(self) -> float | None:
        """US dollars paid to an endpoint; None where nothing was asked for."""
        return self._number("cost_usd")

    @property
    def engine_starts(self) -> int | None:
        found = self._number("engine_starts")
        return None if found is None else int(found)

    def _number(self, name: str) -> float | None:
        found = self.manifest.counters.get(name) if self.manifest else None
        return found if isinstance(found, int | float) else None


@dataclass(frozen=True)
class NoPair:
    """Why prompts gave no pair, and responses that the language check found, by language."""

    reasons: Mapping[str, Mapping[str, int]]
    """By reason, then language: prompts."""
    responses: Mapping[str, Mapping[str, int]]
    """By finding ('wrong language', 'unknown language'), then language: responses."""


def stage_fact(folder: StageFolder, name: str, iteration: int | None) -> StageFact:
    """What the folder says of the stage in it."""
    manifest = folder.manifest()
    tokens = tokens_of(manifest) if manifest else None
    return StageFact(iteration, name, manifest, folder.quarantine_counts(), tokens)


def tokens_of(manifest: Manifest) -> int | None:
    """Tokens read and written, from the counters of a manifest; older ones have means only."""
    counters = manifest.counters
    if "prompt_tokens" in counters:
        return int(counters["prompt_tokens"] + counters.get("response_tokens", counters.get("output_tokens", 0)))
    if "responses" in counters and counters.get("mean_prompt_tokens") is not None:  # generate
        written = sum(counters["mean_tokens"][tag] * number for tag, number in counters["responses"].items())
        return round(counters["mean_prompt_tokens"] * manifest.rows + written)
    if "judgements" in counters and counters.get("mean_prompt_tokens") is not None:
        asked = sum(row["asked"] for row in counters["judgements"].values())
        return round(asked * (counters["mean_prompt_tokens"] + (counters.get("mean_output_tokens") or 0)))
    if counters.get("mean_answer_tokens") is not None:
        return round(counters["mean_answer_tokens"] * manifest.rows)
    return None


def no_pair(manifest: Manifest | None) -> NoPair | None:
    """From the counters of the pair stage; None before it is done."""
    if manifest is None or "no_pair" not in manifest.counters:
        return None
    reasons: dict[str, Counter[str]] = {}
    for key, number in manifest.counters["no_pair"].items():
        reason, _, language = key.partition(" ")
        reasons.setdefault(reason, Counter())[language] += number
    found = {
        name.replace("_", " "): manifest.counters[name]
        for name in ("wrong_language", "unknown_language")
        if manifest.counters.get(name)
    }
    return NoPair({name.replace("_", " "): counts for name, counts in reasons.items()}, found)


def judge_counts(manifest: Manifest | None) -> Mapping[str, Mapping[str, Any]]:
    """Each of several judges' numbers: asked, readable, mean_score, tokens, cost_usd; empty of one judge."""
    found = manifest.counters.get("judges") if manifest else None
    return found if isinstance(found, dict) else {}


def judge_agreement(manifest: Manifest | None) -> Mapping[str, Mapping[str, Any]]:
    """Kendall's tau of several judges by language, {"de": {"tau": 0.4, "prompts": 90}}; empty of one judge."""
    found = manifest.counters.get("agreement") if manifest else None
    return found if isinstance(found, dict) else {}
