from __future__ import annotations

import pytest
import torch

from congrad_ray.modeling.packing import shared_prompt_tokens, two_sequence_tokens
from congrad_ray.modeling.tokenization import TokenizedPair

PAIRS = [
    TokenizedPair([1, 2], [3, 4, 5], [6]),
    TokenizedPair([7], [8], [9, 10, 11, 12]),
]


def test_shared_prompts_stand_once_with_matching_positions() -> None:
    batch = shared_prompt_tokens(PAIRS)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 1, 2, 3, 4]]
    assert batch.starts == (0, 6, 12)
    assert (batch.pairs, batch.positions, batch.attention_mask) == (2, 12, None)
    assert batch.chosen_tokens.tolist() == [3, 1] and batch.rejected_tokens.tolist() == [1, 4]


@pytest.mark.parametrize("shared", [True, False])
def test_every_completion_token_is_predicted_from_the_position_before_it(shared: bool) -> None:
    batch = shared_prompt_tokens(PAIRS) if shared else two_sequence_tokens(PAIRS, 0)
    ids = batch.input_ids.flatten()
    found = [
        (completion, int(ids[state]), target)
        for completion, state, target in zip(
            batch.completions.tolist(), batch.states.tolist(), batch.targets.tolist(), strict=True
        )
    ]
    assert sorted(found) == [
        *[(0, 2, 3), (0, 3, 4), (0, 4, 5)],  # chosen of the first pair
        (1, 7, 8),
        (2, 2, 6),  # rejected of the first pair
        *[(3, 7, 9), (3, 9, 10), (3, 10, 11), (3, 11, 12)],
    ]


def test_attention_rows_hold_both_sequences_and_lead_back() -> None:
    batch = shared_prompt_tokens(PAIRS)
    rows = batch.attention
    assert rows is not None
    ids = batch.input_ids[0]
    found = []
    start = 0
    for count, width in rows.shapes:
        block = rows.tokens[start : start + count * width].view(count, width)
        found += [ids[row].tolist() for row in block]
        start += count * width
    # Similar lengths together, the longest first; nothing here is as long as nine tenths of a longer one.
    assert found == [[1, 2, 3, 4, 5], [7, 9, 10, 11, 12], [1, 2, 6], [7, 8]]
    assert rows.tokens[rows.first].tolist() == list(range(12))
    assert rows.tokens[rows.second].tolist() == rows.prompt.tolist() == [6, 0, 1]
    assert not set(rows.first.tolist()) & set(rows.second.tolist())
    assert batch.attention_padding == (0, 0)


def test_rows_of_like_length_are_padded_together() -> None:
    batch = shared_prompt_tokens([TokenizedPair([1], [2] * 19, [3] * 18), TokenizedPair([1], [2] * 5, [3] * 4)])
    assert batch.attention is not None
    assert batch.attention.shapes == ((2, 20), (1, 6), (1, 5))
    assert batch.attention_padding == (1, 0)


def test_two_sequences_are_padded_to_the_longest() -> None:
    batch = two_sequence_tokens(PAIRS, pad_token_id=99)
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 4, 5],
        [1, 2, 6, 99, 99],
        [7, 8, 99, 99, 99],
        [7, 9, 10, 11, 12],
    ]
    assert batch.attention_mask is not None
    assert torch.equal(batch.attention_mask.bool(), batch.input_ids != 99)
    assert batch.starts == (0, 10, 20)
    assert batch.attention is None and batch.attention_padding == (2, 3)


def test_no_pairs_are_refused() -> None:
    for layout in (shared_prompt_tokens, lambda pairs: two_sequence_tokens(pairs, 0)):
        with pytest.raises(ValueError, match="no pairs"):
            layout([])
