"""Preference pairs laid out so that the prompt of a pair is computed once and no position is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from congrad_ray.modeling.tokenization import TokenizedPair

# Rows of attention are padded to the longest of their group; a shorter row than this share opens a new group.
_GROUP_SHARE = 0.9


@dataclass(frozen=True)
class AttentionRows:
    """The 2B sequences prompt + completion as rows of token indexes, for attention over shared prompts.

    Rows of similar length stand together in groups, padded at their ends. Flattened, the groups follow each
    other and have S slots in all.
    """

    shapes: tuple[tuple[int, int], ...]  # (rows, longest row) of every group
    tokens: Tensor  # (S,) int64, the token in every slot; 0 in padding
    first: Tensor  # (N,) int64, a slot of every token: for prompts the one in the row of chosen
    prompt: Tensor  # (P,) int64, the tokens of the prompts
    second: Tensor  # (P,) int64, their slots in the rows of rejected

    def to(self, device: torch.device) -> AttentionRows:
        """The same on another device, for a model that is spread over several."""
        if self.tokens.device == device:
            return self
        moved = (tensor.to(device) for tensor in (self.tokens, self.first, self.prompt, self.second))
        return AttentionRows(self.shapes, *moved)


@dataclass(frozen=True)
class PairTokens:
    """B pairs as the input of one forward pass of (rows, columns) positions, N = rows * columns.

    With `attention` there is one row: of each pair its prompt, chosen and rejected tokens, one pair after the
    other, so a prompt stands once for both completions. Without, there are two right-padded rows for each pair,
    prompt + chosen and prompt + rejected. Either way a pair's positions are consecutive when flattened.
    """

    input_ids: Tensor  # (rows, columns) int64
    position_ids: Tensor  # (rows, columns) int64
    attention_mask: Tensor | None  # (rows, columns) int64, 1 for real tokens; None where all are
    starts: tuple[int, ...]  # B + 1 flattened positions: pair b has those from starts[b] to starts[b + 1]
    states: Tensor  # (M,) int64, flattened positions whose hidden states predict a completion token
    targets: Tensor  # (M,) int64, the ids of those tokens
    completions: Tensor  # (M,) int64, the completion each belongs to: chosen ones 0..B-1, rejected B..2B-1
    chosen_tokens: Tensor  # (B,) int64, completion tokens
    rejected_tokens: Tensor  # (B,) int64
    attention: AttentionRows | None
    attention_padding: tuple[int, ...]  # padding positions beside the two rows of every pair in attention

    @property
    def pairs(self) -> int:
        """B, the number of pairs."""
        return len(self.starts) - 1

    @property
    def positions(self) -> int:
        """N, the positions computed, padding included."""
        return self.input_ids.numel()


def shared_prompt_tokens(pairs: Sequence[TokenizedPair], device: torch.device | str = "cpu") -> PairTokens:
    """B pairs as one row without padding, each prompt once. Raises ValueError for no pairs."""
    _check(pairs)
    ids: list[int] = []
    positions: list[int] = []
    starts = [0]
    rows: list[list[int]] = []  # prompt + chosen and prompt + rejected of every pair in turn, as token indexes
    for pair in pairs:
        start, prompt = len(ids), len(pair.prompt_ids)
        ids += pair.prompt_ids + pair.chosen_ids + pair.rejected_ids
        positions += range(prompt + len(pair.chosen_ids))
        positions += range(prompt, prompt + len(pair.rejected_ids))
        shared = list(range(start, start + prompt))
        middle = start + prompt + len(pair.chosen_ids)
        rows.append(shared + list(range(start + prompt, middle)))
        rows.append(shared + list(range(middle, len(ids))))
        starts.append(len(ids))
    states, targets, completions = _predictions(pairs, rows)
    attention, padding = _attention_rows(pairs, rows, len(ids), device)
    return PairTokens(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        attention_mask=None,
        starts=tuple(starts),
        states=torch.tensor(states, device=device),
        targets=torch.tensor(targets, device=device),
        completions=torch.tensor(completions, device=device),
        attention=attention,
        attention_padding=padding,
        **_completion_tokens(pairs, device),
    )


def two_sequence_tokens(
    pairs: Sequence[TokenizedPair], pad_token_id: int, device: torch.device | str = "cpu"
) -> PairTokens:
    """B pairs as 2B right-padded rows, for models that cannot share prompts. Raises ValueError for no pairs."""
    _check(pairs)
    width = max(pair.longest_row for pair in pairs)
    ids = torch.full((2 * len(pairs), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros((2 * len(pairs), width), dtype=torch.int64)
    rows: list[list[int]] = []
    for number, pair in enumerate(pairs):
        for row, completion in ((2 * number, pair.chosen_ids), (2 * number + 1, pair.rejected_ids)):
            length = len(pair.prompt_ids) + len(completion)
            ids[row, :length] = torch.tensor(pair.prompt_ids + completion)
            mask[row, :length] = 1
            rows.append(list(range(row * width, row * width + length)))
    states, targets, completions = _predictions(pairs, rows)
    return PairTokens(
        input_ids=ids.to(device),
        position_ids=torch.arange(width, device=device).expand(2 * len(pairs), -1),
        attention_mask=mask.to(device),
        starts=tuple(2 * width * number for number in range(len(pairs) + 1)),
        states=torch.tensor(states, device=device),
        targets=torch.tensor(targets, device=device),
        completions=torch.tensor(completions, device=device),
        attention=None,
        attention_padding=tuple(
            2 * width - len(rows[2 * number]) - len(rows[2 * number + 1]) for number in range(len(pairs))
        ),
        **_completion_tokens(pairs, device),
    )


def _check(pairs: Sequence[TokenizedPair]) -> None:
    if not pairs:
        raise ValueError("no pairs to lay out; give at least one")


def _completion_tokens(pairs: Sequence[TokenizedPair], device: torch.device | str) -> dict[str, Tensor]:
    return {
        "chosen_tokens": torch.tensor([len(pair.chosen_ids) for pair in pairs], device=device),
        "rejected_tokens": torch.tensor([len(pair.rejected_ids) for pair in pairs], device=device),
    }


def _predictions(pairs: Sequence[TokenizedPair], rows: list[list[int]]) -> tuple[list[int], list[int], list[int]]:
    """The position before every completion token, its id and its completion."""
    states: list[int] = []
    targets: list[int] = []
    completions: list[int] = []
    for number, pair in enumerate(pairs):
        for row, completion, index in (
            (rows[2 * number], pair.chosen_ids, number),
            (rows[2 * number + 1], pair.rejected_ids, len(pairs) + number),
        ):
            states += row[len(pair.prompt_ids) - 1 : -1]
            targets += completion
            completions += [index] * len(completion)
    return states, targets, completions


def _attention_rows(
    pairs: Sequence[TokenizedPair], rows: list[list[int]], tokens: int, device: torch.device | str
) -> tuple[AttentionRows, tuple[int, ...]]:
    order = sorted(range(len(rows)), key=lambda row: (-len(rows[row]), row))
    groups: list[list[int]] = []
    for row in order:
        if groups and len(rows[row]) >= _GROUP_SHARE * len(rows[groups[-1][0]]):
            groups[-1].append(row)
        else:
            groups.append([row])
    first = torch.zeros(tokens, dtype=torch.int64)
    slots: list[Tensor] = []
    shapes: list[tuple[int, int]] = []
    prompt: list[Tensor] = []
    second: list[Tensor] = []
    padding = [0] * len(pairs)
    offset = 0
    for group in groups:
        width = len(rows[group[0]])
        block = torch.zeros((len(group), width), dtype=torch.int64)
        for line, row in enumerate(group):
            indexes = torch.tensor(rows[row])
            block[line, : len(indexes)] = indexes
            padding[row // 2] += width - len(indexes)
            places = torch.arange(offset + line * width, offset + line * width + len(indexes))
            if row % 2 == 0:
                first[indexes] = places
            else:
                shared = len(pairs[row // 2].prompt_ids)
                first[indexes[shared:]] = places[shared:]
                prompt.append(indexes[:shared])
                second.append(places[:shared])
        slots.append(block.flatten())
        shapes.append((len(group), width))
        offset += block.numel()
    attention = AttentionRows(
        tuple(shapes),
        torch.cat(slots).to(device),
        first.to(device),
        torch.cat(prompt).to(device),
        torch.cat(second).to(device),
    )
    return attention, tuple(padding)
