"""Advice: contradicting languages are found where they were planted, and only there; and pairs under a quota."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from congrad_ray.config.recipe import Select
from congrad_ray.data.tables import table_of
from congrad_ray.stages.select.advice import Evidence, advice, language_noise
from congrad_ray.stages.select.selection import Selection, select_pairs
from congrad_ray.stages.sketch.schema import sketch_bytes, sketches_schema

WIDTH, DRAWS = 256, 20


def drawn(
    seed: int, pairs: Sequence[int], wrong: Sequence[int], signal: float, common: float = 0.8, **settings: Any
) -> Selection:
    """A selection of so many `pairs` of each language: noise of length 1 and a part of length `signal`, scaled.

    That part is the same in nine of ten pairs of a language and turned around in the tenth; of `wrong` languages
    it is turned around in nine. The languages' parts have the cosine `common`^2 with each other.
    """
    generator = np.random.default_rng(seed)

    def unit(*shape: int) -> np.ndarray:
        found = generator.normal(size=(*shape, WIDTH))
        return found / np.linalg.norm(found, axis=-1, keepdims=True)

    shared, rows = unit(), []
    for language, count in enumerate(pairs):
        own = common * shared + np.sqrt(1 - common**2) * unit()
        turned = np.where(generator.random(count) < (0.9 if language in wrong else 0.1), -1, 1)
        vectors = unit(count) + signal * turned[:, None] * own
        for number, vector in enumerate(vectors.astype(np.float32)):
            rows.append(
                {
                    "pair_id": f"{language}-{number}",
                    "language": "abcdefgh"[language],
                    "sketch": sketch_bytes(vector[None])[0],
                    "sketch_scale": float(generator.lognormal(0.0, 0.6)),
                    **dict.fromkeys(("norm", "chosen_logps", "rejected_logps"), 1.0),
                    "coefficient": float(generator.uniform(0.03, 0.07)),
                    **dict.fromkeys(("prompt_tokens", "chosen_tokens", "rejected_tokens"), 3),
                    **dict.fromkeys(("positions", "attention_padding"), 0),
                    **dict.fromkeys(("audit_exact", "audit_sketched")),
                }
            )
    return select_pairs(Select.model_validate(settings), table_of(rows, sketches_schema(WIDTH, "float32")))


def disagreements(selection: Selection) -> list[str]:
    return [line for line in selection.advice if "disagree" in line]


@pytest.mark.parametrize(
    ("pairs", "wrong", "settings", "start"),
    [
        ([40] * 8, [5, 6, 7], {}, "f, g and h disagree with the others (mean cosine -"),
        ([40] * 8, [5, 6, 7], {"leave_out": "pair"}, "f, g and h disagree with the others (mean cosine -"),
        ([60, 30, 50, 80, 40], [1, 2], {"language_gradient": "ema"}, "b and c disagree with the others (mean"),
        ([40] * 3, [2], {}, "c disagrees with the others (mean cosine -"),
    ],
)
def test_planted_contradictions_are_found(
    pairs: list[int], wrong: list[int], settings: dict[str, Any], start: str
) -> None:
    found = [disagreements(drawn(seed, pairs, wrong, 0.4, **settings)) for seed in range(DRAWS)]
    right = [lines for lines in found if len(lines) == 1 and lines[0].startswith(start)]
    assert len(right) >= DRAWS - 1, found
    for line in (lines[0] for lines in right):
        assert "among the rest): find out why first" in line
        assert "select.direction=consensus with select.keep_rule=overall" in line
        assert "in a toy world: docs/explanation/selection.md" in line


@pytest.mark.parametrize(
    ("pairs", "signal", "common", "settings"),
    [
        ([40] * 8, 0.4, 0.8, {}),
        ([40] * 8, 0.15, 0.5, {}),
        ([3, 40, 8, 5, 60], 0.15, 0.5, {}),  # few pairs: their cosines are noise
        ([10] * 8, 0.0, 0.5, {}),  # nothing but noise
        ([10] * 5, 0.0, 0.5, {"leave_out": "pair"}),
        ([5] * 2, 0.0, 0.5, {}),
        ([1, 1, 40, 40], 0.15, 0.5, {}),
    ],
)
def test_languages_that_agree_raise_no_alarm(
    pairs: list[int], signal: float, common: float, settings: dict[str, Any]
) -> None:
    found = [disagreements(drawn(seed, pairs, [], signal, common, **settings)) for seed in range(DRAWS)]
    assert sum(map(bool, found)) <= 1, found


def test_where_there_is_no_majority_nobody_is_called_wrong() -> None:
    two = drawn(0, [60, 60], [1], 0.4)
    (line,) = disagreements(two)
    assert "of two languages nobody can say which is wrong" in line and "consensus" not in line
    (line,) = disagreements(drawn(0, [60] * 4, [1, 3], 0.4))
    assert "no majority clearly agrees, so nobody can say which are wrong" in line and "consensus" not in line
    assert disagreements(drawn(0, [60], [], 0.4)) == []


def test_what_is_done_already_is_not_recommended() -> None:
    def line(**settings: Any) -> str:
        (found,) = disagreements(drawn(0, [40] * 5, [4], 0.4, **settings))
        return found

    assert "consensus" not in line(direction="consensus")
    assert "consensus" not in line(strategy="no_surgery")
    budget = line(keep_rule="token_budget", token_budget=900)
    assert "select.direction=consensus did better" in budget, "that rule is over all languages already"
    for strategy in ("all", "random", "own_language", "length_balanced"):
        assert drawn(0, [40] * 5, [4], 0.4, strategy=strategy).advice == ()


def test_languages_that_take_no_part_are_not_spoken_of() -> None:
    (line,) = disagreements(drawn(0, [40, 40, 40, 40, 30], [3, 4], 0.4, min_pairs=35))
    assert line.startswith("d disagrees with a, b and c (mean cosine -")


def evidence(scores: Sequence[float], kept: Sequence[bool]) -> Evidence:
    return Evidence(
        ["de"], np.ones(1, np.bool_), np.ones((1, 1)), np.ones(1), 0.0, np.array(scores), np.array(kept, np.bool_)
    )


def test_pairs_that_fell_to_the_quota_are_counted() -> None:
    scores = [0.5] * 10 + [0.1] * 9 + [-0.1]
    kept = [True] * 10 + [False] * 10
    (line,) = advice(Select(), evidence(scores, kept))
    assert line.startswith("9 of 10 dropped pairs have a cosine of 0 or more: they fell to select.keep, not")
    assert "select.keep_rule=threshold drops only what conflicts, 1 of 20 pairs; with select.leave_out" in line
    (line,) = advice(Select(leave_out="pair"), evidence(scores, kept))
    assert "what conflicts, 1 of 20 pairs: docs/" in line
    (line,) = advice(Select(score="worst_cosine"), evidence(scores, kept))
    assert "a worst cosine of 0 or more" in line
    (line,) = advice(Select(keep_rule="token_budget", token_budget=9), evidence(scores, kept))
    assert "fell to select.token_budget" in line
    assert advice(Select(keep_rule="threshold"), evidence(scores, kept)) == ()
    assert advice(Select(), evidence([*scores[:18], -0.1, -0.1], kept)) == (), "two in ten conflict"
    assert advice(Select(keep=1.0), evidence(scores, [True] * 20)) == ()


def test_noise_is_the_variance_of_cosines_over_draws() -> None:
    """The cosine of two unrelated languages varies by what `language_noise` says of the two together."""
    generator = np.random.default_rng(0)
    index, shares = np.repeat([0, 1], [20, 80]), np.repeat([1 / 20, 1 / 80], [20, 80])
    first = np.zeros(64)
    first[0] = 0.5
    cosines, said = [], []
    for _ in range(300):
        x = generator.normal(size=(100, 64)) / 8 + first
        x[index == 1] += np.roll(first, 1) - first
        g = np.stack([x[index == language].mean(axis=0) for language in (0, 1)])
        units = g / np.linalg.norm(g, axis=1, keepdims=True)
        own = (x * units[index]).sum(axis=1) / np.linalg.norm(x, axis=1)
        other = (x * units[1 - index]).sum(axis=1) / np.linalg.norm(x, axis=1)
        cosines.append(units[0] @ units[1])
        said.append(language_noise(index, shares, other, own))
    assert np.mean(said, axis=0).sum() == pytest.approx(np.var(cosines), rel=0.3)
    assert np.isinf(language_noise(np.array([0, 1]), np.ones(2), np.ones(2), np.ones(2))).all()
