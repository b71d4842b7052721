from __future__ import annotations

import numpy as np
import pytest

from congrad_ray.stages.select.shares import mean_shares, moving_average_shares


def test_mean_shares_are_equal() -> None:
    np.testing.assert_array_equal(mean_shares(4), [0.25] * 4)


@pytest.mark.parametrize(("pairs", "decay", "batch_size"), [(1, 0.9, 32), (10, 0.5, 3), (7, 0.0, 2), (64, 0.9, 8)])
def test_shares_are_those_of_the_moving_average(pairs: int, decay: float, batch_size: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(pairs, 3))
    order = np.random.default_rng(5).permutation(pairs)
    batches = np.array_split(order, -(-pairs // batch_size))
    assert max(len(batch) for batch in batches) <= batch_size
    average = vectors[batches[0]].mean(axis=0)
    for batch in batches[1:]:
        average = decay * average + (1 - decay) * vectors[batch].mean(axis=0)
    shares = moving_average_shares(pairs, decay, batch_size, seed=5)
    assert shares.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(shares @ vectors, average)


def test_shares_follow_the_seed() -> None:
    one, other = (moving_average_shares(20, 0.9, 4, seed) for seed in (0, 1))
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(one, moving_average_shares(20, 0.9, 4, 0))


@pytest.mark.parametrize(("decay", "batch_size"), [(1.0, 4), (-0.1, 4), (0.5, 0)])
def test_a_decay_or_batch_size_out_of_range_is_refused(decay: float, batch_size: int) -> None:
    with pytest.raises(ValueError, match="decay is"):
        moving_average_shares(8, decay, batch_size, 0)
