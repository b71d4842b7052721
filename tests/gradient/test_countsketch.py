from __future__ import annotations

import hashlib
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from congrad_ray.gradient.countsketch import CountSketch

SHAPES = {"model.layers.0.mlp.up_proj": (24, 16), "model.layers.0.mlp.down_proj": (16, 24)}


def random_vector(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def flat(vector: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([values.flatten() for values in vector.values()]).double()


@pytest.mark.parametrize("width", [64, 50])
def test_inner_products_are_unbiased_with_the_variance_of_the_formula(width: int) -> None:
    x = random_vector(0)
    y = {name: 0.5 * values + random_vector(1)[name] for name, values in x.items()}
    # One large entry, so that the formula's last term matters.
    x["model.layers.0.mlp.up_proj"][3, 4] = y["model.layers.0.mlp.up_proj"][3, 4] = 20.0
    seeds = 4000
    estimates = torch.empty(seeds, dtype=torch.float64)
    for seed in range(seeds):
        sketch = CountSketch(width, seed)
        estimates[seed] = sketch.sketch_vector(x).double() @ sketch.sketch_vector(y).double()

    x_flat, y_flat = flat(x), flat(y)
    inner = x_flat @ y_flat
    variance = (
        x_flat.square().sum() * y_flat.square().sum() + inner**2 - 2 * (x_flat.square() * y_flat.square()).sum()
    ) / width
    standard_error = (variance / seeds).sqrt()
    assert abs(estimates.mean() - inner) < 4 * standard_error
    # The sample variance of 4000 draws has a relative standard error of about 0.03.
    assert estimates.var() == pytest.approx(variance.item(), rel=0.12)


def test_sketch_is_linear() -> None:
    sketch = CountSketch(40, seed=7)
    x, y = random_vector(0), random_vector(1)
    combined = {name: 2.0 * x[name] - 3.0 * y[name] for name in x}
    expected = 2.0 * sketch.sketch_vector(x) - 3.0 * sketch.sketch_vector(y)
    torch.testing.assert_close(sketch.sketch_vector(combined), expected, rtol=1e-5, atol=1e-4)


def test_add_puts_every_entry_in_its_bucket_with_its_sign() -> None:
    name, shape = "layer", (5, 7)
    sketch = CountSketch(11, seed=3)
    bucket, sign = sketch.layer_tables(name, shape, "cpu")
    assert (bucket.dtype, sign.dtype) == (torch.int32, torch.int8)
    assert bucket.shape == sign.shape == shape
    gradient = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    expected = torch.ones(3, 11)
    for row in range(3):
        for i in range(5):
            for j in range(7):
                expected[row, bucket[i, j]] += sign[i, j] * gradient[row, i, j]
    sketches = torch.ones(3, 11)
    sketch.add_(sketches, name, gradient)
    torch.testing.assert_close(sketches, expected)
    with pytest.raises(ValueError, match=r"must be \(3, 11\) torch\.float32"):
        sketch.add_(torch.zeros(3, 12), name, gradient)


def test_buckets_are_uniform_and_signs_balanced_and_independent() -> None:
    width = 37  # no power of two
    bucket, sign = CountSketch(width, seed=1).layer_tables("layer", (600, 500), "cpu")
    counts = torch.bincount(bucket.flatten(), minlength=width).double()
    expected = bucket.numel() / width
    # Chi-squared with 36 degrees of freedom: mean 36, standard deviation 8.5.
    assert ((counts - expected).square() / expected).sum() < 80
    assert set(sign.unique().tolist()) == {-1, 1}
    signs = sign.double()
    assert abs(signs.mean()) < 4 / bucket.numel() ** 0.5
    # Neither neighbours nor the bucket tell anything about the sign.
    for product in (signs[1:] * signs[:-1], signs[:, 1:] * signs[:, :-1], signs * (bucket % 2 * 2 - 1)):
        assert abs(product.mean()) < 5 / bucket.numel() ** 0.5 + 1 / width


def test_tables_differ_between_layers_and_seeds_and_not_between_shapes() -> None:
    tables = [
        CountSketch(1000, seed).layer_tables(name, (30, 20), "cpu")[0]
        for seed, name in [(0, "a"), (0, "b"), (1, "a"), (10, "a")]
    ]
    for one, other in pairwise(tables):
        assert (one == other).double().mean() < 0.02
    corner = CountSketch(1000, 0).layer_tables("a", (10, 7), "cpu")[0]
    assert torch.equal(corner, tables[0][:10, :7])


def test_tables_are_the_same_in_another_process() -> None:
    code = (
        "from congrad_ray.gradient.countsketch import CountSketch\n"
        "bucket, sign = CountSketch(1000, 5).layer_tables('layer', (3, 4), 'cpu')\n"
        "print(bucket.tolist(), sign.tolist())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    bucket, sign = CountSketch(1000, 5).layer_tables("layer", (3, 4), "cpu")
    assert other.strip() == f"{bucket.tolist()} {sign.tolist()}"
    # And the same as ever: sketches on disk stay comparable only as long as this map stays.
    assert bucket[0].tolist() == [46, 978, 745, 140]
    assert sign[0].tolist() == [-1, -1, -1, 1]


def splitmix64(value: int) -> int:
    """splitmix64's finaliser in plain Python integers."""
    mask = 2**64 - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def test_hash_is_splitmix64() -> None:
    stream = int.from_bytes(hashlib.blake2b(b"5\nlayer", digest_size=8).digest(), "little")
    bucket, sign = CountSketch(1000, 5).layer_tables("layer", (300, 4), "cpu")
    for i, j in [(0, 0), (0, 3), (7, 1), (299, 2)]:
        bits = splitmix64((((i << 32) + j) * 0x9E3779B97F4A7C15 + stream) % 2**64)
        assert bucket[i, j] == ((bits >> 33) * 1000) >> 31
        assert sign[i, j] == 1 - 2 * (bits & 1)


def test_table_cache_is_bounded_and_changes_nothing() -> None:
    x = random_vector(0)
    entry_bytes = 5 * 24 * 16
    cached, bounded, without = (CountSketch(64, 0, cache_bytes=size) for size in (2**20, entry_bytes, 0))
    for sketch, tables in ((cached, 2), (bounded, 1), (without, 0)):
        assert torch.equal(sketch.sketch_vector(x), cached.sketch_vector(x))
        assert len(sketch._tables) == tables


@pytest.mark.parametrize("width", [0, 2**31 + 1])
def test_width_out_of_range_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=str(width)):
        CountSketch(width, seed=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tables_are_the_same_on_cuda() -> None:
    for here, there in zip(
        CountSketch(1000, 5).layer_tables("layer", (300, 200), "cpu"),
        CountSketch(1000, 5).layer_tables("layer", (300, 200), "cuda"),
        strict=True,
    ):
        assert torch.equal(here, there.cpu())
