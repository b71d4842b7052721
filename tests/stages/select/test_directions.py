from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import quadprog
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize

from congrad_ray.config.names import DirectionMethod
from congrad_ray.stages.select.directions import (
    aligned_mtl,
    config,
    direction_weights,
    equal_norm_mean,
    gradvac_coefficients,
    imtl_g,
    krum,
    mean_direction,
    pcgrad_coefficients,
    projected_coefficients,
)
from congrad_ray.stages.select.optimal import cagrad, mgda, nash_mtl, raco, upgrad

METHODS: tuple[DirectionMethod, ...] = get_args(DirectionMethod)
# A time limit for each example would fail by chance on a busy machine.
unhurried = settings(deadline=None)
WITHOUT_ZEROS = set(METHODS) - {"pcgrad", "gradvac", "mean", "sum"}
PROJECTING = {"pcgrad": pcgrad_coefficients, "gradvac": gradvac_coefficients}


def random_gradients(languages: int, seed: int) -> np.ndarray:
    """(languages, 30), with a shared part of random sign and size, so that some agree and some conflict."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=30)
    return generator.normal(size=(languages, 1)) * shared + generator.normal(size=(languages, 30))


def lengths_of(gradients: np.ndarray) -> np.ndarray:
    return np.linalg.norm(gradients, axis=1)


def pcgrad_on_vectors(gradients: np.ndarray, seed: int) -> np.ndarray:
    """PCGrad written down on the vectors themselves; returns the projected gradients."""
    generator = np.random.default_rng(seed)
    projected = []
    for i in range(len(gradients)):
        current = gradients[i].copy()
        for k in generator.permutation(len(gradients)):
            if k != i and current @ gradients[k] < 0:
                current = current - (current @ gradients[k]) / (gradients[k] @ gradients[k]) * gradients[k]
        projected.append(current)
    return np.stack(projected)


def gradvac_on_vectors(gradients: np.ndarray, seed: int) -> np.ndarray:
    """GradVac on the vectors, by geometry in the place of its formula: the part of g_i across g_k stays, and as
    much of g_k is added as makes the angle between them the one aimed at."""
    generator = np.random.default_rng(seed)
    lengths = lengths_of(gradients)
    counted = lengths > 1e-10 * lengths.max()
    units = gradients / np.where(counted, lengths, 1.0)[:, None]
    pairs = [float(units[i] @ units[k]) for i in np.flatnonzero(counted) for k in range(i) if counted[k]]
    aim = np.arccos(np.clip(np.mean(pairs) if pairs else 0.0, 0.0, 0.99))
    turned = []
    for i in range(len(gradients)):
        current = gradients[i].copy()
        for k in generator.permutation(len(gradients)):
            if k == i or not counted[k] or not counted[i]:
                continue
            along = current @ units[k]
            across = current - along * units[k]
            height = math.hypot(*across)
            if math.atan2(height, along) > aim:
                current = across + height / math.tan(aim) * units[k]
        turned.append(current)
    return np.stack(turned)


ON_VECTORS = {"pcgrad": pcgrad_on_vectors, "gradvac": gradvac_on_vectors}


def shortest_of_hull(gradients: np.ndarray) -> np.ndarray | None:
    """The vector of the convex hull nearest to zero, by quadprog on the vectors; None where zero is in the hull.

    The shortest x with <g_l, x> >= 1 for all l is d / |d|^2, and there is none where zero is in the hull.
    """
    dimensions = gradients.shape[1]
    try:
        found = quadprog.solve_qp(np.eye(dimensions), np.zeros(dimensions), gradients.T, np.ones(len(gradients)))[
            0
        ]
    except ValueError:  # "constraints are inconsistent, no solution"
        return None
    return found / (found @ found)


def lowest_cagrad_dual(gradients: np.ndarray, c: float, shares: np.ndarray) -> tuple[np.ndarray, float]:
    """Where CAGrad's F, around the gradients' mean with the shares given, is least over the simplex, and how low
    it is there, by SLSQP on the vectors from several starts."""
    mean = shares @ gradients
    radius = c * np.linalg.norm(mean)
    languages = len(gradients)

    def value(weights: np.ndarray) -> float:
        return float(weights @ gradients @ mean + radius * np.linalg.norm(weights @ gradients))

    starts = [np.full(languages, 1 / languages), *np.random.default_rng(0).dirichlet(np.ones(languages), 3)]
    constraint = {"type": "eq", "fun": lambda weights: weights.sum() - 1.0}
    found = []
    for start in starts:
        options = {"ftol": 1e-15, "maxiter": 500}
        end = minimize(value, start, bounds=[(0, 1)] * languages, constraints=constraint, options=options).x
        found.append(np.clip(end, 0, None) / np.clip(end, 0, None).sum())
    lowest = min(found, key=value)
    return lowest, value(lowest)


def reaches_unharmed(gradients: np.ndarray, c: float) -> bool:
    """Whether CAGrad's ball holds a d that harms no language, so that no F(w) is below 0: the one nearest to g_0,
    by quadprog on the vectors."""
    mean = gradients.mean(axis=0) / lengths_of(gradients).max()
    units = gradients / lengths_of(gradients)[:, None]
    nearest = quadprog.solve_qp(np.eye(len(mean)), mean, units.T, np.zeros(len(units)))[0]
    return bool(np.linalg.norm(nearest - mean) <= c * np.linalg.norm(mean) * (1.0 + 1e-6))


@pytest.mark.parametrize("method", PROJECTING)
@unhurried
@given(languages=st.integers(1, 8), data_seed=st.integers(0, 10**6), seed=st.integers(0, 10**6))
def test_coefficients_from_the_gram_matrix_are_the_method_on_the_vectors(
    method: DirectionMethod, languages: int, data_seed: int, seed: int
) -> None:
    gradients = random_gradients(languages, data_seed)
    expected = ON_VECTORS[method](gradients, seed)
    gram = gradients @ gradients.T
    projected = projected_coefficients(gram, method, seed)
    np.testing.assert_array_equal(projected, PROJECTING[method](gram, seed))
    np.testing.assert_allclose(projected @ gradients, expected, rtol=1e-7, atol=1e-7)
    direction = direction_weights(gram, method, seed) @ gradients
    np.testing.assert_allclose(direction, expected.sum(axis=0), rtol=1e-7, atol=1e-7)


@unhurried
@given(angle=st.floats(0.0, np.pi), length=st.floats(0.01, 100.0))
def test_two_languages_end_without_conflict(angle: float, length: float) -> None:
    gradients = np.array([[1.0, 0.0], [length * np.cos(angle), length * np.sin(angle)]])
    gram = gradients @ gradients.T
    first, second = pcgrad_coefficients(gram, seed=0) @ gradients
    assert first @ gradients[1] >= -1e-9 * length
    assert second @ gradients[0] >= -1e-9 * length
    if angle <= np.pi / 2:  # agreeing gradients stay as they are
        np.testing.assert_array_equal(direction_weights(gram, "pcgrad"), [1.0, 1.0])
    # The direction hurts neither language.
    direction = first + second
    assert (gradients @ direction >= -1e-9 * length).all()


@pytest.mark.parametrize("method", PROJECTING)
def test_order_of_projections_is_drawn_from_the_seed(method: DirectionMethod) -> None:
    gradients = np.array([[1.0, 0.0, 0.2], [-0.9, 0.5, 0.1], [-0.4, -0.9, 0.3]])
    gram = gradients @ gradients.T
    np.testing.assert_array_equal(direction_weights(gram, method, 5), direction_weights(gram, method, 5))
    drawn = np.stack([direction_weights(gram, method, seed) for seed in range(30)])
    assert len({tuple(np.round(weights, 12)) for weights in drawn}) > 1
    np.testing.assert_allclose(direction_weights(gram, method, 4, orders=20), drawn[4:24].mean(axis=0))


def test_gradvac_turns_an_angle_to_the_mean_of_all_angles() -> None:
    # Cosines: 0.8 between the first two, 0 between the third and each; their mean is 4/15.
    gradients = np.array([[1.0, 0.0, 0.0], [1.6, 1.2, 0.0], [0.0, 0.0, 3.0]])
    turned = gradvac_coefficients(gradients @ gradients.T, seed=1) @ gradients
    for first, last in ((0, 2), (1, 2)):
        cosine = turned[first] @ gradients[last] / np.linalg.norm(turned[first]) / 3.0
        np.testing.assert_allclose(cosine, 4 / 15)
    # 0.8 is above the aim: the third gradient alone turns the first.
    assert gradvac_coefficients(gradients @ gradients.T, seed=1)[0, 1] == 0.0


def test_gradvac_without_agreement_on_average_is_pcgrad() -> None:
    gradients = np.array([[1.0, 0.0, 0.2], [-0.9, 0.5, 0.1], [-0.4, -0.9, 0.3]])
    gram = gradients @ gradients.T
    assert gram[np.triu_indices(3, k=1)].sum() < 0.0
    for seed in range(10):
        np.testing.assert_allclose(gradvac_coefficients(gram, seed), pcgrad_coefficients(gram, seed), atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rest", [0.0, 1e-14])
def test_a_language_without_gradient_has_no_say(method: DirectionMethod, rest: float) -> None:
    gradients = np.array([[1.0, 0.0], [-rest, -rest], [-1.0, 2.0]])
    weights = direction_weights(gradients @ gradients.T, method)
    direction = weights @ gradients
    gradients = gradients[[0, 2]]
    expected = direction_weights(gradients @ gradients.T, method) @ gradients
    # The mean counts that language among those it divides by.
    expected *= 2 / 3 if method == "mean" else 1.0
    np.testing.assert_allclose(direction, expected, atol=1e-12)
    if method in WITHOUT_ZEROS:
        assert weights[1] == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_without_any_gradient_the_weights_are_finite(method: DirectionMethod) -> None:
    for languages in (1, 3):
        assert np.isfinite(direction_weights(np.zeros((languages, languages)), method, orders=2)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [1e-30, 1e-3, 1.0, 1e20])
@pytest.mark.parametrize("languages", [1, 2, 5])
def test_equal_gradients_give_their_own_direction(method: DirectionMethod, length: float, languages: int) -> None:
    gradients = np.repeat([[0.6 * length, -0.8 * length, 0.0]], languages, axis=0)
    direction = direction_weights(gradients @ gradients.T, method) @ gradients
    np.testing.assert_allclose(direction / np.linalg.norm(direction), [0.6, -0.8, 0.0], atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_opposite_gradients_of_one_length_cancel(method: DirectionMethod) -> None:
    gradients = np.array([[0.6, -0.8], [-0.6, 0.8]])
    weights = direction_weights(gradients @ gradients.T, method)
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights @ gradients, [0.0, 0.0], atol=1e-9)


def test_mean_sum_and_equal_norm_mean_on_the_vectors() -> None:
    gradients = random_gradients(4, seed=0) * np.array([[1.0], [1e-3], [1e5], [7.0]])
    gram = gradients @ gradients.T
    np.testing.assert_allclose(mean_direction(gram) @ gradients, gradients.mean(axis=0))
    np.testing.assert_allclose(direction_weights(gram, "mean") @ gradients, gradients.mean(axis=0))
    np.testing.assert_allclose(direction_weights(gram, "sum") @ gradients, gradients.sum(axis=0))
    units = gradients / lengths_of(gradients)[:, None]
    np.testing.assert_allclose(equal_norm_mean(gram) @ gradients, units.mean(axis=0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(PROJECTING)))
def test_methods_that_only_weigh_leave_each_gradient_as_it_is(method: DirectionMethod) -> None:
    gradients = random_gradients(4, seed=0)
    np.testing.assert_array_equal(projected_coefficients(gradients @ gradients.T, method), np.eye(4))


def check_mgda(gradients: np.ndarray, weights: np.ndarray) -> None:
    """The optimality conditions of the shortest vector of the hull."""
    lengths = lengths_of(gradients)
    assert (weights >= 0.0).all()
    np.testing.assert_allclose(weights.sum(), 1.0)
    direction = weights @ gradients
    slack = gradients @ direction - direction @ direction
    assert (slack >= -1e-9 * lengths * (weights @ lengths)).all()


@unhurried
@given(languages=st.integers(1, 12), dimensions=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_mgda_is_the_quadratic_program_on_the_vectors(languages: int, dimensions: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    gradients = generator.normal(size=(languages, dimensions)) + generator.normal(size=dimensions)
    weights = mgda(gradients @ gradients.T)
    check_mgda(gradients, weights)
    expected = shortest_of_hull(gradients)
    np.testing.assert_allclose(weights @ gradients, 0.0 if expected is None else expected, atol=1e-6)


def test_mgda_of_gradients_at_right_angles_weighs_them_by_their_inverse_squares() -> None:
    lengths = np.array([1.0, 3e-3, 2e-5, 1e-8])
    expected = lengths**-2 / np.sum(lengths**-2)
    np.testing.assert_allclose(mgda(np.diag(lengths**2)), expected, rtol=1e-6)
    # Turned, so that no entry of the vectors is zero.
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0] * lengths[:, None]
    np.testing.assert_allclose(mgda(turned @ turned.T), expected, rtol=1e-6)


def check_cagrad(gradients: np.ndarray, weights: np.ndarray, c: float = 0.5) -> bool:
    """d lies in the ball, w in the simplex, and what d does for the worst language is the value of F(w): as no d
    can do more than any F(w), both are optimal. False where g_w is zero, which leaves no d to check."""
    mean = gradients.mean(axis=0)
    radius = c * float(np.linalg.norm(mean))
    simplex = weights - 1.0 / len(weights)
    if radius <= 1e-6 * lengths_of(gradients).mean() or np.abs(simplex).max() == 0.0:
        return False
    direction = weights @ gradients
    np.testing.assert_allclose(np.linalg.norm(direction - mean), radius, rtol=1e-6)
    assert (simplex >= -1e-12).all()
    combined = simplex / simplex.sum() @ gradients
    dual = combined @ mean + radius * np.linalg.norm(combined)
    gains = gradients @ direction
    assert (gains >= dual - 1e-6 * lengths_of(gradients) * np.linalg.norm(direction)).all()
    return True


@unhurried
@given(languages=st.integers(1, 12), dimensions=st.integers(2, 12), seed=st.integers(0, 10**6))
def test_cagrad_reaches_the_value_of_its_dual(languages: int, dimensions: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    gradients = generator.normal(size=(languages, dimensions)) + generator.normal(size=dimensions)
    c = float(generator.uniform(0.05, 0.95))
    weights = cagrad(gradients @ gradients.T, c)
    if not check_cagrad(gradients, weights, c):
        assert reaches_unharmed(gradients, c)
        np.testing.assert_array_equal(weights, np.full(languages, 1 / languages))


def test_cagrad_does_as_well_for_the_worst_language_as_a_general_solver() -> None:
    for seed in range(5):
        gradients = random_gradients(5, seed)
        weights = cagrad(gradients @ gradients.T)
        worst = float((gradients @ (weights @ gradients)).min())
        np.testing.assert_allclose(worst, lowest_cagrad_dual(gradients, 0.5, np.full(5, 0.2))[1], rtol=1e-5)
        # The default is c = 0.5, and without a ball there is only the mean.
        np.testing.assert_array_equal(weights, cagrad(gradients @ gradients.T, c=0.5))
        np.testing.assert_array_equal(cagrad(gradients @ gradients.T, c=0.0), np.full(5, 0.2))


def test_cagrad_is_the_mean_where_the_dual_ends_at_zero() -> None:
    # F is at least 0 as both parts of it are, and 0 half-way between the first two gradients.
    gradients = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_array_equal(cagrad(gradients @ gradients.T), np.full(3, 1 / 3))


def test_cagrad_refuses_a_ball_that_holds_zero() -> None:
    for c in (-0.1, 1.0, np.nan):
        with pytest.raises(ValueError, match="c is"):
            cagrad(np.eye(2), c)


def check_nash(gradients: np.ndarray, weights: np.ndarray) -> None:
    """G w = 1 / w: each language's gain from the direction is the inverse of its weight."""
    assert (weights > 0.0).all()
    np.testing.assert_allclose(weights * (gradients @ (weights @ gradients)), 1.0, rtol=1e-5)


