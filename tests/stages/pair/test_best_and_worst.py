"""The pairing rules, one by one."""

from itertools import permutations

import pytest

from congrad_ray.stages.pair.best_and_worst import BestAndWorst, JudgedResponse, best_and_worst


def response(
    sample: int, score: float | None, text: str = "", truncated: bool = False, wrong_language: bool = False
) -> JudgedResponse:
    return JudgedResponse(f"r{sample}", sample, text or f"text {sample}", score, truncated, wrong_language)


def pair(responses: list[JudgedResponse], **settings: object) -> tuple[str, str] | str:
    options = {"min_margin": 0.0, "truncated": "reject_only", "wrong_language": "reject_only"} | settings
    found = best_and_worst(responses, **options)  # type: ignore[arg-type]
    return (found.chosen.response_id, found.rejected.response_id) if isinstance(found, BestAndWorst) else found


def test_best_against_worst_whatever_the_order() -> None:
    responses = [response(0, 3.0), response(1, 5.0), response(2, 1.0), response(3, 5.0), response(4, 1.0)]
    assert {pair(list(order)) for order in permutations(responses)} == {("r1", "r2")}


@pytest.mark.parametrize(
    ("responses", "expected"),
    [
        ([response(0, 3.0), response(1, None)], "too_few_judged"),
        ([response(0, 3.0), response(1, 1.0, text="  ")], "too_few_judged"),
        ([response(0, 3.0), response(1, 3.0)], "tie_or_small_margin"),
        ([response(0, 3.0, "same"), response(1, 1.0, " same ")], "all_identical"),
        ([response(0, 5.0, truncated=True), response(1, 2.0, truncated=True)], "none_may_be_chosen"),
        ([], "too_few_judged"),
    ],
)
def test_prompts_without_a_pair(responses: list[JudgedResponse], expected: str) -> None:
    assert pair(responses) == expected


def test_a_margin_no_larger_than_the_minimum_is_dropped() -> None:
    responses = [response(0, 3.0), response(1, 2.0)]
    assert pair(responses, min_margin=1.0) == "tie_or_small_margin"
    assert pair(responses, min_margin=0.9) == ("r0", "r1")


def test_truncated_responses_may_be_rejected_only_unless_set_otherwise() -> None:
    responses = [response(0, 5.0, truncated=True), response(1, 3.0), response(2, 1.0, truncated=True)]
    assert pair(responses) == ("r1", "r2")
    assert pair(responses, truncated="keep") == ("r0", "r2")
    assert pair(responses, truncated="drop") == "too_few_judged"


def test_a_response_in_the_wrong_language_is_never_chosen() -> None:
    responses = [response(0, 5.0, wrong_language=True), response(1, 3.0), response(2, 1.0, wrong_language=True)]
    assert pair(responses) == ("r1", "r2")
    assert pair(responses, wrong_language="drop") == "too_few_judged"
