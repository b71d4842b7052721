"""Prompts with one best answer each, from small grammars that every language shares."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal, get_args

from congrad_ray.world.languages import Vocabulary, vocabulary

Split = Literal["train", "evaluation", "sft"]

KINDS: tuple[str, ...] = (
    "count_up",
    "count_down",
    "plus",
    "minus",
    "repeat",
    "opposite",
    "next_day",
    "reverse",
    "sort",
)

# The remainder of the prompt's hash modulo 10 decides its split, whatever the seed and the count.
_REMAINDERS: dict[str, range] = {"evaluation": range(0, 2), "train": range(2, 5), "sft": range(5, 10)}


@dataclass(frozen=True)
class WorldPrompt:
    """A prompt and what is needed to score its responses."""

    prompt: str
    language: str
    """BCP-47 tag."""
    task: str
    """Compact JSON: {"kind": one of KINDS, "arguments": list of integers}; the same in every language."""


def _draw_arguments(kind: str, words: Vocabulary, random_source: random.Random) -> list[int]:
    draw = random_source.randint
    match kind:
        case "count_up":
            first = draw(1, 24)
            return [first, first + draw(2, 4)]
        case "count_down":
            last = draw(1, 24)
            return [last + draw(2, 4), last]
        case "plus":
            return [draw(1, 9), draw(1, 9)]
        case "minus":
            first = draw(2, 12)
            return [first, draw(1, first - 1)]
        case "repeat":
            return [draw(0, len(words.items) - 1), draw(2, 4)]
        case "opposite":
            return [draw(0, len(words.opposites) - 1)]
        case "next_day":
            return [draw(0, len(words.days) - 1)]
        case "reverse":
            return random_source.sample(range(len(words.items)), draw(2, 3))
        case _:
            return random_source.sample(range(1, 21), draw(2, 3))


def _question(kind: str, arguments: list[int], words: Vocabulary, random_source: random.Random) -> str:
    template = random_source.choice(words.templates[kind])
    fields: dict[str, str | int]
    match kind:
        case "count_up" | "count_down":
            fields = {"first": arguments[0], "last": arguments[1]}
        case "plus" | "minus":
            fields = {"first": arguments[0], "second": arguments[1]}
        case "repeat":
            fields = {"word": words.items[arguments[0]], "times": arguments[1]}
        case "opposite":
            fields = {"word": words.opposites[arguments[0]]}
        case "next_day":
            fields = {"word": words.days[arguments[0]]}
        case "reverse":
            fields = {"items": ", ".join(words.items[index] for index in arguments)}
        case _:
            fields = {"items": ", ".join(str(number) for number in arguments)}
    return random_source.choice(words.openers) + template.format(**fields)


def _split_of(prompt: str) -> str:
    remainder = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 10
    return next(split for split, remainders in _REMAINDERS.items() if remainder in remainders)


def world_prompts(
    language: str, count: int, seed: int, split: Split, kinds: Sequence[str] = KINDS
) -> list[WorldPrompt]:
    """Distinct prompts of one language about `kinds` of task, a function of the arguments alone.

    A prompt's split is decided by a hash of its text, so the splits share no prompt, whatever the seeds.
    Kinds of task with few distinct prompts (next day, opposite) run out first; the others fill up.

    Raises:
        ValueError: the world does not speak the language, there is no such split or kind, or the grammar ran
            out of distinct prompts.
    """
    words = vocabulary(language)
    if split not in get_args(Split):
        raise ValueError(f"no split {split!r}; the splits are {', '.join(get_args(Split))}")
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds of task are {', '.join(kinds) or 'none'}; choose from {', '.join(KINDS)}")
    random_source = random.Random(f"{language} {seed} {split}")
    prompts: dict[str, WorldPrompt] = {}
    attempts = 1000 + 50 * count
    for _ in range(attempts):
        if len(prompts) >= count:
            break
        kind = random_source.choice(kinds)
        arguments = _draw_arguments(kind, words, random_source)
        question = _question(kind, arguments, words, random_source)
        if question not in prompts and _split_of(question) == split:
            task = json.dumps({"kind": kind, "arguments": arguments}, separators=(",", ":"))
            prompts[question] = WorldPrompt(question, language, task)
    if len(prompts) < count:
        raise ValueError(
            f"the grammar gave {len(prompts)} distinct {split} prompts in {language!r} after {attempts} "
            f"draws, {count} were asked for; ask for fewer"
        )
    return list(prompts.values())


def task_content(task: str, language: str) -> list[str]:
    """The words or numbers that answer the task, in order, in `language`.

    Raises:
        ValueError: `task` is not a task of this world, or the world does not speak the language.
    """
    words = vocabulary(language)
    try:
        parsed = json.loads(task)
        kind, arguments = parsed["kind"], parsed["arguments"]
        match kind, arguments:
            case "count_up", [int(first), int(last)]:
                return [str(number) for number in range(first, last + 1)]
            case "count_down", [int(first), int(last)]:
                return [str(number) for number in range(first, last - 1, -1)]
            case "plus", [int(first), int(second)]:
                return [str(first + second)]
            case "minus", [int(first), int(second)]:
                return [str(first - second)]
            case "repeat", [int(index), int(times)]:
                return [words.items[index]] * times
            case "opposite", [int(index)]:
                return [words.opposites[index ^ 1]]
            case "next_day", [int(index)]:
                return [words.days[(index + 1) % len(words.days)]]
            case "reverse", [*indices]:
                return [words.items[index] for index in reversed(indices)]
            case "sort", [*numbers]:
                return [str(number) for number in sorted(numbers)]
    except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"not a task of this world: {task!r} ({error})") from error
    raise ValueError(f"not a task of this world: {task!r}; its kinds are {', '.join(KINDS)}")


def best_answer(task: str, language: str) -> str:
    """The answer whose true score is 1: the right content, said once, in `language`, with the closing phrase.

    Raises:
        ValueError: `task` is not a task of this world, or the world does not speak the language.
    """
    words = vocabulary(language)
    return f"{words.state(task_content(task, language))} {words.sign_off()}"


def rubric_text() -> str:
    """The judge's one user message, with the placeholders {prompt} and {response}; its answer is 0..5."""
    return resources.files("congrad_ray.world").joinpath("rubric/en.txt").read_text(encoding="utf-8").strip()
