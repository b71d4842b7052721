"""Preference pairs to token ids, with the same ids as TRL 1.16's DPOTrainer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from congrad_ray.printable import brief, shown

logger = logging.getLogger(__name__)

Messages: TypeAlias = list[dict[str, str]]


class MissingChatTemplate(ValueError):
    """The tokenizer has no chat template although the prompts are chat messages.

    It concerns the model and not a row, so do not quarantine rows for it: let it end the run.
    """


class PairTooLong(ValueError):
    """A pair has a row longer than `max_length`; the text holds the numbers of tokens."""


@dataclass(frozen=True)
class TokenizedPair:
    """One preference pair as token ids; both completions follow the same prompt."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def longest_row(self) -> int:
        """Tokens of the longer of the two rows, prompt + chosen and prompt + rejected."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def padded_tokens(self) -> int:
        """Tokens that the pair's two rows take in a batch: the length for `token_budget_batches`."""
        return 2 * self.longest_row


def load_tokenizer(
    model: str,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `model` (a folder or a Hub name) with a pad token.

    A tokenizer without a pad token pads with its end-of-sequence token: padding is masked everywhere, so
    the id does not matter. `revision` is a commit or branch on the Hub. `chat_template` is the text of a Jinja
    template (not a path) and replaces the tokenizer's own. Raises ValueError if there is neither a pad nor an
    end-of-sequence token.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        model, trust_remote_code=trust_remote_code, revision=revision
    )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {model!r} has neither a pad token nor an end-of-sequence token; "
                "set one in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def _apply_chat_template(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool
) -> list[int]:
    if tokenizer.chat_template is None:
        raise MissingChatTemplate(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, but the prompt is a list of "
            "chat messages; set `model.chat_template: path/to/template.jinja` in the recipe, give "
            "`--chat-template path/to/template.jinja`, or use prompts that are plain strings"
        )
    # The template writes the special tokens itself; apply_chat_template encodes its text without adding any,
    # which is what keeps the beginning-of-sequence token from appearing twice.
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
        )
    except Exception as error:  # a template may raise anything, Jinja's own errors among them
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} cannot render messages of "
            f"{', '.join(shown(message.get('role')) for message in messages)}: {type(error).__name__}: "
            f"{brief(error)}; drop the row, or give a template that can"
        ) from error
    return list(encoded["input_ids"])


def chat_prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Token ids of `messages` with the generation prompt at the end: what the model answers to.

    Special tokens are exactly those that the template writes; feed the ids to the model as they are and never
    encode decoded text again. Raises `MissingChatTemplate` if the tokenizer has no chat template, and another
    ValueError where the template cannot render the messages.
    """
    return _apply_chat_template(tokenizer, messages, add_generation_prompt=True)


def _common_prefix_length(first: list[int], second: list[int]) -> int:
    for position, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return position
    return min(len(first), len(second))


def _check_content(name: str, completion: str | Messages, end_of_sequence: str) -> None:
    if isinstance(completion, str):
        content = completion.removesuffix(end_of_sequence)
    else:
        content = "".join(message.get("content") or "" for message in completion)
    if not content.strip():
        raise ValueError(f"the {name} completion is empty: {shown(completion)}; drop the pair")


def _tokenize_conversation(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, chosen: Messages, rejected: Messages
) -> tuple[list[int], list[int], list[int]]:
    return (
        _apply_chat_template(tokenizer, prompt, add_generation_prompt=True),
        _apply_chat_template(tokenizer, prompt + chosen, add_generation_prompt=False),
        _apply_chat_template(tokenizer, prompt + rejected, add_generation_prompt=False),
    )


def _tokenize_text(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chosen: str, rejected: str, end_of_sequence: str
) -> tuple[list[int], list[int], list[int]]:
    def encode(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    def ended(text: str) -> str:
        return text if text.endswith(end_of_sequence) else text + end_of_sequence

    return encode(prompt), encode(prompt + ended(chosen)), encode(prompt + ended(rejected))


@cache  # once a process: it usually holds for every row of a model
def _warn_of_dropped_prompt_end() -> None:
    logger.warning(
        "the prompt's tokens are not a prefix of prompt + completion (the chat template renders the prompt "
        "differently once it is answered, or tokens merge across the boundary); the end of the prompt that "
        "differs is dropped, so the model is trained on another context than it answers to. Use a chat "
        "template that renders the prompt the same way in both cases, or end plain prompts on a token "
        "boundary. Said once, though it may concern every row."
    )


def tokenize_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    chosen: str | Messages,
    rejected: str | Messages,
    max_length: int,
) -> TokenizedPair:
    """Tokenise one preference pair; the ids are those of TRL 1.16's DPOTrainer before truncation.

    Two shapes, as in TRL. Conversational: all three are lists of messages; the chat template renders the
    prompt with the generation prompt, and prompt + completion without it. Plain: all three are strings; the
    end-of-sequence token is added to a completion that does not end with it, and prompt + completion is
    encoded as one text. A completion's ids are what follows the part that the prompt shares with *both*
    prompt + completion sequences. Normally that part is the whole prompt. Where it is not (a template renders
    the last turn differently, or tokens merge across the boundary) the differing end of the prompt is
    dropped, as in TRL, and a warning is logged.

    TRL truncates rows longer than `max_length` tokens, which changes what is preferred; here they raise
    `PairTooLong`, so that the caller can put the row aside. Other ValueErrors that concern the row: mixed
    shapes, messages that the template cannot render, a completion without content, no prompt token before the
    completion, chosen and rejected with the same ids. Concerning the model: `MissingChatTemplate`.
    """
    end_of_sequence = tokenizer.eos_token or ""
    _check_content("chosen", chosen, end_of_sequence)
    _check_content("rejected", rejected, end_of_sequence)
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        prompt_ids, chosen_row, rejected_row = _tokenize_text(tokenizer, prompt, chosen, rejected, end_of_sequence)
    elif isinstance(prompt, list) and isinstance(chosen, list) and isinstance(rejected, list):
        prompt_ids, chosen_row, rejected_row = _tokenize_conversation(tokenizer, prompt, chosen, rejected)
    else:
        raise ValueError(
            f"prompt is a {type(prompt).__name__}, chosen a {type(chosen).__name__}, rejected a "
            f"{type(rejected).__name__}; make all three strings or all three lists of chat messages"
        )
    shared = min(_common_prefix_length(prompt_ids, chosen_row), _common_prefix_length(prompt_ids, rejected_row))
    if shared < len(prompt_ids):
        _warn_of_dropped_prompt_end()
    pair = TokenizedPair(prompt_ids[:shared], chosen_row[shared:], rejected_row[shared:])
    if not pair.prompt_ids:
        raise ValueError(
            "no prompt token comes before the completion, so its first token has no probability; "
            "give a prompt that is not empty"
        )
    for name, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
        if not ids:
            raise ValueError(f"the {name} completion has no tokens of its own; drop the pair")
    if pair.chosen_ids == pair.rejected_ids:
        raise ValueError(
            f"chosen and rejected are the same {len(pair.chosen_ids)} tokens: no preference; drop the pair"
        )
    if pair.longest_row > max_length:
        raise PairTooLong(
            f"prompt has {len(pair.prompt_ids)} tokens, chosen {len(pair.chosen_ids)}, rejected "
            f"{len(pair.rejected_ids)}: the longer row has {pair.longest_row}, more than max_length = "
            f"{max_length}; raise max_length or drop the pair"
        )
    return pair