@unhurried
@given(languages=st.integers(1, 10), seed=st.integers(0, 10**6))
def test_nash_mtl_solves_its_equation(languages: int, seed: int) -> None:
    gradients = random_gradients(languages, seed)
    weights = nash_mtl(gradients @ gradients.T)
    check_nash(gradients, weights)
    # Longer or shorter gradients of single languages make no difference to the direction.
    factors = np.random.default_rng(seed).uniform(0.01, 100.0, size=(languages, 1))
    stretched = gradients * factors
    np.testing.assert_allclose(
        nash_mtl(stretched @ stretched.T) @ stretched, weights @ gradients, rtol=1e-6, atol=1e-6
    )


def test_nash_mtl_of_two_languages_at_any_angle() -> None:
    for angle in np.linspace(0.0, np.pi - 1e-3, 500):
        gram = np.array([[1.0, 3.0 * np.cos(angle)], [3.0 * np.cos(angle), 9.0]])
        # a^2 (1 + cos) = 1 for unit gradients; 1 + cos is taken as a square, which loses no digits.
        alpha = 1.0 / (np.sqrt(2.0) * np.cos(angle / 2.0))
        np.testing.assert_allclose(nash_mtl(gram), [alpha, alpha / 3.0], rtol=1e-8)


def test_nash_mtl_of_a_fan_of_languages_that_opens_to_a_half_plane() -> None:
    for opening in np.linspace(0.05 * np.pi, 0.99 * np.pi, 400):
        angles = np.linspace(0.0, opening, 5)
        gradients = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        check_nash(gradients, nash_mtl(gradients @ gradients.T))


