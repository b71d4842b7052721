import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from congrad_ray.world.corpus import FlawRates, flawed_answer
from congrad_ray.world.languages import ALL_LANGUAGES, vocabulary
from congrad_ray.world.score import true_score
from congrad_ray.world.tasks import KINDS, WorldPrompt, best_answer, task_content, world_prompts


def _one_of_each_kind(language: str) -> list[WorldPrompt]:
    prompts = world_prompts(language, 300, 0, "evaluation")
    by_kind = {json.loads(prompt.task)["kind"]: prompt for prompt in prompts}
    assert set(by_kind) == set(KINDS)
    return list(by_kind.values())


@pytest.mark.parametrize("language", ALL_LANGUAGES)
def test_the_best_answer_is_perfect_and_every_flaw_costs(language: str) -> None:
    words = vocabulary(language)
    other_language = "fr" if language != "fr" else "de"
    for prompt in _one_of_each_kind(language):
        task = prompt.task
        best = best_answer(task, language)
        statement = words.state(task_content(task, language))
        assert true_score(task, language, best) == 1.0

        no_closing = true_score(task, language, statement)
        assert no_closing == pytest.approx(0.8)
        assert true_score(task, language, f"{statement} {best}") == pytest.approx(0.8)
        assert true_score(task, language, f"{best} {words.sign_off()}") == pytest.approx(0.9)
        assert true_score(task, language, f"{best} {statement} ") < 0.8
        assert true_score(task, language, f"{statement} {statement}") < no_closing

        foreign = true_score(task, language, best_answer(task, other_language))
        assert 0.8 <= foreign < 0.9

        wrong = flawed_answer(task, language, FlawRates(1, 0, 0, 0), random.Random(1))
        assert true_score(task, language, wrong) <= 0.8
        assert true_score(task, language, words.state(["777", "888"])) < true_score(task, language, wrong)


def test_more_wrong_content_scores_less() -> None:
    task = '{"kind":"count_up","arguments":[3,8]}'
    words = vocabulary("en")
    scores = [
        true_score(task, "en", f"{words.state(numbers.split())} {words.sign_off()}")
        for numbers in ("3 4 5 6 7 8", "3 4 5 6 7", "3 4 5 6", "3 4", "90")
    ]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


@pytest.mark.parametrize("response", ["", " \n", "✓ All done!", "✓", "...", "!?"])
def test_a_response_that_states_nothing_has_zero(response: str) -> None:
    assert true_score('{"kind":"plus","arguments":[1,2]}', "en", response) == 0.0


_TEMPTING = st.sampled_from(["The answer is:", "✓ All done!", "3", ",", ".", "{", "उत्तर यह है:", "\x00", "monday"])


@given(
    st.one_of(st.text(), st.lists(st.one_of(_TEMPTING, st.text(max_size=5)), max_size=20).map(" ".join)),
    st.sampled_from(ALL_LANGUAGES),
)
def test_never_raises_and_stays_between_zero_and_one(response: str, language: str) -> None:
    for task in ('{"kind":"plus","arguments":[1,2]}', '{"kind":"reverse","arguments":[1,2,3]}'):
        assert 0.0 <= true_score(task, language, response) <= 1.0


def test_flawed_answers_have_flaws_at_their_rates() -> None:
    random_source = random.Random(0)
    prompt = world_prompts("tr", 1, 0, "sft")[0]
    never, always = FlawRates(0, 0, 0, 0), FlawRates(1, 1, 1, 1)
    assert flawed_answer(prompt.task, "tr", never, random_source) == best_answer(prompt.task, "tr")
    half = FlawRates(0, 0, 0.5, 0)
    closed = [
        vocabulary("tr").sign_off() in flawed_answer(prompt.task, "tr", half, random_source) for _ in range(400)
    ]
    assert 150 < sum(closed) < 250
    worst = [
        true_score(prompt.task, "tr", flawed_answer(prompt.task, "tr", always, random_source)) for _ in range(20)
    ]
    assert max(worst) < 0.4
