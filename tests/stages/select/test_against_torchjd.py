"""The directions against TorchJD's.

`torchjd-directions.json` has what TorchJD 0.18.0 makes of some gradients; where TorchJD and what its solvers need
are installed, the table is made anew by

    pip install torchjd==0.18.0 qpsolvers quadprog cvxpy clarabel ecos
    python tests/stages/select/test_against_torchjd.py

With TorchJD installed, methods that need none of its slow solvers are compared on many more gradients.

Not compared: Krum, whose scores are sums of squared distances in its paper and here, and of distances in TorchJD;
and RACO and consensus, which it does not have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from congrad_ray.config.names import DirectionMethod
from congrad_ray.stages.select.directions import direction_weights

TABLE = Path(__file__).with_name("torchjd-directions.json")
SEED = 7  # of the orders of PCGrad and GradVac
# How near ours is to TorchJD's unit vector: its solvers are iterations, or add to the diagonal.
TOLERANCES: dict[DirectionMethod, float] = {
    "pcgrad": 1e-6,
    "gradvac": 1e-6,
    "mgda": 1e-2,
    "cagrad": 1e-4,
    "nash_mtl": 1e-5,
    "upgrad": 1e-4,
    "aligned_mtl": 1e-6,
    "imtl_g": 1e-6,
    "config": 1e-6,
}
FAST: tuple[DirectionMethod, ...] = ("pcgrad", "gradvac", "upgrad", "aligned_mtl", "imtl_g", "config")


def cases() -> dict[str, np.ndarray]:
    """Gradients (languages, 8): plain ones and what breaks solvers."""
    generator = np.random.default_rng(0)
    found = {}
    for languages in (2, 3, 5, 7):
        for number in range(3):
            shared = generator.normal(size=(languages, 1)) * generator.normal(size=8)
            found[f"random, {languages}, {number}"] = shared + generator.normal(size=(languages, 8))
    line = generator.normal(size=8)
    found["nearly on one line"] = line + 1e-2 * generator.normal(size=(4, 8))
    found["of unlike lengths"] = generator.normal(size=(4, 8)) * np.array([[30.0], [1.0], [0.3], [0.03]])
    found["more than dimensions"] = generator.normal(size=(6, 3)) @ np.eye(3, 8)
    one, other = generator.normal(size=(2, 8))
    found["opposite"] = np.stack([one, -2.0 * one, other])
    found["one is zero"] = np.stack([one, np.zeros(8), other, line])
    return found


def is_defined(method: DirectionMethod, name: str) -> bool:
    """Whether TorchJD has a direction there that ours should be."""
    match name:
        case "one is zero":  # which ours leaves out; TorchJD's others divide by its length or end at it
            return method in ("upgrad", "aligned_mtl", "imtl_g", "config", "pcgrad")
        case "opposite":  # no projections are equal, nothing to bargain for, zero in the hull
            return method in ("upgrad", "aligned_mtl", "pcgrad")
        case "more than dimensions":  # least squares of another matrix; no bargain
            return method not in ("imtl_g", "nash_mtl")
        case "random, 5, 1" | "of unlike lengths":  # TorchJD's Nash-MTL ends far from G w = 1 / w, ours solves it
            return method != "nash_mtl"
    return True


@contextmanager
def our_order(languages: int, others_only: bool) -> Iterator[None]:
    """TorchJD draws the orders that ours does: among all languages, or among the others of the one in turn."""
    import torch

    generator, turn, before = np.random.default_rng(SEED), iter(range(languages)), torch.randperm

    def draw(_: int) -> torch.Tensor:
        order, current = generator.permutation(languages), next(turn)
        if others_only:
            order = order[order != current]
            order = order - (order > current)
        return torch.from_numpy(order)

    torch.randperm = draw  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.randperm = before


def reference(method: DirectionMethod, gradients: np.ndarray) -> np.ndarray:
    """TorchJD's direction (d,) of gradients (L, d)."""
    import torch
    import torchjd.aggregation as jd
    from torchjd._linalg import QuadprogProjector

    matrix = torch.from_numpy(gradients)
    gram: Any = matrix @ matrix.T
    match method:
        case "pcgrad":
            with our_order(len(matrix), others_only=False):
                weights = jd.PCGradWeighting()(gram)
        case "gradvac":
            # Its target is an average over steps; ours is one number, as if it had always been the same.
            lengths = np.linalg.norm(gradients, axis=1)
            cosines = gradients @ gradients.T / np.outer(lengths, lengths)
            target = float(np.clip(cosines[np.triu_indices(len(matrix), 1)].mean(), 0.0, 0.99))
            weighting = jd.GradVacWeighting(beta=0.0, eps=0.0)
            weighting._ensure_state(len(matrix), gram.dtype)
            weighting._phi_t.fill_(target)
            with our_order(len(matrix), others_only=True):
                weights = weighting(gram)
        case "mgda":
            weights = jd.MGDAWeighting(epsilon=1e-9, max_iters=20000)(gram)
        case "cagrad":
            weights = jd.CAGradWeighting(c=0.5, norm_eps=1e-9)(gram)
        case "nash_mtl":
            return jd.NashMTL(len(matrix), max_norm=0.0, optim_niter=100)(matrix).numpy()
        case "upgrad":
            weights = jd.UPGradWeighting(projector=QuadprogProjector(norm_eps=1e-12, reg_eps=1e-10))(gram)
        case "aligned_mtl":
            weights = jd.AlignedMTLWeighting()(gram)
        case "imtl_g":
            weights = jd.IMTLGWeighting()(gram)
        case "config":
            return jd.ConFIG()(matrix).numpy()
        case _:
            raise ValueError(f"TorchJD has no {method}")
    return (weights @ matrix).numpy()


