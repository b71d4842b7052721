from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DataCollatorForPreference

from congrad_ray.modeling.batching import collate_pairs, token_budget_batches
from congrad_ray.modeling.tokenization import TokenizedPair


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 100))
def test_batches_cover_every_index_once_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    batches = token_budget_batches(lengths, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(in_order)


def test_batches_are_full_and_long_items_are_alone() -> None:
    assert token_budget_batches([3, 9, 2, 3, 3, 40], max_tokens=9) == [[2, 0, 3], [4], [1], [5]]


@pytest.mark.parametrize(("lengths", "max_tokens"), [([3], 0), ([3, 0], 8)])
def test_batches_refuse_what_is_not_positive(lengths: list[int], max_tokens: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        token_budget_batches(lengths, max_tokens)


def test_collate_is_trls_collator() -> None:
    pairs = [TokenizedPair([1, 2, 3], [4, 5], [6]), TokenizedPair([7, 8], [9], [10, 11, 12, 13])]
    batch = collate_pairs(pairs, pad_token_id=99)
    expected = DataCollatorForPreference(pad_token_id=99)([vars(pair) for pair in pairs])
    assert torch.equal(batch.input_ids, expected["input_ids"])
    assert torch.equal(batch.attention_mask, expected["attention_mask"])
    assert torch.equal(batch.completion_mask, expected["completion_mask"].bool())
    assert batch.pairs == 2
    assert batch.chosen_tokens.tolist() == [2, 1]
    assert batch.rejected_tokens.tolist() == [1, 4]
    assert batch.input_ids.numel() == 2 * max(pair.padded_tokens for pair in pairs)
    with pytest.raises(ValueError, match="no pairs"):
        collate_pairs([], pad_token_id=0)
