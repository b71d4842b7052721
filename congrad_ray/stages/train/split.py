"""Which pairs are held out of training, to see how the policy does on what it was not trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import pyarrow as pa

from congrad_ray.config.training import Train


def held_out(prompts: Sequence[str], languages: Sequence[str], share: float, seed: int) -> list[bool]:
    """Whether each pair is held out, given its prompt (the text or any other key of it) and its language.

    All pairs of a prompt go the same way. A language gives round(share * its prompts) of them: at least one where
    it has two or more, never all, and none at all for a share of 0. Which ones depends on the seed and on the
    language's own prompts alone, neither on the order of the rows nor on other languages. A prompt that several
    languages have counts for the first of them by name.

    Raises ValueError for a share that is not in [0, 1), and for lists of different lengths.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the held-out share is {share}; it must be at least 0 and less than 1")
    language_of: dict[str, str] = {}
    for prompt, language in zip(prompts, languages, strict=True):
        language_of[prompt] = min(language, language_of.get(prompt, language))
    prompts_of: dict[str, list[str]] = {}
    for prompt, language in language_of.items():
        prompts_of.setdefault(language, []).append(prompt)
    chosen: set[str] = set()
    for own in prompts_of.values():
        count = min(max(round(share * len(own)), 1), len(own) - 1) if share else 0
        chosen.update(sorted(own, key=lambda prompt: _draw(prompt, seed))[:count])
    return [prompt in chosen for prompt in prompts]


def trained_and_held_out(selected: pa.Table, train: Train) -> tuple[list[int], list[int]]:
    """The rows of a selection, sorted by pair_id, that are trained on, and those that are held out."""
    if not train.eval_share:
        return list(range(len(selected))), []
    prompts = [json.dumps(prompt) for prompt in selected["prompt"].to_pylist()]
    out = held_out(prompts, selected["language"].to_pylist(), train.eval_share, train.seed)
    rows = range(len(selected))
    return [row for row in rows if not out[row]], [row for row in rows if out[row]]


def _draw(prompt: str, seed: int) -> bytes:
    """A random number that belongs to the prompt, whatever stands beside it."""
    return hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
