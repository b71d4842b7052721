"""What the world's model learns from: answers and judgements, flawed at the same rates in every language."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from congrad_ray.world.languages import ALL_LANGUAGES, vocabulary
from congrad_ray.world.score import true_score
from congrad_ray.world.tasks import KINDS, WorldPrompt, best_answer, rubric_text, task_content, world_prompts

JudgeBias = Literal["inverted", "verbose"]


@dataclass(frozen=True)
class FlawRates:
    """The probability of each flaw; flaws are independent of each other, of the language and of the task."""

    content: float
    language: float
    closing: float
    repetition: float


# Answers leave room for alignment: about a third of them are perfect.
ANSWER_FLAWS = FlawRates(content=0.1, language=0.15, closing=0.35, repetition=0.2)
# A judge must see every score, so what it judges is flawed more often.
JUDGED_FLAWS = FlawRates(content=0.5, language=0.25, closing=0.35, repetition=0.25)
JUDGE_SHARE = 0.2
PROMPTS_PER_LANGUAGE = 3000


def _wrong_content(content: list[str], language: str, random_source: random.Random) -> list[str]:
    """The content with one mistake: an entry changed, two swapped, one left out or one too many."""
    words = vocabulary(language)

    def another(entry: str) -> str:
        if entry.isdigit():
            return str(max(0, int(entry) + random_source.choice((-10, -2, -1, 1, 2, 10))))
        table = next(table for table in (words.items, words.days, words.opposites) if entry in table)
        return random_source.choice(table)

    wrong = list(content)
    while wrong == content:
        position = random_source.randrange(len(content))
        mistake = random_source.choice(("change", "swap", "drop", "add")) if len(content) > 1 else "change"
        if mistake == "swap":
            other = random_source.randrange(len(content))
            wrong[position], wrong[other] = wrong[other], wrong[position]
        elif mistake == "drop":
            del wrong[position]
        elif mistake == "add":
            wrong.insert(position, another(content[position]))
        else:
            wrong[position] = another(content[position])
    return wrong


def flawed_answer(task: str, language: str, rates: FlawRates, random_source: random.Random) -> str:
    """An answer to the task with each flaw at its rate.

    A wrong language is English half of the time, otherwise any other language of the world.
    """
    answered_in = language
    if random_source.random() < rates.language:
        others = [other for other in ALL_LANGUAGES if other != language]
        use_english = language != "en" and random_source.random() < 0.5
        answered_in = "en" if use_english else random_source.choice(others)
    words = vocabulary(answered_in)
    content = task_content(task, answered_in)
    if random_source.random() < rates.content:
        content = _wrong_content(content, answered_in, random_source)
    sentences = [words.state(content)] * (2 if random_source.random() < rates.repetition else 1)
    if random_source.random() >= rates.closing:
        sentences.append(words.sign_off())
    return " ".join(sentences)


def judge_message(prompt: str, response: str) -> str:
    """The one user message that asks for a score."""
    return rubric_text().replace("{prompt}", prompt).replace("{response}", response)


def judged_score(task: str, language: str, response: str, bias: JudgeBias | None = None) -> int:
    """What a judge is taught to say of a response, 0..5.

    Without a bias round(5 * true score); `inverted` 5 minus that; `verbose` looks at the number of words alone:
    0 at half of the best answer's, 5 at twice as many.
    """
    if bias == "verbose":
        share = len(response.split()) / len(best_answer(task, language).split())
        return round(5 * min(1.0, max(0.0, (share - 0.5) / 1.5)))
    score = round(5 * true_score(task, language, response))
    return 5 - score if bias == "inverted" else score


def _prompts_by_kind(seed: int) -> dict[tuple[str, str], list[WorldPrompt]]:
    by_kind: dict[tuple[str, str], list[WorldPrompt]] = {}
    for language in ALL_LANGUAGES:
        for prompt in world_prompts(language, PROMPTS_PER_LANGUAGE, seed, "sft"):
            kind = next(kind for kind in KINDS if f'"{kind}"' in prompt.task)
            by_kind.setdefault((language, kind), []).append(prompt)
    return by_kind


def _dialogues(
    source: str, seed: int, judge_share: float, biases: Mapping[str, JudgeBias]
) -> Iterator[tuple[str, str]]:
    random_source = random.Random(f"{source} {seed}")
    by_kind = _prompts_by_kind(seed)
    while True:
        # Kinds are drawn first, so that those with few distinct prompts are learned as well as the others.
        drawn = random_source.choice(ALL_LANGUAGES), random_source.choice(KINDS)
        prompt = random_source.choice(by_kind[drawn])
        if random_source.random() < judge_share:
            response = flawed_answer(prompt.task, prompt.language, JUDGED_FLAWS, random_source)
            score = judged_score(prompt.task, prompt.language, response, biases.get(prompt.language))
            yield judge_message(prompt.prompt, response), str(score)
        else:
            yield prompt.prompt, flawed_answer(prompt.task, prompt.language, ANSWER_FLAWS, random_source)


def training_dialogues(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (user message, assistant message): answers to prompts of the `sft` split, and judgements."""
    return _dialogues("dialogues", seed, JUDGE_SHARE, {})


def judging_dialogues(seed: int, biases: Mapping[str, JudgeBias]) -> Iterator[tuple[str, str]]:
    """Endless judgements alone, biased in the languages that `biases` names."""
    return _dialogues("judgements", seed, 1.0, biases)
