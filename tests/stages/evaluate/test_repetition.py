import pytest

from congrad_ray.stages.evaluate.repetition import REPEATED, repeated_grams


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two three", 0.0),
        ("a b c d e f", 0.0),
        ("a b c d a b c d", 0.2),  # five 4-grams, of which the last is there before
        ("A b c d, a B c! D", 0.2),  # case and punctuation do not matter
        ("不要不要不要不要", 0.6),  # characters where words are not spaced: five, of which two are different
        ("la " * 40, 1 - 1 / 37),
    ],
)
def test_the_share_of_repeated_grams(text: str, share: float) -> None:
    assert repeated_grams(text) == pytest.approx(share)


def test_a_loop_is_over_the_bound_and_a_list_is_not() -> None:
    looped = "The answer is that we should go. " * 6
    listed = " ".join(f"{number}. The name of item {number} is {name}." for number, name in enumerate("abcdefg"))
    assert repeated_grams(looped) > REPEATED > repeated_grams(listed)
