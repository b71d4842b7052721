from __future__ import annotations

import numpy as np
import pytest

from congrad_ray.surgery.directions import mean_direction, pcgrad, pcgrad_coefficients
from congrad_ray.surgery.scores import (
    cosine_matrix,
    own_language_cosine,
    pair_scores,
    projected_cosine_matrix,
)

LANGUAGES = 4


@pytest.fixture
def sketches() -> np.ndarray:
    """(20, 50): five pairs of each language around a centre; the centres partly conflict."""
    generator = np.random.default_rng(3)
    centres = generator.normal(size=(LANGUAGES, 1)) * generator.normal(size=50)
    return np.repeat(centres, 5, axis=0) + generator.normal(size=(20, 50))


@pytest.fixture
def gradients(sketches: np.ndarray) -> np.ndarray:
    return sketches.reshape(LANGUAGES, 5, 50).mean(axis=1)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_pair_scores_are_those_with_the_direction_formed(sketches: np.ndarray, gradients: np.ndarray) -> None:
    gram = gradients @ gradients.T
    norms = np.linalg.norm(sketches, axis=1)
    for weights in (pcgrad(gram, seed=1), mean_direction(gram)):
        direction = weights @ gradients
        cosines, dots = pair_scores(sketches @ gradients.T, norms, gram, weights)
        np.testing.assert_allclose(dots, sketches @ direction)
        np.testing.assert_allclose(cosines, [cosine(sketch, direction) for sketch in sketches])


def test_own_language_cosine_is_that_with_the_own_gradient(sketches: np.ndarray, gradients: np.ndarray) -> None:
    languages = np.repeat(np.arange(LANGUAGES), 5)
    actual = own_language_cosine(
        sketches @ gradients.T, np.linalg.norm(sketches, axis=1), gradients @ gradients.T, languages
    )
    expected = [cosine(sketch, gradients[language]) for sketch, language in zip(sketches, languages, strict=True)]
    np.testing.assert_allclose(actual, expected)


def test_cosine_matrices_before_and_after_the_surgery(gradients: np.ndarray) -> None:
    gram = gradients @ gradients.T
    before, after = cosine_matrix(gram), projected_cosine_matrix(gram, seed=1)
    projected = pcgrad_coefficients(gram, seed=1) @ gradients
    assert before.min() < -0.1  # there is a conflict to resolve
    for i in range(LANGUAGES):
        for k in range(LANGUAGES):
            assert before[i, k] == pytest.approx(cosine(gradients[i], gradients[k]))
            assert after[i, k] == pytest.approx(cosine(projected[i], projected[k]))
    assert not np.allclose(before, after)


def test_zero_norms_have_cosine_zero(sketches: np.ndarray, gradients: np.ndarray) -> None:
    gradients[2] = 0.0
    sketches[7] = 0.0
    gram = gradients @ gradients.T
    dots, norms = sketches @ gradients.T, np.linalg.norm(sketches, axis=1)
    cosines, products = pair_scores(dots, norms, gram, pcgrad(gram, seed=0))
    assert cosines[7] == products[7] == 0.0
    assert np.isfinite(cosines).all() and (cosines != 0.0).sum() == 19
    own = own_language_cosine(dots, norms, gram, np.repeat(np.arange(LANGUAGES), 5))
    assert (own[10:15] == 0.0).all() and own[7] == 0.0 and (own[:5] != 0.0).all()
    for matrix in (cosine_matrix(gram), projected_cosine_matrix(gram, seed=0)):
        assert (matrix[2] == 0.0).all() and np.isfinite(matrix).all()


def test_opposite_languages_cancel_to_cosine_zero_and_not_to_noise() -> None:
    generator = np.random.default_rng(0)
    gradient = generator.normal(size=50)
    gradients = np.stack([gradient, -3.0 * gradient])
    sketches = generator.normal(size=(6, 50))
    gram = gradients @ gradients.T
    cosines, _ = pair_scores(sketches @ gradients.T, np.linalg.norm(sketches, axis=1), gram, pcgrad(gram, seed=0))
    np.testing.assert_array_equal(cosines, 0.0)
    np.testing.assert_array_equal(projected_cosine_matrix(gram, seed=0), 0.0)


def test_norms_of_another_space_are_noticed(sketches: np.ndarray, gradients: np.ndarray) -> None:
    gram = gradients @ gradients.T
    norms = np.linalg.norm(sketches, axis=1) / 100
    with pytest.raises(ValueError, match="norms must be those of the sketches"):
        pair_scores(sketches @ gradients.T, norms, gram, pcgrad(gram, seed=0))


def test_shapes_are_checked(sketches: np.ndarray, gradients: np.ndarray) -> None:
    gram = gradients @ gradients.T
    dots, norms = sketches @ gradients.T, np.linalg.norm(sketches, axis=1)
    with pytest.raises(ValueError, match=r"norms \(19,\)"):
        pair_scores(dots, norms[1:], gram, np.ones(LANGUAGES))
    with pytest.raises(ValueError, match=r"weights has shape \(3,\)"):
        pair_scores(dots, norms, gram, np.ones(3))
    with pytest.raises(ValueError, match=r"dots has shape \(20, 3\)"):
        own_language_cosine(dots[:, :3], norms, gram, np.zeros(20, dtype=int))
