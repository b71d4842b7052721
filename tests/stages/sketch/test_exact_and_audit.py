from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from congrad_ray.modeling.batching import collate_pairs
from congrad_ray.modeling.packing import PairTokens
from congrad_ray.modeling.tokenization import TokenizedPair
from congrad_ray.stages.sketch import memory
from congrad_ray.stages.sketch.audit import audit, cosines_with_others, expected_overlap, rank_correlation
from congrad_ray.stages.sketch.capture import GradientCapture
from congrad_ray.stages.sketch.countsketch import CountSketch, FoldRule
from congrad_ray.stages.sketch.exact import (
    GramVisitor,
    add_weighted_sums_,
    dots_and_norms,
    gram_matrix,
    pair_gradient,
)
from congrad_ray.stages.sketch.memory import fitting_token_budget
from congrad_ray.stages.sketch.sketcher import sketch_pairs
from congrad_ray.stages.sketch.storage import to_storage

BuildModel = Callable[[str], PreTrainedModel]


def whole(model: PreTrainedModel, pairs: list[TokenizedPair]) -> torch.Tensor:
    """Autograd's u of every pair, (B, parameters) float64."""
    model.eval()
    gradients = [pair_gradient(model, collate_pairs([pair], pad_token_id=0)) for pair in pairs]
    return torch.stack([torch.cat([values.flatten() for values in one.values()]) for one in gradients]).double()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_inner_products_are_those_of_autograds_gradients(
    build_model: BuildModel, pairs: list[TokenizedPair], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(family)
    u = whole(model, pairs)
    monkeypatch.setattr("congrad_ray.stages.sketch.exact._ENTRIES", 3 * 32 * 7)  # several blocks of rows a layer
    weights = torch.tensor([[0.5, 0.0, 2.0], [0.0, -1.0, 0.0]])
    with GradientCapture(model) as capture:
        batch = capture.layout(pairs)
        gram = gram_matrix(capture, batch)
        sums: dict[str, torch.Tensor] = {}
        for _ in range(2):  # adds to what is there
            captured = add_weighted_sums_(sums, weights, capture, batch)
        dots, norms, again = dots_and_norms(sums, capture, batch)
    torch.testing.assert_close(gram, u @ u.T, rtol=1e-5, atol=1e-5 * float(gram.max()))
    summed = torch.cat([sums[name].flatten(1) for name in capture.layers], dim=1).double()
    # c of DPO is beta / 2 where the reference is the policy.
    torch.testing.assert_close(captured.coefficients, torch.full((3,), 0.05))
    expected = 2 * 0.05 * weights.double() @ u
    torch.testing.assert_close(summed, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(dots, u @ expected.T, rtol=1e-4, atol=1e-5 * float((u @ expected.T).abs().max()))
    torch.testing.assert_close(norms, u.norm(dim=1), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(captured.logps, again.logps)
    torch.testing.assert_close(captured.coefficients, again.coefficients)


def test_wide_sketches_agree_with_exact_cosines(build_model: BuildModel, pairs: list[TokenizedPair]) -> None:
    with GradientCapture(build_model("llama")) as capture:
        batch = capture.layout(pairs)
        exact = cosines_with_others(gram_matrix(capture, batch).numpy())
        sketches = sketch_pairs(capture, CountSketch(2**17, 0, FoldRule(1)), batch).sketches.double().numpy()
    sketched = cosines_with_others(sketches @ sketches.T)
    assert np.abs(exact).max() > 0.05
    np.testing.assert_allclose(sketched, exact, atol=0.015)


def test_cosines_with_others_against_the_vectors() -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 7))
    vectors[3] = 0.0
    found = cosines_with_others(vectors @ vectors.T)
    for index, vector in enumerate(vectors):
        others = np.delete(vectors, index, axis=0).mean(axis=0)
        expected = vector @ others / np.linalg.norm(vector) / np.linalg.norm(others) if vector.any() else 0.0
        assert found[index] == pytest.approx(expected)


def test_audit_tells_error_and_ranks() -> None:
    exact = np.array([0.1, 0.2, 0.3, 0.4])
    found = audit(exact, np.array([0.1, 0.3, 0.2, 0.4]))
    assert found is not None
    assert asdict(found) == pytest.approx(
        {"pairs": 4, "error": (2 * 0.01 / 4) ** 0.5, "largest_error": 0.1, "rank_correlation": 0.8}
    )
    assert audit(exact[:1], exact[:1]) is None
    # Ties share a rank: ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3.
    assert rank_correlation(np.array([1.0, 2.0, 2.0, 3.0]), exact) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert np.isnan(rank_correlation(np.zeros(4), exact))


@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_the_overlap_that_an_error_leaves_is_that_of_drawn_scores(keep: float) -> None:
    random = np.random.default_rng(0)
    exact, error = random.normal(0, 0.09, 200_000), random.normal(0, 0.03, 200_000)
    sketched = exact + error
    kept = [values >= np.quantile(values, 1 - keep) for values in (exact, sketched)]
    measured = (kept[0] & kept[1]).sum() / kept[0].sum()
    assert expected_overlap(0.03, float(sketched.std()), keep) == pytest.approx(measured, abs=0.003)
    assert expected_overlap(0.0, 0.1, keep) == pytest.approx(1.0, abs=1e-6)
    assert expected_overlap(0.2, 0.1, keep) == keep


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 5e-4), ("int8", 0.01)])
def test_storage_keeps_what_its_type_can(dtype: str, tolerance: float) -> None:
    sketches = torch.randn(6, 4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 6, 6)[:, None]
    sketches[3] = 0.0
    stored, scales = to_storage(sketches, dtype)
    assert stored.dtype == np.dtype(dtype) and scales.dtype == np.float32
    error = np.linalg.norm(stored.astype(np.float64) * scales[:, None] - sketches.numpy(), axis=1)
    assert (error <= tolerance * sketches.norm(dim=1).numpy()).all()
    with pytest.raises(ValueError, match="'int4'; choose int8, float16 or float32"):
        to_storage(sketches, "int4")


