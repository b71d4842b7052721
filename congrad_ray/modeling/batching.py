"""Batches of preference pairs under a budget of padded tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from congrad_ray.modeling.tokenization import TokenizedPair


@dataclass(frozen=True)
class PairBatch:
    """B pairs as 2B right-padded rows of T tokens: rows 0..B-1 are chosen, rows B..2B-1 rejected, same
    order."""

    input_ids: Tensor  # (2B, T) int64
    attention_mask: Tensor  # (2B, T) int64, 1 for real tokens
    completion_mask: Tensor  # (2B, T) bool, True for completion tokens

    @property
    def pairs(self) -> int:
        """B, the number of pairs."""
        return self.input_ids.shape[0] // 2

    @property
    def chosen_tokens(self) -> Tensor:
        """(B,) int64, completion tokens of each chosen row."""
        return self.completion_mask[: self.pairs].sum(dim=1)

    @property
    def rejected_tokens(self) -> Tensor:
        """(B,) int64, completion tokens of each rejected row."""
        return self.completion_mask[self.pairs :].sum(dim=1)


def token_budget_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group indexes into `lengths` so that (items x longest length) of a batch is at most `max_tokens`.

    Indexes are sorted by length (ties by index), so padding is small and the result depends on nothing but
    the arguments. An item longer than the budget gets a batch of its own. For pairs give `[pair.padded_tokens
    for pair in pairs]`, which counts both rows.

    Raises ValueError if `max_tokens` or a length is not positive.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if lengths[index] < 1:
            raise ValueError(f"lengths[{index}] is {lengths[index]}; every length must be at least 1")
        # In ascending order the newest item is the longest of its batch.
        if batches and (len(batches[-1]) + 1) * lengths[index] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def collate_pairs(
    pairs: Sequence[TokenizedPair], pad_token_id: int, device: torch.device | str = "cpu"
) -> PairBatch:
    """Right-pad B pairs into one `PairBatch` on `device`. Raises ValueError for no pairs."""
    if not pairs:
        raise ValueError("no pairs to collate; give at least one")
    completions = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    rows = len(completions)
    width = max(pair.longest_row for pair in pairs)
    input_ids = torch.full((rows, width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((rows, width), dtype=torch.int64)
    completion_mask = torch.zeros((rows, width), dtype=torch.bool)
    for row, completion in enumerate(completions):
        prompt = pairs[row % len(pairs)].prompt_ids
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion, dtype=torch.int64)
        attention_mask[row, :end] = 1
        completion_mask[row, len(prompt) : end] = True
    return PairBatch(input_ids.to(device), attention_mask.to(device), completion_mask.to(device))
