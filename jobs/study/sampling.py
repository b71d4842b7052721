"""Sampled answers of a tiny model in this process: an engine's start would take longer than all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The nucleus is nearly always among this many of the likeliest tokens; sorting the whole vocabulary takes longer.
_LIKELIEST = 64


@torch.no_grad()
def sampled_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    temperature: float,
    top_p: float,
    max_tokens: int,
    batch_size: int,
    seed: int,
) -> list[tuple[str, int]]:
    """One sampled answer to each prompt, as a chat message, with its number of tokens (the end included).

    Answers that have ended leave the batch, so what the longest ones cost is not paid for all.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    texts = [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        )
        for prompt in prompts
    ]
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    answers: list[tuple[str, int]] = [("", 0)] * len(texts)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        tokens = _sample(model, tokenizer, [texts[i] for i in members], temperature, top_p, max_tokens, generator)
        for index, row in zip(members, tokens, strict=True):
            answers[index] = (str(tokenizer.decode(row, skip_special_tokens=True)), len(row))
    return answers


def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    temperature: float,
    top_p: float,
    max_tokens: int,
    generator: torch.Generator,
) -> list[list[int]]:
    from transformers import DynamicCache

    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    inputs, mask = batch["input_ids"], batch["attention_mask"]
    positions = mask.cumsum(dim=1) - 1
    cache = DynamicCache()
    found: list[list[int]] = [[] for _ in texts]
    alive = torch.arange(len(texts))
    for _ in range(max_tokens):
        logits = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions.clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        drawn = nucleus_sample(logits / temperature, top_p, generator)
        for row, token in zip(alive.tolist(), drawn.tolist(), strict=True):
            found[row].append(token)
        going_on = drawn != tokenizer.eos_token_id
        if not going_on.any():
            break
        if not going_on.all():
            rows = going_on.nonzero()[:, 0]
            cache.batch_select_indices(rows)
            alive, drawn, mask, positions = alive[rows], drawn[rows], mask[rows], positions[rows]
        inputs, positions = drawn[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return found


def nucleus_sample(logits: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    """One token for each row of `logits` (B, V), from the smallest set of tokens of probability `top_p`; (B,).

    Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751): the tokens by falling probability, up to and with
    the one at which their sum reaches `top_p`.
    """
    probabilities = logits.float().softmax(dim=-1)
    values, tokens = probabilities.topk(min(_LIKELIEST, logits.shape[-1]), dim=-1)
    if bool((values.sum(dim=-1) < top_p).any()):
        values, tokens = probabilities.sort(dim=-1, descending=True)
    before = values.cumsum(dim=-1) - values
    inside = torch.where(before < top_p, values, 0.0)
    return tokens.gather(1, torch.multinomial(inside, 1, generator=generator))[:, 0]
