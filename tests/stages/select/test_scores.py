"""Scores against the same written down on the vectors themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from congrad_ray.config.recipe import Select
from congrad_ray.stages.select.directions import direction_weights, projected_coefficients
from congrad_ray.stages.select.scores import (
    Agreement,
    LeaveOut,
    PairProducts,
    Surgery,
    agreement,
    cosine_matrix,
    cosines_with_direction,
    make_direction,
    needed_columns,
    other_orders,
    projected_cosine_matrix,
    score_of,
)
from congrad_ray.stages.select.shares import moving_average_shares

LANGUAGES, PAIRS, WIDTH, BLOCKS = 4, 5, 48, 3


class World:
    """Five pairs of each language around a centre; the centres partly conflict."""

    def __init__(self, blocks: int = 1, seed: int = 3) -> None:
        generator = np.random.default_rng(seed)
        centres = generator.normal(size=(LANGUAGES, 1)) * generator.normal(size=WIDTH)
        self.sketches = np.repeat(centres, PAIRS, axis=0) + generator.normal(size=(LANGUAGES * PAIRS, WIDTH))
        self.languages = np.repeat(np.arange(LANGUAGES), PAIRS)
        self.coefficients = generator.uniform(0.05, 0.2, size=len(self.sketches))
        self.shares = np.concatenate(
            [moving_average_shares(PAIRS, 0.5, 2, seed=language) for language in range(LANGUAGES)]
        )
        self.blocks = blocks

    @property
    def gradients(self) -> np.ndarray:
        weighted = (self.shares * self.coefficients)[:, None] * self.sketches
        return np.stack([weighted[self.languages == language].sum(axis=0) for language in range(LANGUAGES)])

    def cut(self, vectors: np.ndarray) -> np.ndarray:
        return vectors.reshape(len(vectors), self.blocks, -1)

    @property
    def gram(self) -> np.ndarray:
        return np.einsum("kbi,lbi->bkl", self.cut(self.gradients), self.cut(self.gradients))

    @property
    def products(self) -> PairProducts:
        dots = np.einsum("nbi,lbi->nbl", self.cut(self.sketches), self.cut(self.gradients))
        squares = (self.cut(self.sketches) ** 2).sum(axis=2)
        return PairProducts(dots, squares, self.languages, self.shares, self.coefficients)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    scale = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / scale) if scale else 0.0


@pytest.mark.parametrize("leave_out", ["nothing", "pair", "language"])
@pytest.mark.parametrize("per_block", [False, True])
@pytest.mark.parametrize("method", ["pcgrad", "mean", "mgda"])
def test_scores_are_those_with_the_direction_formed(method: str, per_block: bool, leave_out: LeaveOut) -> None:
    world = World(BLOCKS)
    surgery = Surgery(method, seed=1, per_block=per_block, leave_out=leave_out)  # type: ignore[arg-type]
    direction = make_direction(world.gram, surgery)
    found = agreement(world.products, direction, leave_out)
    everyone = np.arange(LANGUAGES)
    for n, (sketch, own) in enumerate(zip(world.sketches, world.languages, strict=True)):
        members = everyone[everyone != own] if leave_out == "language" else everyone
        pieces = [world.cut(world.gradients)[:, block] for block in range(BLOCKS)]
        weights = np.zeros((BLOCKS, LANGUAGES))
        for block in range(BLOCKS):
            vectors = pieces[block] if per_block else world.gradients
            part = vectors[members]
            weights[block, members] = direction_weights(part @ part.T, method, seed=1)  # type: ignore[arg-type]
        gradients = world.gradients
        if leave_out == "pair":
            # The own language's gradient as the weighted mean over its other pairs.
            others = (world.languages == own) & (np.arange(len(world.sketches)) != n)
            shares = world.shares[others] / world.shares[others].sum()
            gradients[own] = (shares * world.coefficients[others]) @ world.sketches[others]
        cut = world.cut(gradients)
        formed = np.concatenate([weights[block] @ cut[:, block] for block in range(BLOCKS)])
        assert found.cosine[n] == pytest.approx(cosine(sketch, formed), abs=1e-9)
        assert found.dot[n] == pytest.approx(sketch @ formed, rel=1e-9)
        assert found.worst_cosine[n] == pytest.approx(
            min(cosine(sketch, gradients[language]) for language in members), abs=1e-9
        )
        assert found.own_cosine[n] == pytest.approx(cosine(sketch, gradients[own]), abs=1e-9)


def test_blocks_make_no_difference_to_one_surgery_of_the_whole() -> None:
    whole, cut = World(1), World(BLOCKS)
    for leave_out in ("nothing", "pair", "language"):
        surgery = Surgery("pcgrad", leave_out=leave_out)  # type: ignore[arg-type]
        one, three = (
            agreement(world.products, make_direction(world.gram, surgery), surgery.leave_out)
            for world in (whole, cut)
        )
        for name in ("cosine", "dot", "worst_cosine", "own_cosine"):
            np.testing.assert_allclose(getattr(one, name), getattr(three, name), rtol=1e-9, atol=1e-12)


def test_language_weights_multiply_the_gradients_before_the_surgery() -> None:
    world = World()
    factors = np.array([1.0, 3.0, 0.5, 2.0])
    direction = make_direction(world.gram, Surgery(seed=2), factors)
    scaled = world.gradients * factors[:, None]
    expected = direction_weights(scaled @ scaled.T, "pcgrad", seed=2) @ scaled
    np.testing.assert_allclose(direction.weights[0, 0] @ world.gradients, expected)
    with pytest.raises(ValueError, match="weights are"):
        make_direction(world.gram, Surgery(), np.array([1.0, 0.0, 1.0, 1.0]))


def test_a_language_that_is_not_included_is_scored_against_the_others() -> None:
    world = World()
    included = np.array([True, False, True, True])
    direction = make_direction(world.gram, Surgery(), included=included)
    rest = world.gradients[included]
    formed = direction_weights(rest @ rest.T, "pcgrad") @ rest
    found = agreement(world.products, direction)
    np.testing.assert_allclose(found.cosine, [cosine(sketch, formed) for sketch in world.sketches], atol=1e-9)
    np.testing.assert_allclose(
        found.worst_cosine, [min(cosine(s, g) for g in rest) for s in world.sketches], atol=1e-9
    )
    with pytest.raises(ValueError, match="no language takes part"):
        make_direction(world.gram, Surgery(), included=np.zeros(LANGUAGES, dtype=bool))


def test_the_only_pair_of_a_language_leaves_nothing_of_it() -> None:
    world = World()
    only = np.array([0, 5, 6, 7])
    products = PairProducts(
        np.einsum("ni,li->nl", world.sketches[only], gradients := np.stack(
            [0.1 * world.sketches[0], 0.1 * world.sketches[5:8].mean(axis=0)]
        ))[:, None],
        (world.sketches[only] ** 2).sum(axis=1, keepdims=True),
        np.array([0, 1, 1, 1]),
        np.array([1.0, 1 / 3, 1 / 3, 1 / 3]),
        np.full(4, 0.1),
    )  # fmt: skip
    direction = make_direction((gradients @ gradients.T)[None], Surgery("sum"))
    found = agreement(products, direction, "pair")
    assert found.cosine[0] == pytest.approx(cosine(world.sketches[0], gradients[1]))
    assert found.own_cosine[0] == 0.0
    assert found.worst_cosine[0] == pytest.approx(cosine(world.sketches[0], gradients[1]))


def test_cosine_matrices_before_and_after_the_surgery() -> None:
    world = World(BLOCKS)
    for per_block in (False, True):
        surgery = Surgery(seed=1, per_block=per_block)
        direction = make_direction(world.gram, surgery)
        before, after = cosine_matrix(direction.whole_gram), projected_cosine_matrix(direction, surgery)
        cut = world.cut(world.gradients)
        coefficients = [
            projected_coefficients(g, "pcgrad", 1)
            for g in (world.gram if per_block else BLOCKS * [world.gram.sum(axis=0)])
        ]
        projected = np.concatenate([coefficients[block] @ cut[:, block] for block in range(BLOCKS)], axis=1)
        assert before.min() < -0.1  # there is a conflict to resolve
        for i in range(LANGUAGES):
            for k in range(LANGUAGES):
                assert before[i, k] == pytest.approx(cosine(world.gradients[i], world.gradients[k]))
                assert after[i, k] == pytest.approx(cosine(projected[i], projected[k]))
        assert not np.allclose(before, after)
        formed = np.concatenate([direction.weights[0, block] @ cut[:, block] for block in range(BLOCKS)])
        np.testing.assert_allclose(
            cosines_with_direction(direction), [cosine(gradient, formed) for gradient in world.gradients]
        )


def test_zero_norms_have_cosine_zero() -> None:
    world = World()
    world.sketches[7] = 0.0
    world.coefficients[10:15] = 0.0  # a language whose gradient is zero
    found = agreement(world.products, make_direction(world.gram, Surgery()))
    assert found.cosine[7] == found.dot[7] == 0.0
    assert np.isfinite(found.cosine).all() and (found.cosine != 0.0).sum() == 19
    assert (found.own_cosine[10:15] == 0.0).all() and (found.own_cosine[:5] != 0.0).all()
    matrices = [
        cosine_matrix(world.gram[0]),
        projected_cosine_matrix(make_direction(world.gram, Surgery()), Surgery()),
    ]
    for matrix in matrices:
        assert (matrix[2] == 0.0).all() and np.isfinite(matrix).all()


def test_opposite_languages_cancel_to_cosine_zero_and_not_to_noise() -> None:
    generator = np.random.default_rng(0)
    gradient = generator.normal(size=50)
    gradients = np.stack([gradient, -3.0 * gradient])
    sketches = generator.normal(size=(6, 50))
    direction = make_direction((gradients @ gradients.T)[None], Surgery())
    products = PairProducts(
        (sketches @ gradients.T)[:, None],
        (sketches**2).sum(axis=1, keepdims=True),
        np.zeros(6, dtype=np.int64),
        np.full(6, 1 / 6),
        np.ones(6),
    )
    np.testing.assert_array_equal(agreement(products, direction).cosine, 0.0)
    np.testing.assert_array_equal(projected_cosine_matrix(direction, Surgery()), 0.0)


def test_norms_of_another_space_are_noticed() -> None:
    world = World()
    products = replace(world.products, squared_norms=world.products.squared_norms / 1e4)
    with pytest.raises(ValueError, match="norms must be those of the sketches"):
        agreement(products, make_direction(world.gram, Surgery()))


def test_shapes_are_checked() -> None:
    world = World()
    direction = make_direction(world.gram, Surgery())
    with pytest.raises(ValueError, match=r"shares has shape \(19,\)"):
        agreement(replace(world.products, shares=world.shares[1:]), direction)
    with pytest.raises(ValueError, match=r"dots has shape \(20, 1, 3\)"):
        agreement(replace(world.products, dots=world.products.dots[..., :3]), direction)


PAIR_COLUMNS = {
    "language": ["de", "de", "de", "hi", "hi"],
    "chosen_score": [4.0, 3.0, 5.0, 2.0, 4.0],
    "rejected_score": [1.0, 2.5, 2.0, 1.0, 3.5],
    "chosen_tokens": [10, 20, 5, 8, 4],
    "rejected_tokens": [4, 30, 5, 2, 16],
    "chosen_logps": [-20.0, -10.0, -10.0, -4.0, -4.0],
    "rejected_logps": [-4.0, -60.0, -10.0, -6.0, -8.0],
    "least_margin": [0.5, -0.2, 1.0, 0.0, 0.3],
}
NOTHING = Agreement(*[np.zeros(5)] * 4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Select(strategy="length_gap"), [6.0, -10.0, 0.0, 6.0, -12.0]),
        (Select(strategy="logp_gap"), [-1.0, 1.5, 0.0, 2.5, -0.5]),
        (Select(strategy="reward_gap"), [3.0, 0.5, 3.0, 1.0, 0.5]),
        (Select(strategy="judge_agreement"), [0.5, -0.2, 1.0, 0.0, 0.3]),
        # Ranks of the rejected one's score, its tokens and the gap, the largest first: of de 1 3 2, 1 3 2,
        # 1.5 3 1.5; of hi 1 2 throughout.
        (Select(strategy="rip"), [1 / 3, 1.0, 0.5, 0.5, 1.0]),
        # Of all: 1.5 4 3 1.5 5, 2 5 3 1 4, 1.5 4.5 1.5 3 4.5.
        (Select(strategy="rip", keep_rule="overall"), [0.3, 0.8, 0.3, 0.2, 0.8]),
    ],
)
def test_scores_of_columns(settings: Select, expected: list[float]) -> None:
    pairs = pa.table(PAIR_COLUMNS).select(["language", *needed_columns(settings)])
    np.testing.assert_allclose(score_of(settings, pairs, NOTHING), expected)


def test_a_pair_that_is_not_judged_leaves_the_ranks_of_others() -> None:
    scores = [1.0, float("nan"), 2.0, 1.0, 3.5]
    pairs = pa.table(PAIR_COLUMNS | {"rejected_score": scores})
    found = score_of(Select(strategy="rip"), pairs, NOTHING)
    assert np.isnan(found[1]) and np.isfinite(np.delete(found, 1)).all()


def test_raco_clips_by_the_languages_weights_and_scales_by_none() -> None:
    world = World()
    preference = np.array([1.0, 3.0, 0.5, 2.0])
    part = np.array([True, False, True, True])
    direction = make_direction(world.gram, Surgery("raco"), preference, part)
    gradients = world.gradients[part]
    expected = direction_weights(gradients @ gradients.T, "raco", preference=preference[part])
    np.testing.assert_allclose(direction.weights[0, 0, part], expected)
    assert direction.weights[0, 0, 1] == 0.0


def test_other_orders_are_fewer_where_they_would_take_long() -> None:
    gram = np.stack([np.eye(30)] * 4)
    for surgery, expected in [
        (Surgery(), 16),
        (Surgery(per_block=True, orders=5000), 1),
        (Surgery(leave_out="language", orders=100), 7),
        (Surgery("mgda"), 0),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("congrad_ray.stages.select.scores.make_direction", lambda gram, draw, *rest: draw)
            made: list[Any] = other_orders(gram, surgery)
        assert [draw.seed for draw in made] == [surgery.orders * draw for draw in range(1, expected + 1)]
