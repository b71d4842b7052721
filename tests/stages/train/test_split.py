from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from congrad_ray.stages.train.split import held_out

Pairs = list[tuple[str, str]]  # (prompt, language)

# Prompts that belong to one language, as those of a run do; several pairs may share one.
PAIRS: st.SearchStrategy[Pairs] = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from(["de", "en", "sw"])).map(
        lambda one: (f"{one[1]} {one[0]}", one[1])
    ),
    max_size=120,
)
SHARES = st.floats(0.01, 0.99)
SEEDS = st.integers(0, 5)


def split(pairs: Pairs, share: float, seed: int) -> list[bool]:
    return held_out([prompt for prompt, _ in pairs], [language for _, language in pairs], share, seed)


def prompts_held_out(pairs: Pairs, share: float, seed: int) -> set[str]:
    held = split(pairs, share, seed)
    return {prompt for (prompt, _), out in zip(pairs, held, strict=True) if out}


@given(pairs=PAIRS, share=SHARES, seed=SEEDS)
def test_each_language_gives_about_its_share_of_prompts_and_never_all(
    pairs: Pairs, share: float, seed: int
) -> None:
    held = split(pairs, share, seed)
    out = prompts_held_out(pairs, share, seed)
    assert held == [prompt in out for prompt, _ in pairs]  # the pairs of a prompt go the same way
    for language in {language for _, language in pairs}:
        prompts = {prompt for prompt, own in pairs if own == language}
        count = len(prompts & out)
        if len(prompts) == 1:
            assert count == 0
        else:
            assert 1 <= count < len(prompts)
            assert abs(count - share * len(prompts)) <= 1


@given(pairs=PAIRS, share=SHARES, seed=SEEDS, order=st.randoms(use_true_random=False))
def test_neither_the_order_of_rows_nor_other_languages_matter(
    pairs: Pairs, share: float, seed: int, order: random.Random
) -> None:
    out = prompts_held_out(pairs, share, seed)
    shuffled = order.sample(pairs, len(pairs))
    assert prompts_held_out(shuffled, share, seed) == out
    german = [(prompt, language) for prompt, language in pairs if language == "de"]
    assert prompts_held_out(german, share, seed) == {prompt for prompt in out if prompt.startswith("de")}


@given(
    pairs=st.lists(st.tuples(st.sampled_from("abcdefg"), st.sampled_from(["de", "en"])), max_size=40),
    share=SHARES,
    seed=SEEDS,
)
def test_a_prompt_of_several_languages_goes_one_way(pairs: Pairs, share: float, seed: int) -> None:
    ways: dict[str, set[bool]] = {}
    for (prompt, _), out in zip(pairs, split(pairs, share, seed), strict=True):
        ways.setdefault(prompt, set()).add(out)
    assert all(len(way) == 1 for way in ways.values())


def test_the_seed_decides_which_and_a_share_of_nothing_holds_out_nothing() -> None:
    pairs = [(f"prompt {number}", "en") for number in range(100)]
    assert prompts_held_out(pairs, 0.2, 0) != prompts_held_out(pairs, 0.2, 1)
    assert not any(split(pairs, 0.0, 0))


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_leaves_nothing_to_train_on_is_an_error(share: float) -> None:
    with pytest.raises(ValueError, match="held-out share"):
        held_out(["a", "b"], ["en", "en"], share, 0)