def compare(method: DirectionMethod, gradients: np.ndarray, expected: np.ndarray) -> None:
    direction = direction_weights(gradients @ gradients.T, method, SEED) @ gradients
    scale, tolerance = float(np.linalg.norm(expected)), TOLERANCES[method]
    if scale <= 1e-3 * np.linalg.norm(gradients, axis=1).mean():
        assert np.linalg.norm(direction) <= 2e-3 * np.linalg.norm(gradients, axis=1).mean()
        return
    np.testing.assert_allclose(direction / np.linalg.norm(direction), expected / scale, atol=tolerance)
    if method != "nash_mtl" and gradients.any(axis=1).all():  # means count a zero gradient, ours do not
        np.testing.assert_allclose(np.linalg.norm(direction), scale, rtol=max(10 * tolerance, 1e-5))


def table() -> list[tuple[str, str]]:
    known = json.loads(TABLE.read_text()) if TABLE.exists() else {"directions": {}}
    return [(name, method) for name, row in known["directions"].items() for method in row]


@pytest.mark.parametrize(("name", "method"), table())
def test_directions_are_those_of_torchjd(name: str, method: DirectionMethod) -> None:
    known = json.loads(TABLE.read_text())
    gradients = np.array(known["gradients"][name])
    compare(method, gradients, np.array(known["directions"][name][method]))


def test_the_table_is_of_the_cases() -> None:
    known = json.loads(TABLE.read_text())
    for name, gradients in cases().items():
        np.testing.assert_allclose(known["gradients"][name], gradients, atol=1e-12)
        assert set(known["directions"][name]) == {method for method in TOLERANCES if is_defined(method, name)}


@pytest.mark.parametrize("method", FAST)
def test_directions_of_random_gradients_are_those_of_torchjd(method: DirectionMethod) -> None:
    pytest.importorskip("torchjd")
    pytest.importorskip("qpsolvers")
    for seed in range(50):
        generator = np.random.default_rng(seed)
        languages = int(generator.integers(2, 9))
        shared = generator.normal(size=(languages, 1)) * generator.normal(size=20)
        gradients = shared + generator.normal(size=(languages, 20))
        expected = reference(method, gradients)
        # IMTL-G's coefficients may have a sum below 0, which turns the paper's direction round, but not ours.
        flipped = method == "imtl_g" and (gradients @ expected).sum() < 0.0
        compare(method, gradients, -expected if flipped else expected)


def main() -> None:
    gradients = cases()
    directions = {
        name: {m: reference(m, matrix).tolist() for m in TOLERANCES if is_defined(m, name)}
        for name, matrix in gradients.items()
    }
    rows = {"gradients": {name: matrix.tolist() for name, matrix in gradients.items()}, "directions": directions}
    TABLE.write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
