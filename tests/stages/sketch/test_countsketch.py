from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from congrad_ray.stages.sketch.countsketch import CountSketch, FoldRule, _Side, layer_groups

SHAPES = {"model.layers.0.mlp.up_proj": (24, 16), "model.layers.0.mlp.down_proj": (16, 24)}
UNFOLDED = FoldRule(1)
Vector = dict[str, torch.Tensor]


def random_vector(seed: int, rank: int | None = None, shapes: dict[str, tuple[int, int]] | None = None) -> Vector:
    """Gaussian matrices, of this rank if one is given."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (rows, columns) in (shapes or SHAPES).items():
        if rank is None:
            found[name] = torch.randn(rows, columns, generator=generator)
        else:
            left, right = (torch.randn(side, rank, generator=generator) for side in (rows, columns))
            found[name] = left @ right.T
    return found


def flat(vector: Vector) -> torch.Tensor:
    return torch.cat([values.flatten() for values in vector.values()]).double()


def plus(one: Vector, factor: float, other: Vector) -> Vector:
    return {name: values + factor * other[name] for name, values in one.items()}


def chunks(vector: Vector, width: int) -> list[torch.Tensor]:
    return [chunk for values in vector.values() for chunk in values.double().flatten().split(width)]


def estimates_of(x: Vector, y: Vector, width: int, fold: FoldRule, seeds: int) -> torch.Tensor:
    estimates = torch.empty(seeds, dtype=torch.float64)
    for seed in range(seeds):
        sketch = CountSketch(width, seed, fold)
        estimates[seed] = sketch.sketch_vector(x).double() @ sketch.sketch_vector(y).double()
    return estimates


@pytest.mark.parametrize("width", [64, 50])
@pytest.mark.parametrize("rank", [None, 1])
def test_without_folds_inner_products_have_the_mean_and_variance_of_the_formula(
    width: int, rank: int | None
) -> None:
    x = random_vector(0, rank)
    y = plus(random_vector(1, rank), 0.5, x)
    # One large entry, so that the terms of single chunks matter.
    x["model.layers.0.mlp.up_proj"][3, 4] = y["model.layers.0.mlp.up_proj"][3, 4] = 20.0
    seeds = 1500
    estimates = estimates_of(x, y, width, UNFOLDED, seeds)

    x_flat, y_flat = flat(x), flat(y)
    inner = x_flat @ y_flat
    whole = x_flat.square().sum() * y_flat.square().sum() + inner**2
    within = sum(
        one.square().sum() * other.square().sum() + (one @ other) ** 2
        for one, other in zip(chunks(x, width), chunks(y, width), strict=True)
    )
    variance = (whole - within) / width
    plain_count_sketch = (whole - 2 * (x_flat.square() * y_flat.square()).sum()) / width
    assert variance < plain_count_sketch
    assert abs(estimates.mean() - inner) < 4 * (variance / seeds).sqrt()
    # The sample variance of 1500 draws has a relative standard error of about 0.05.
    assert estimates.var() == pytest.approx(variance.item(), rel=0.2)


FOLDED_SHAPES = {f"layer-{number}": (96, 128) for number in range(4)}


@pytest.mark.parametrize("fold", [2, 4, 8])
@pytest.mark.parametrize("rank", [1, 8, None])
def test_folds_stay_unbiased_and_cost_what_is_said(fold: int, rank: int | None) -> None:
    x = random_vector(2, rank, FOLDED_SHAPES)
    y = random_vector(3, rank, FOLDED_SHAPES)
    width, seeds = 8192, 150
    errors = []
    for other in (x, y):
        estimates = estimates_of(x, other, width, FoldRule(fold), seeds)
        assert abs(estimates.mean() - flat(x) @ flat(other)) < 4 * estimates.std() / seeds**0.5
        errors.append(float(estimates.std() / flat(x).norm() / flat(other).norm()))
    # The docstring's error of rank one with itself, added up over layers, and that of the table.
    fourth_powers = sum(values.double().square().sum() ** 2 for values in x.values()) / flat(x).norm() ** 4
    rank_one = fourth_powers * ((1 + 2 * (fold - 1) / 96) * (1 + 2 * (fold - 1) / 128) - 1)
    said = float((rank_one + 2 / width).sqrt())
    if rank == 1:
        assert errors[0] == pytest.approx(said, rel=0.3)
    else:
        assert errors[0] < 0.6 * said
    assert errors[1] < 0.6 * said  # gradients that have little in common


def test_sketch_is_linear() -> None:
    for fold in (FoldRule(1), FoldRule(4)):
        sketch = CountSketch(40, 7, fold)
        x, y = random_vector(0), random_vector(1)
        combined = {name: 2.0 * x[name] - 3.0 * y[name] for name in x}
        expected = 2.0 * sketch.sketch_vector(x) - 3.0 * sketch.sketch_vector(y)
        torch.testing.assert_close(sketch.sketch_vector(combined), expected, rtol=1e-5, atol=1e-4)


def matrix_of(sketch: Callable[[torch.Tensor], torch.Tensor], entries: int) -> torch.Tensor:
    """The map as a (width, entries) matrix, from what it does to unit vectors."""
    return torch.stack([sketch(unit) for unit in torch.eye(entries)], dim=1)


def test_every_entry_goes_to_one_bucket_with_a_sign() -> None:
    sketch = CountSketch(64, 3, UNFOLDED)
    matrix = matrix_of(lambda unit: sketch.sketch_vector({"layer": unit.view(24, 16)}), 24 * 16)
    assert torch.equal(matrix.abs().sum(dim=0), torch.ones(24 * 16))
    assert set(matrix.unique().tolist()) == {-1.0, 0.0, 1.0}
    buckets = matrix.abs().argmax(dim=0)
    for chunk in buckets.split(64):
        assert len(chunk.unique()) == 64  # entries of a chunk never share one
    assert abs(matrix.sum()) < 4 * (24 * 16) ** 0.5


def test_folding_the_factors_is_folding_their_product() -> None:
    d, a = torch.randn(11, 24), torch.randn(11, 17)
    sketch = CountSketch(64, 3, FoldRule(4))
    folded = sketch.fold_outputs("layer", d).T @ sketch.fold_inputs("layer", a)
    assert folded.shape == (6, 5)
    table = sketch.table(1, "cpu")
    sketch.add_(table, "layer", folded[None])
    torch.testing.assert_close(sketch.sketches(table)[0], sketch.sketch_vector({"layer": d.T @ a}))
    # A fold is a count-sketch of the features.
    matrix = matrix_of(lambda unit: sketch.fold_inputs("layer", unit), 17)
    assert torch.equal(matrix.abs().sum(dim=0), torch.ones(17))


def test_folds_keep_sides_long() -> None:
    rule = FoldRule(None, min_side=256)
    folds = [rule(side) for side in (1, 256, 511, 512, 1024, 1408, 4096, 14336)]
    assert folds == [1, 1, 1, 2, 4, 4, 16, 32]
    assert [FoldRule(4)(side) for side in (2, 4, 100)] == [2, 4, 4]


def test_groups_are_sketches_of_their_layers() -> None:
    names = list(SHAPES)
    x, y = random_vector(0), random_vector(1)
    sketch = CountSketch(128, 5, UNFOLDED, 2, layer_groups(names, 2))
    whole = sketch.sketch_vector(x).view(2, 64)
    for group, name in enumerate(names):
        alone = CountSketch(64, 5, UNFOLDED).sketch_vector({name: x[name]})
        torch.testing.assert_close(whole[group], alone)
    changed = sketch.sketch_vector({names[0]: x[names[0]], names[1]: y[names[1]]}).view(2, 64)
    assert torch.equal(changed[0], whole[0]) and not torch.equal(changed[1], whole[1])
    assert layer_groups(list("abcde"), 2) == {"a": 0, "b": 0, "c": 0, "d": 1, "e": 1}
    with pytest.raises(ValueError, match="2 layers cannot make 3 groups"):
        layer_groups(names, 3)
    with pytest.raises(ValueError, match="130 cannot be cut into 4"):
        CountSketch(130, 0, groups=4)


@pytest.mark.parametrize("width", [64, 100, 1000])
def test_chunks_added_one_by_one_or_gathered_at_once_are_the_same(width: int) -> None:
    sketch = CountSketch(width, 3, UNFOLDED)
    folded = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    table = sketch.table(3, "cpu")
    sketch.add_(table, "layer", folded)
    at_once = sketch._order_of("layer", folded.flatten(1)).add_up(folded.flatten(1))
    torch.testing.assert_close(sketch.sketches(table), at_once)


@pytest.mark.parametrize(("features", "fold"), [(24, 3), (25, 4), (7, 7), (100, 32)])
def test_sides_folded_chunk_by_chunk_or_at_once_are_the_same(features: int, fold: int) -> None:
    vectors = torch.randn(5, features, generator=torch.Generator().manual_seed(0))
    side = _Side(features, fold, torch.device("cpu"), 3, "layer", "inputs")
    torch.testing.assert_close(side.at_once(vectors), side.in_chunks(vectors))
    # Rounded once, not once a chunk.
    exact, rounded = side.in_chunks(vectors.bfloat16().double()), side.at_once(vectors.bfloat16())
    torch.testing.assert_close(rounded, exact.bfloat16(), rtol=0.01, atol=1e-6)


def test_sketches_are_the_same_in_another_process() -> None:
    code = (
        "import torch\n"
        "from congrad_ray.stages.sketch.countsketch import CountSketch, FoldRule\n"
        "sketch = CountSketch(8, 5, FoldRule(2))\n"
        "print(sketch.sketch_vector({'layer': torch.arange(24.0).view(4, 6)}).tolist())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = CountSketch(8, 5, FoldRule(2)).sketch_vector({"layer": torch.arange(24.0).view(4, 6)}).tolist()
    assert other.strip() == str(here)
    # And the same as ever: sketches on disk stay comparable only as long as this map stays.
    assert here == FROZEN
    different = [
        CountSketch(8, seed, FoldRule(2)).sketch_vector({name: torch.arange(24.0).view(4, 6)}).tolist()
        for seed, name in ((6, "layer"), (5, "other"))
    ]
    assert here not in different and different[0] != different[1]


FROZEN: list[float] = [0.0, 0.0, -6.0, -6.0, 6.0, 0.0, 0.0, 0.0]


def splitmix64(value: int) -> int:
    """splitmix64's finaliser in plain Python integers."""
    mask = 2**64 - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def test_random_numbers_are_splitmix64s() -> None:
    stream = int.from_bytes(hashlib.blake2b(b"5\nlayer\nchunks", digest_size=8).digest(), "little")
    found = CountSketch(1000, 5)._chunks_of("layer", 2500)
    bits = [splitmix64((index * 0x9E3779B97F4A7C15 + stream) % 2**64) for index in range(6)]
    assert found.shifts.tolist() == [((value >> 33) * 1000) >> 31 for value in bits[:3]]
    assert found.windows.tolist() == [((value >> 33) * 2000) >> 31 for value in bits[3:]]
    assert found.signs.tolist() == [1 - 2 * (value & 1) for value in bits[:3]]


@pytest.mark.parametrize("width", [0, 2**31 + 1])
def test_width_out_of_range_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=str(width)):
        CountSketch(width, seed=0)


def test_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="no layers"):
        CountSketch(8, 0).sketch_vector({})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sketches_are_the_same_on_cuda() -> None:
    sketch = CountSketch(1000, 5, FoldRule(2))
    x = random_vector(0)
    there = CountSketch(1000, 5, FoldRule(2)).sketch_vector({name: values.cuda() for name, values in x.items()})
    torch.testing.assert_close(there.cpu(), sketch.sketch_vector(x), rtol=1e-5, atol=1e-5)