class _Work:
    """Stands for the engine, with a memory of this many bytes for every position."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bytes_per_token: int) -> None:
        self.positions: list[int] = []
        work = self

        class Memory:
            def __enter__(self) -> Memory:
                self.before = self.peak = 0
                return self

            def __exit__(self, *error: object) -> None:
                self.peak = work.positions[-1] * bytes_per_token

        monkeypatch.setattr(memory, "PeakResidentMemory", Memory)

    def __call__(self, batch: PairTokens) -> None:
        self.positions.append(batch.positions)


def test_a_token_budget_that_does_not_fit_is_lowered(
    build_model: BuildModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = _Work(monkeypatch, bytes_per_token=1000)
    with GradientCapture(build_model("llama")) as capture:
        # A pair of rows of 50 tokens has 99 positions, the first token being shared.
        assert fitting_token_budget(capture, work, 1000, 50, free_bytes=10**9) == 1000
        assert work.positions == [99]
        assert fitting_token_budget(capture, work, 1000, 50, free_bytes=500_000) == 400
        assert fitting_token_budget(capture, work, 10, 50, free_bytes=200_000) == 10  # one pair a batch anyway
        with pytest.raises(ValueError, match=r"max_length = 50 tokens takes 0\.00 GiB.*gradient_checkpointing"):
            fitting_token_budget(capture, work, 1000, 50, free_bytes=100_000)


def test_the_probe_measures_real_memory(build_model: BuildModel) -> None:
    with GradientCapture(build_model("llama")) as capture:

        def hungry(batch: PairTokens) -> None:
            torch.zeros(64 * 2**20 // 4).add_(1)

        assert fitting_token_budget(capture, hungry, 256, 64, free_bytes=2**40) == 256
        with pytest.raises(ValueError, match=r"takes 0\.06 GiB"):
            fitting_token_budget(capture, hungry, 256, 64, free_bytes=2**20)
        assert fitting_token_budget(capture, hungry, 256, 64) == 256  # what the machine has free


def test_inner_products_over_a_large_layer_keep_their_digits() -> None:
    """Their error is that of the gradients, not of adding up a million products in float32."""
    generator = torch.Generator().manual_seed(0)
    inputs, gradients = (torch.randn(200, size, generator=generator) for size in (576, 1536))
    visitor = GramVisitor(SimpleNamespace(pairs=5, input_ids=inputs))  # type: ignore[arg-type]
    visitor.visit("layer", inputs, gradients, range(0, 201, 40))
    parts = [slice(start, start + 40) for start in range(0, 200, 40)]
    exact = torch.stack([(gradients[part].double().T @ inputs[part].double()).flatten() for part in parts])
    expected = exact @ exact.T
    norms = expected.diagonal().sqrt()
    assert ((visitor.gram - expected).abs() / (norms[:, None] * norms)).max() < 1e-7
