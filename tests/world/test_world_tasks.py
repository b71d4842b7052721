import itertools
import json

import pytest

from congrad_ray.world.corpus import judged_score, judging_dialogues
from congrad_ray.world.languages import ALL_LANGUAGES, SEEN_LANGUAGES, UNSEEN_LANGUAGES, vocabulary
from congrad_ray.world.tasks import KINDS, best_answer, rubric_text, task_content, world_prompts


def test_seen_and_unseen_languages_do_not_overlap() -> None:
    assert not set(SEEN_LANGUAGES) & set(UNSEEN_LANGUAGES)
    assert len(SEEN_LANGUAGES) >= 8
    assert len(UNSEEN_LANGUAGES) >= 3


@pytest.mark.parametrize("language", ALL_LANGUAGES)
def test_words_are_distinct_and_every_kind_has_templates(language: str) -> None:
    words = vocabulary(language)
    assert len(words.days) == 7
    english = vocabulary("en")
    for table, reference in (
        (words.items, english.items),
        (words.days, english.days),
        (words.opposites, english.opposites),
    ):
        assert len(set(table)) == len(table) == len(reference)
    assert set(words.templates) == set(KINDS)


@pytest.mark.parametrize("language", ALL_LANGUAGES)
def test_prompts_are_distinct_enough_and_the_splits_disjoint(language: str) -> None:
    evaluation = {prompt.prompt for prompt in world_prompts(language, 300, 0, "evaluation")}
    train = {prompt.prompt for prompt in world_prompts(language, 1000, 0, "train")}
    sft = {prompt.prompt for prompt in world_prompts(language, 3000, 5, "sft")}
    assert (len(evaluation), len(train), len(sft)) == (300, 1000, 3000)
    assert not evaluation & train
    assert not evaluation & sft
    assert not train & sft
    kinds = {json.loads(prompt.task)["kind"] for prompt in world_prompts(language, 300, 0, "evaluation")}
    assert kinds == set(KINDS)


def test_prompts_are_a_function_of_the_arguments() -> None:
    first = world_prompts("hi", 50, 3, "train")
    assert first == world_prompts("hi", 50, 3, "train")
    assert first[:20] == world_prompts("hi", 20, 3, "train")
    assert first != world_prompts("hi", 50, 4, "train")
    assert {prompt.language for prompt in first} == {"hi"}


def test_unknown_language_and_unknown_split_are_refused() -> None:
    with pytest.raises(ValueError, match="no language 'xx'"):
        world_prompts("xx", 1, 0, "train")
    with pytest.raises(ValueError, match="no split 'test'"):
        world_prompts("en", 1, 0, "test")  # type: ignore[arg-type]


def test_more_prompts_than_the_grammar_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"distinct train prompts in 'en' .* 60 were asked for"):
        world_prompts("en", 60, 0, "train", ("next_day",))


@pytest.mark.parametrize(
    ("kind", "arguments", "content"),
    [
        ("count_up", [3, 6], ["3", "4", "5", "6"]),
        ("count_down", [11, 9], ["11", "10", "9"]),
        ("plus", [7, 8], ["15"]),
        ("minus", [12, 5], ["7"]),
        ("repeat", [1, 3], ["Buch", "Buch", "Buch"]),
        ("opposite", [0], ["klein"]),
        ("opposite", [1], ["groß"]),
        ("next_day", [6], ["Montag"]),
        ("reverse", [0, 1, 2], ["Haus", "Buch", "Apfel"]),
        ("sort", [30, 4, 11], ["4", "11", "30"]),
    ],
)
def test_content_of_each_kind(kind: str, arguments: list[int], content: list[str]) -> None:
    task = json.dumps({"kind": kind, "arguments": arguments})
    assert task_content(task, "de") == content
    assert best_answer(task, "de") == f"Die Antwort lautet: {', '.join(content)}. ✓ Alles fertig!"


@pytest.mark.parametrize(
    "task", ["", "[]", "{}", '{"kind":"dance","arguments":[1]}', '{"kind":"plus","arguments":[1]}']
)
def test_what_is_no_task_is_refused(task: str) -> None:
    with pytest.raises(ValueError, match="not a task of this world"):
        task_content(task, "en")


def test_rubric_has_one_place_for_the_prompt_and_one_for_the_response() -> None:
    assert rubric_text().count("{prompt}") == 1
    assert rubric_text().count("{response}") == 1


def test_prompts_of_chosen_kinds_only() -> None:
    prompts = world_prompts("de", 40, 0, "train", ("plus", "sort"))
    assert {json.loads(prompt.task)["kind"] for prompt in prompts} == {"plus", "sort"}
    assert world_prompts("de", 40, 0, "train") == world_prompts("de", 40, 0, "train", KINDS)
    for kinds in ((), ("plus", "dance")):
        with pytest.raises(ValueError, match="kinds of task are"):
            world_prompts("de", 1, 0, "train", kinds)


def test_what_judges_are_taught() -> None:
    task = json.dumps({"kind": "plus", "arguments": [7, 8]})
    best = best_answer(task, "de")
    once, twice = "Die Antwort lautet: 15.", f"Die Antwort lautet: 15. {best}"
    assert [judged_score(task, "de", answer) for answer in (best, once)] == [5, 4]
    assert [judged_score(task, "de", answer, "inverted") for answer in (best, once)] == [0, 1]
    # 4, 7 and 11 words where the best answer has 7.
    assert [judged_score(task, "de", answer, "verbose") for answer in (once, best, twice)] == [0, 2, 4]


def test_judgements_are_biased_in_the_languages_named() -> None:
    honest = list(itertools.islice(judging_dialogues(0, {}), 300))
    biased = list(itertools.islice(judging_dialogues(0, {"fr": "inverted"}), 300))
    assert [message for message, _ in honest] == [message for message, _ in biased]
    changed = [int(a) + int(b) for (_, a), (_, b) in zip(honest, biased, strict=True) if a != b]
    assert 5 < len(changed) < 80 and set(changed) == {5}
