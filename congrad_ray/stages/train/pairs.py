"""The selected pairs as a training worker sees them: micro-batches of token ids with their reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from congrad_ray.config.names import JUDGED
from congrad_ray.data.preferences import tokenize_arguments
from congrad_ray.modeling.loss import ChosenRejected, margin_weights
from congrad_ray.modeling.packing import PairTokens, shared_prompt_tokens, two_sequence_tokens
from congrad_ray.modeling.tokenization import TokenizedPair, tokenize_pair
from congrad_ray.stages.select.schema import TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class MicroBatch:
    """B pairs of one forward pass."""

    ids: list[str]
    languages: list[str]
    tokens: PairTokens
    reference: ChosenRejected  # (B,) float32 each, nats
    weights: Tensor | None  # (B,), where the judge's margins weigh the losses

    @property
    def lengths(self) -> ChosenRejected:
        """Completion tokens, (B,) each."""
        return ChosenRejected(self.tokens.chosen_tokens, self.tokens.rejected_tokens)

    @property
    def token_count(self) -> int:
        """Tokens of prompts, once for each pair, and of both completions, without padding."""
        attended = self.tokens.attention_mask
        return self.tokens.positions if attended is None else int(attended.sum())


@dataclass(frozen=True)
class SelectedPairs:
    """`selected.parquet` sorted by pair_id, so that a pair's index does not depend on how it was written."""

    table: pa.Table
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    device: torch.device
    weighted: bool = False
    """Whether the margins of the judge's scores weigh the losses."""

    def __len__(self) -> int:
        return len(self.table)

    def micro_batch(self, indexes: Sequence[int], shared: bool) -> MicroBatch:
        """The pairs with these indexes; `shared`: a pair's prompt stands once for both completions.

        Raises ValueError naming a pair that cannot be tokenised.
        """
        rows = self.table.take(list(indexes)).to_pylist()
        pairs = [tokenized(row, self.tokenizer, self.max_length) for row in rows]
        if shared:
            tokens = shared_prompt_tokens(pairs, self.device)
        else:
            pad = self.tokenizer.pad_token_id
            assert isinstance(pad, int)  # modeling.tokenization.load_tokenizer ensures it
            tokens = two_sequence_tokens(pairs, pad, self.device)
        return MicroBatch(
            [row["pair_id"] for row in rows],
            [row["language"] for row in rows],
            tokens,
            ChosenRejected(self._column(rows, "ref_chosen_logps"), self._column(rows, "ref_rejected_logps")),
            margin_weights(*(self._column(rows, name) for name in JUDGED)) if self.weighted else None,
        )

    def _column(self, rows: Sequence[dict[str, Any]], name: str) -> Tensor:
        return torch.tensor([row[name] for row in rows], dtype=torch.float32, device=self.device)


def tokenized(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenizedPair:
    """A row of the selection as token ids. Raises ValueError naming the pair."""
    try:
        return tokenize_pair(tokenizer, max_length=max_length, **tokenize_arguments(row))
    except ValueError as error:
        raise ValueError(f"pair {row['pair_id']}: {error}") from error


def other_tokens(row: dict[str, Any], pair: TokenizedPair) -> str | None:
    """How the pair's numbers of tokens differ from those that its sketch was made with; None if they do not."""
    found = (len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids))
    then = tuple(row[name] for name in TOKENS)
    if found == then:
        return None
    return f"prompt, chosen and rejected have {found} tokens here and had {then} there"
