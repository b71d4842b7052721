from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from congrad_ray.surgery.directions import mean_direction, pcgrad, pcgrad_coefficients


def random_gradients(languages: int, seed: int) -> np.ndarray:
    """(languages, 30), with a shared part of random sign and size, so that some agree and some conflict."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=30)
    return generator.normal(size=(languages, 1)) * shared + generator.normal(size=(languages, 30))


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


@given(languages=st.integers(1, 8), data_seed=st.integers(0, 10**6), seed=st.integers(0, 10**6))
def test_coefficients_from_the_gram_matrix_are_pcgrad_on_the_vectors(
    languages: int, data_seed: int, seed: int
) -> None:
    gradients = random_gradients(languages, data_seed)
    expected = pcgrad_on_vectors(gradients, seed)
    gram = gradients @ gradients.T
    np.testing.assert_allclose(pcgrad_coefficients(gram, seed) @ gradients, expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(pcgrad(gram, seed) @ gradients, expected.sum(axis=0), rtol=1e-8, atol=1e-8)


@given(angle=st.floats(0.0, np.pi), length=st.floats(0.01, 100.0))
def test_two_languages_end_without_conflict(angle: float, length: float) -> None:
    gradients = np.array([[1.0, 0.0], [length * np.cos(angle), length * np.sin(angle)]])
    gram = gradients @ gradients.T
    first, second = pcgrad_coefficients(gram, seed=0) @ gradients
    assert first @ gradients[1] >= -1e-9 * length
    assert second @ gradients[0] >= -1e-9 * length
    if angle <= np.pi / 2:  # agreeing gradients stay as they are
        np.testing.assert_array_equal(pcgrad(gram, seed=0), [1.0, 1.0])
    # The direction hurts neither language.
    direction = first + second
    assert (gradients @ direction >= -1e-9 * length).all()


def test_order_of_projections_is_drawn_from_the_seed() -> None:
    gradients = np.array([[1.0, 0.0, 0.2], [-0.9, 0.5, 0.1], [-0.4, -0.9, 0.3]])
    gram = gradients @ gradients.T
    np.testing.assert_array_equal(pcgrad(gram, seed=5), pcgrad(gram, seed=5))
    assert len({tuple(np.round(pcgrad(gram, seed), 12)) for seed in range(30)}) > 1


def test_a_language_with_zero_gradient_is_skipped() -> None:
    gradients = np.array([[1.0, 0.0], [0.0, 0.0], [-1.0, 1.0]])
    weights = pcgrad(gradients @ gradients.T, seed=0)
    assert np.isfinite(weights).all()
    without = pcgrad((gradients @ gradients.T)[np.ix_([0, 2], [0, 2])], seed=0)
    np.testing.assert_allclose(weights @ gradients, without @ gradients[[0, 2]])


def test_mean_direction_is_the_mean() -> None:
    gradients = random_gradients(4, seed=0)
    np.testing.assert_allclose(mean_direction(gradients @ gradients.T) @ gradients, gradients.mean(axis=0))


@pytest.mark.parametrize(
    ("gram", "reason"),
    [
        (np.zeros((2, 3)), r"shape \(2, 3\)"),
        (np.zeros((0, 0)), r"shape \(0, 0\)"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), r"not finite in rows \[0, 1\]"),
        (np.array([[1.0, 0.5], [0.2, 1.0]]), "not symmetric"),
    ],
)
def test_a_bad_gram_matrix_is_refused(gram: np.ndarray, reason: str) -> None:
    for function in (lambda: pcgrad(gram, seed=0), lambda: mean_direction(gram)):
        with pytest.raises(ValueError, match=reason):
            function()