def test_nash_mtl_is_the_minimum_that_a_general_solver_finds() -> None:
    for seed in range(5):
        gradients = random_gradients(4, seed)

        def value(logs: np.ndarray, gradients: np.ndarray = gradients) -> float:
            return 0.5 * float(np.sum((np.exp(logs) @ gradients) ** 2)) - float(logs.sum())

        found = minimize(value, np.zeros(4), method="Nelder-Mead", options={"xatol": 1e-9, "maxfev": 10**4})
        np.testing.assert_allclose(nash_mtl(gradients @ gradients.T), np.exp(found.x), rtol=1e-5)


def test_nash_mtl_without_a_solution_goes_with_the_languages_that_do_not_cancel() -> None:
    gradients = np.array([[2.0, 0.0], [-0.1, 0.0], [0.0, 3.0]])
    direction = nash_mtl(gradients @ gradients.T) @ gradients
    np.testing.assert_allclose(direction, [0.0, 1.0], atol=1e-5)


def projection_onto_the_dual_cone(gradient: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The vector nearest to `gradient` that hurts no language, by quadprog; zero where only zero hurts none.

    quadprog may call constraints inconsistent that zero fulfils. A linear program has to find nothing else then:
    no vector in the unit cube without harm that gains anything for any language.
    """
    languages, dimensions = units.shape
    try:
        return quadprog.solve_qp(np.eye(dimensions), gradient, units.T, np.zeros(languages))[0]
    except ValueError:
        best = linprog(-units.sum(axis=0), A_ub=-units, b_ub=np.zeros(languages), bounds=(-1, 1))
        assert best.success and -best.fun < 1e-9 and np.linalg.matrix_rank(units) == dimensions
        return np.zeros(dimensions)


@unhurried
@given(languages=st.integers(1, 10), dimensions=st.integers(2, 12), seed=st.integers(0, 10**6))
@example(languages=6, dimensions=4, seed=116869)  # only zero hurts none, and quadprog finds no solution
def test_upgrad_is_the_mean_of_the_projections_onto_the_dual_cone(
    languages: int, dimensions: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    gradients = generator.normal(size=(languages, dimensions)) + generator.normal(size=dimensions)
    units = gradients / lengths_of(gradients)[:, None]
    projected = [projection_onto_the_dual_cone(gradient, units) for gradient in gradients]
    direction = upgrad(gradients @ gradients.T) @ gradients
    np.testing.assert_allclose(direction, np.mean(projected, axis=0), atol=1e-6)
    assert (units @ direction >= -1e-6).all()


def test_upgrad_of_two_languages_is_half_of_pcgrad() -> None:
    for angle in np.linspace(0.0, np.pi, 50):
        gradients = np.array([[1.0, 0.0], [3.0 * np.cos(angle), 3.0 * np.sin(angle)]])
        gram = gradients @ gradients.T
        expected = direction_weights(gram, "pcgrad") @ gradients / 2.0
        np.testing.assert_allclose(upgrad(gram) @ gradients, expected, atol=1e-7)


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(PROJECTING) - {"krum"}))
@unhurried
@given(languages=st.integers(2, 8), seed=st.integers(0, 10**6))
def test_the_order_of_the_languages_makes_no_difference(
    method: DirectionMethod, languages: int, seed: int
) -> None:
    """But to the methods that draw one, and to Krum where two scores are equal."""
    gradients = random_gradients(languages, seed)
    order = np.random.default_rng(seed).permutation(languages)
    preference = np.random.default_rng(seed).uniform(0.2, 3.0, size=languages)
    weights = direction_weights(gradients @ gradients.T, method, preference=preference)
    shuffled = gradients[order]
    again = direction_weights(shuffled @ shuffled.T, method, preference=preference[order])
    np.testing.assert_allclose(again, weights[order], rtol=1e-5, atol=1e-6 * np.abs(weights).max())


def check_raco(
    gradients: np.ndarray, weights: np.ndarray, wanted: np.ndarray, c: float = 0.5
) -> np.ndarray | None:
    """The correction lies on the ball and gives no language more than it is wanted to have; what it is made of,
    as multiples of the weights wanted, which are at most 1; None where there is no correction."""
    anchor, correction = wanted @ gradients, weights - wanted
    radius = c * float(np.linalg.norm(anchor))
    if np.abs(correction).max() == 0.0 or radius == 0.0:
        return None
    assert (correction >= -1e-12 * np.abs(correction).max()).all()
    parts = float(correction @ lengths_of(gradients))
    assert abs(np.linalg.norm(correction @ gradients) - radius) <= 1e-6 * parts
    return correction


def test_raco_clips_what_a_general_solver_finds() -> None:
    clipped = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        gradients = random_gradients(4, seed)
        wanted = generator.dirichlet(np.ones(4))
        mixture, _ = lowest_cagrad_dual(gradients, 0.5, wanted)
        weights = raco(gradients @ gradients.T, 3.0 * wanted)
        correction = check_raco(gradients, weights, wanted)
        assert correction is not None
        expected = np.minimum(mixture, wanted)
        clipped += bool((mixture > wanted + 1e-3).any())
        np.testing.assert_allclose(correction / correction.sum(), expected / expected.sum(), atol=1e-4)
        np.testing.assert_allclose(raco(gradients @ gradients.T, 7.0 * wanted), weights, rtol=1e-9)
    assert clipped > 5


def test_raco_on_two_objectives_that_are_known() -> None:
    # Found by hand: F'(a) = 0 at a = 0.356145 for the mixture (a, 1 - a); cosines with g_0 before and after.
    gradients, wanted = np.array([[1.0, -4.0], [-1.0, 1.0]]), np.array([0.2, 0.8])
    anchor = wanted @ gradients
    correction = check_raco(gradients, raco(gradients @ gradients.T, wanted), wanted)
    assert correction is not None
    np.testing.assert_allclose(correction / correction.sum(), [0.2, 0.643855] / np.float64(0.843855), atol=1e-5)
    combined = correction @ gradients
    assert combined @ anchor / np.linalg.norm(combined) / np.linalg.norm(anchor) == pytest.approx(
        0.94333, abs=1e-5
    )


def test_raco_without_clipping_is_cagrad() -> None:
    # Equal gradients share the correction evenly, no more than their weights.
    gradients = np.array([[1.0, 0.5], [1.0, 0.5], [1.0, 0.5]])
    np.testing.assert_allclose(raco(gradients @ gradients.T), cagrad(gradients @ gradients.T).mean() * np.ones(3))
    with pytest.raises(ValueError, match="one weight above 0 for each of 3"):
        raco(np.eye(3), np.array([1.0, 0.0, 2.0]))
    with pytest.raises(ValueError, match="c is"):
        raco(np.eye(3), c=1.0)


def aligned_on_vectors(gradients: np.ndarray) -> np.ndarray:
    """Of the matrix nearest to the gradients with all singular values as the smallest: the mean of the rows."""
    left, values, right = np.linalg.svd(gradients, full_matrices=False)
    whole = values > 1e-6 * values[0]
    return values[whole][-1] * left[:, whole].mean(axis=0) @ right[whole]


def test_aligned_mtl_of_gradients_at_right_angles_gives_all_the_shortest_length() -> None:
    gram = np.diag([4.0, 1.0, 100.0])
    np.testing.assert_allclose(aligned_mtl(gram), [1 / 6, 1 / 3, 1 / 30])


@unhurried
@given(languages=st.integers(1, 10), seed=st.integers(0, 10**6))
def test_imtl_g_and_config_go_as_far_along_every_gradient(languages: int, seed: int) -> None:
    gradients = random_gradients(languages, seed) * 10.0 ** np.arange(languages)[:, None] ** 0.5
    units = gradients / lengths_of(gradients)[:, None]
    gram = gradients @ gradients.T
    direction = imtl_g(gram) @ gradients
    along = units @ direction
    assert along.min() > 0.0
    np.testing.assert_allclose(along, along[0], rtol=1e-6)
    assert abs(imtl_g(gram).sum()) == pytest.approx(1.0)
    other = config(gram) @ gradients
    length = np.linalg.norm(other)
    np.testing.assert_allclose(other / length, direction / np.linalg.norm(direction), atol=1e-6)
    assert length == pytest.approx(float((gradients @ other).sum()) / length, rel=1e-6)


def test_imtl_g_keeps_the_sign_of_its_direction_where_the_coefficients_sum_to_less_than_zero() -> None:
    # For cosine 0.9 with a third at 0.995 between two: the short one gets a negative coefficient.
    units = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.7, 0.7, 0.141421356]])
    gradients = units * np.array([1.0, 1.0, 0.05])[:, None]
    weights = imtl_g(gradients @ gradients.T)
    assert weights.sum() == pytest.approx(-1.0)
    assert (gradients @ (weights @ gradients) > 0.0).all()


def krum_on_vectors(gradients: np.ndarray, byzantine: int | None = None) -> np.ndarray:
    """Krum by distances of the vectors themselves."""
    count = len(gradients)
    if count < 3:
        return np.full(count, 1 / count)
    f = max(0, (count - 3) // 2) if byzantine is None else byzantine
    scores = []
    for i in range(count):
        away = sorted(float(np.sum((gradients[i] - gradients[k]) ** 2)) for k in range(count) if k != i)
        scores.append(sum(away[: count - f - 2]))
    ties = [i for i in range(count) if scores[i] <= min(scores) + 1e-8 * float(gradients[i] @ gradients[i])]
    return np.eye(count)[ties[0]]


def test_krum_takes_the_gradient_that_the_most_are_near() -> None:
    generator = np.random.default_rng(0)
    centre = generator.normal(size=50)
    gradients = 3.0 * centre + generator.normal(size=(8, 50))
    gradients[:2] = -gradients[:2]
    weights = krum(gradients @ gradients.T)
    np.testing.assert_array_equal(weights, krum_on_vectors(gradients))
    assert weights[:2].sum() == 0.0
    np.testing.assert_array_equal(krum(gradients @ gradients.T, 0), krum_on_vectors(gradients, 0))
    with pytest.raises(ValueError, match="byzantine is 6; with 8 languages it must be 0 to 5"):
        krum(gradients @ gradients.T, 6)


@st.composite
def unlike_gradients(draw: st.DrawFn) -> np.ndarray:
    """Gradients with small whole numbers: many equal, opposite, parallel and zero ones."""
    languages, dimensions = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    row = st.lists(st.integers(-2, 2), min_size=dimensions, max_size=dimensions)
    return np.array(draw(st.lists(row, min_size=languages, max_size=languages)), dtype=np.float64)


@unhurried
@given(gradients=unlike_gradients())
def test_mgda_and_nash_mtl_on_gradients_that_depend_on_each_other(gradients: np.ndarray) -> None:
    gram = gradients @ gradients.T
    rows = np.diag(gram) > 0.0
    assert (mgda(gram)[~rows] == 0.0).all() and (nash_mtl(gram)[~rows] == 0.0).all()
    if rows.any():
        gradients = gradients[rows]
        expected = shortest_of_hull(gradients)
        check_mgda(gradients, mgda(gram)[rows])
        np.testing.assert_allclose(mgda(gram)[rows] @ gradients, 0.0 if expected is None else expected, atol=1e-6)
        if expected is not None:
            check_nash(gradients, nash_mtl(gram)[rows])
        assert np.isfinite(nash_mtl(gram)).all()


def many_gradients(seed: int) -> np.ndarray:
    """2 to 30 languages, or one, in fewer or more dimensions than that, with what breaks solvers: shared parts,
    gradients that are equal, opposite, zero, nearly on one line or of lengths far apart; at any scale."""
    generator = np.random.default_rng(seed)
    languages = 1 if seed % 50 == 0 else int(np.exp(generator.uniform(np.log(2), np.log(31))))
    dimensions = int(np.exp(generator.uniform(np.log(1), np.log(41))))
    gradients = generator.normal(size=(languages, dimensions))
    half = languages // 2
    match seed % 8:
        case 1:
            gradients += generator.normal(size=dimensions) * generator.uniform(0, 5)
        case 2:
            line = generator.normal(size=(languages, 1)) * generator.normal(size=dimensions)
            gradients = line + gradients * generator.choice([0.0, 1e-4, 0.1])
        case 3:
            gradients[:] = gradients[0]
        case 4:
            gradients[generator.random(languages) < 0.4] = 0.0
        case 5:
            gradients[half : 2 * half] = -gradients[:half]
        case 6:
            gradients *= 10.0 ** generator.uniform(-3, 3, size=(languages, 1))
        case 7:
            gradients[:half] = -gradients[0]
            gradients[half:] = np.abs(gradients[half:])
    return gradients * 10.0 ** generator.uniform(-12, 12)


def relative_direction(method: DirectionMethod, gradients: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The direction with the lengths of the parts that it is the sum of divided out.

    UPGrad's weights are not the only ones that make its direction where gradients cancel: there the lengths are
    those of the gradients themselves.
    """
    parts = (1.0 if method == "upgrad" else np.abs(weights)) * lengths_of(gradients)
    return weights @ gradients / (float(parts.sum()) or 1.0)


def check_projected(method: DirectionMethod, gradients: np.ndarray, weights: np.ndarray, seed: int) -> None:
    expected = ON_VECTORS[method](gradients, seed)
    projected = projected_coefficients(gradients @ gradients.T, method, seed)
    np.testing.assert_array_equal(weights, projected.sum(axis=0))
    parts = np.abs(projected) @ lengths_of(gradients)[:, None]
    # What is left of gradients that cancel to less than 1e-6 is not followed further.
    assert (np.abs(projected @ gradients - expected) <= 1e-5 * parts).all()


def agreement_with_others(units: np.ndarray) -> list[float]:
    """max(0, cosine) of each unit vector with the sum of the others; 0 where that sum has cancelled."""
    found = []
    for i, unit in enumerate(units):
        rest = np.delete(units, i, axis=0).sum(axis=0)
        length = float(np.linalg.norm(rest))
        found.append(max(0.0, float(unit @ rest) / length) if length > 1e-6 * (len(units) - 1) else 0.0)
    return found


def test_consensus_gives_no_say_to_languages_that_the_others_contradict() -> None:
    generator = np.random.default_rng(0)
    shared = generator.normal(size=200)
    gradients = 0.7 * shared + generator.normal(size=(8, 200))
    gradients[5:] -= 1.4 * shared  # what inverted judgements do
    weights = direction_weights(gradients @ gradients.T, "consensus")
    assert (weights[5:] == 0.0).all() and (weights[:5] > 0.0).all()
    healthy = gradients[:5].mean(axis=0)

    def towards(method: DirectionMethod) -> float:
        direction = direction_weights(gradients @ gradients.T, method) @ gradients
        return float(direction @ healthy / np.linalg.norm(direction) / np.linalg.norm(healthy))

    assert towards("consensus") > 0.99 > towards("mean")
    assert towards("consensus") > towards("pcgrad")


@pytest.mark.parametrize("method", METHODS)
def test_a_thousand_gram_matrices(method: DirectionMethod) -> None:
    for seed in range(1000):
        gradients = many_gradients(seed)
        gram = gradients @ gradients.T
        weights = direction_weights(gram, method, seed)
        assert weights.shape == (len(gradients),) and np.isfinite(weights).all()
        np.testing.assert_array_equal(direction_weights(gram.copy(), method, seed), weights)
        direction = relative_direction(method, gradients, weights)
        factor = 10.0 ** ((seed % 25) - 12)
        scaled = gradients * factor
        again = relative_direction(method, scaled, direction_weights(scaled @ scaled.T, method, seed))
        np.testing.assert_allclose(again, direction, atol=1e-5, err_msg=f"seed {seed}")

        counted = lengths_of(gradients) > 0.0
        if not counted.any():
            continue
        some, of_some = gradients[counted], weights[counted]
        units = some / lengths_of(some)[:, None]
        longest = lengths_of(some).max()
        if method in WITHOUT_ZEROS:
            assert (weights[~counted] == 0.0).all()
        match method:
            case "pcgrad" | "gradvac":
                check_projected(method, gradients, weights, seed)
            case "mean":
                np.testing.assert_allclose(weights @ gradients, gradients.mean(axis=0), atol=1e-12 * longest)
            case "sum":
                np.testing.assert_allclose(weights @ gradients, gradients.sum(axis=0), atol=1e-12 * longest)
            case "equal_norm_mean":
                np.testing.assert_allclose(weights @ gradients, units.mean(axis=0), atol=1e-12)
            case "consensus":
                parts = len(some) * [1.0] if len(some) == 1 else agreement_with_others(units)
                expected = np.mean(np.array(parts)[:, None] * units, axis=0) if any(parts) else units.mean(axis=0)
                np.testing.assert_allclose(weights @ gradients, expected, atol=1e-6)
            case "mgda":
                check_mgda(some, of_some)
            case "cagrad":
                if not check_cagrad(some, of_some):
                    np.testing.assert_array_equal(of_some, np.full(len(some), 1 / len(some)))
                    if np.linalg.norm(some.mean(axis=0)) > 1e-6 * longest:
                        assert reaches_unharmed(some, 0.5)
            case "nash_mtl":
                apart = shortest_of_hull(units)
                if apart is not None and np.linalg.norm(apart) > 1e-4:
                    check_nash(some, of_some)
                elif apart is None:
                    alphas = of_some * lengths_of(some)
                    gains = units @ (alphas @ units) + 1e-6 * alphas
                    np.testing.assert_allclose(alphas * gains, 1.0, rtol=1e-5)
            case "upgrad":
                assert (units @ (of_some @ some) >= -1e-5 * lengths_of(some).sum()).all()
            case "raco":
                check_raco(some, of_some, np.full(len(some), 1 / len(some)))
            case "aligned_mtl":
                np.testing.assert_allclose(of_some @ some, aligned_on_vectors(some), atol=1e-6 * longest)
            case "imtl_g" | "config":
                expected = np.linalg.pinv(units, rcond=1e-6) @ np.ones(len(units))
                if np.linalg.norm(expected) > 1e-5:
                    found = of_some @ some
                    if method == "config" and (some @ expected).sum() < 0.0:  # its length is below 0
                        expected = -expected
                    towards = float(found @ expected) / np.linalg.norm(found) / np.linalg.norm(expected)
                    assert towards == pytest.approx(1.0, abs=1e-6)
            case "krum":
                np.testing.assert_allclose(of_some, krum_on_vectors(some), atol=1e-12)


@pytest.mark.parametrize(
    ("gram", "reason"),
    [
        (np.zeros((2, 3)), r"shape \(2, 3\)"),
        (np.zeros((0, 0)), r"shape \(0, 0\)"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), r"not finite in rows \[0, 1\]"),
        (np.array([[1.0, 0.5], [0.2, 1.0]]), "not symmetric"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_bad_gram_matrix_is_refused(method: DirectionMethod, gram: np.ndarray, reason: str) -> None:
    for function in (direction_weights, projected_coefficients):
        with pytest.raises(ValueError, match=reason):
            function(gram, method)


def test_an_unknown_method_and_no_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="'median'"):
        direction_weights(np.eye(2), "median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="orders is 0"):
        direction_weights(np.eye(2), "pcgrad", orders=0)
