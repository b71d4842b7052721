import pytest

from congrad_ray.stages.judge.pairwise import Order, fill_pairwise, pairwise_template, read_win


@pytest.mark.parametrize(
    ("text", "order", "win"),
    [
        ("B is wrong.\nVerdict: A", "model_first", 1.0),
        ("Verdict: A", "baseline_first", 0.0),
        ("**Verdict:** B", "model_first", 0.0),
        ("verdict: answer_B.", "baseline_first", 1.0),
        ("Verdict: tie", "model_first", 0.5),
        ("Verdict: [[A]]", "model_first", 1.0),
        ("Verdict: A\nSo again:\nVerdict: A", "model_first", 1.0),
        ("Verdict: A\nNo.\nVerdict: B", "model_first", None),
        ("Verdict: A\nVerdict: none", "model_first", None),
        ("Verdict: A or B", "model_first", None),
        ("Verdict: neither", "model_first", None),
        ("A", "model_first", None),
        ("", "baseline_first", None),
    ],
)
def test_read_win(text: str, order: Order, win: float | None) -> None:
    assert read_win(text, order) == win


def test_template_is_filled_in_one_pass() -> None:
    prompt = [{"role": "user", "content": "Say {first}"}]
    text = fill_pairwise(pairwise_template(), prompt, "one {second}", "two {prompt}")
    assert "Say {first}" in text
    assert text.index("one {second}") < text.index("two {prompt}")
    assert text.count("two {prompt}") == 1
