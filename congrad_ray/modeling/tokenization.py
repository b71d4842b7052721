"""Preference pairs to token ids: those of TRL 1.16's DPOTrainer, but for templates that write today's date."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from congrad_ray.config.chat_template import CHAT_TEMPLATE_DATE, is_jinja
from congrad_ray.config.printable import brief, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Messages: TypeAlias = list[dict[str, Any]]

# Attributes of a tokenizer.
_DATE = "congrad_ray_date"
_ROWS = "congrad_ray_rows"
_KWARGS = "congrad_ray_chat_template_kwargs"
_TODAY = re.compile(r"""\bstrftime_now\s*\(\s*(["'])((?:(?!\1).)*)\1\s*\)""")
# Arguments of `apply_chat_template` that no row and no recipe may set; what else it knows goes to the template.
_OURS = {"chat_template", "add_generation_prompt", "tokenize", "return_dict", "tools"}
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


class MissingChatTemplate(ValueError):
    """The tokenizer has no chat template, or none that can be used, although the prompts are chat messages.

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
    chat_template_date: str = CHAT_TEMPLATE_DATE,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `model` (a folder or a Hub name) with a pad token.

    A tokenizer without a pad token pads with its end-of-sequence token: padding is masked everywhere, so
    the id does not matter. `revision` is a commit or branch on the Hub. `chat_template` is the text of a Jinja
    template (not a path) and replaces the tokenizer's own, or the name of one of the tokenizer's templates, which
    becomes its default. `chat_template_date` (YYYY-MM-DD) is the day that a template asking for today gets.
    `chat_template_kwargs` go to the template with every conversation. Raises ValueError if there is neither a pad
    nor an end-of-sequence token, MissingChatTemplate for a name of none.
    """
    from transformers import AutoTokenizer

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
    if chat_template is not None and is_jinja(chat_template):
        tokenizer.chat_template = chat_template
    elif chat_template is not None:
        named = _named_templates(tokenizer)
        if chat_template not in named:
            raise MissingChatTemplate(
                f"the tokenizer of {brief(model)} has no chat template named {shown(chat_template)}; "
                f"{_names(named)}; set model.chat_template to one of its names or to the path of a Jinja file"
            )
        # The others stay, so that the name still means the same in a checkpoint saved with this tokenizer.
        tokenizer.chat_template = {**named, "default": named[chat_template]}
    setattr(tokenizer, _DATE, chat_template_date)
    setattr(tokenizer, _KWARGS, dict(chat_template_kwargs or {}))
    return tokenizer


def refuse_ids_from(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """From now on a text with a token id of `rows` or more is a ValueError: the embedding has no row for it."""
    setattr(tokenizer, _ROWS, rows)


def _checked(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    rows: int | None = getattr(tokenizer, _ROWS, None)
    if rows is not None and max(ids, default=0) >= rows:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        raise ValueError(
            f"the text holds the token {shown(token)}, but the model's embedding of {rows} rows has none for it; "
            "drop the row"
        )
    return ids


def _named_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The chat templates by name; an only one has the name that it would have among several."""
    templates: Any = tokenizer.chat_template
    if templates is None:
        return {}
    return dict(templates) if isinstance(templates, dict) else {"default": templates}


def _names(templates: dict[str, str]) -> str:
    return f"it has {', '.join(shown(name) for name in sorted(templates))}" if templates else "it has none"


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that every message of a run goes through. Raises MissingChatTemplate."""
    named = _named_templates(tokenizer)
    if not named:
        raise MissingChatTemplate(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, but the prompt is a list of "
            "chat messages; set `model.chat_template: path/to/template.jinja` in the recipe, give "
            "`--chat-template path/to/template.jinja`, or use prompts that are plain strings"
        )
    if "default" not in named:
        raise MissingChatTemplate(
            f"the tokenizer of {tokenizer.name_or_path!r} has several chat templates and none is the default; "
            f"{_names(named)}; set `model.chat_template: NAME` in the recipe or give `--chat-template NAME`"
        )
    day: str = getattr(tokenizer, _DATE, CHAT_TEMPLATE_DATE)
    return _on_day(named["default"], day, tokenizer.name_or_path)


def chat_template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text that every message of a run goes through, its date fixed. Raises MissingChatTemplate."""
    return _template(tokenizer)


@lru_cache(maxsize=8)  # so that what it says is said once a process
def _on_day(template: str, day: str, model: str) -> str:
    """The template with the day in the place of every call that asks for today's.

    transformers lets no caller hand a template another clock, so the calls are replaced in its text.
    """
    when = datetime.fromisoformat(day)
    fixed, calls = _TODAY.subn(lambda call: call[1] + when.strftime(call[2]) + call[1], template)
    if re.search(r"\bstrftime_now\b(?!\s+is\b)", _COMMENT.sub("", fixed)):
        raise MissingChatTemplate(
            f"the chat template of {brief(model)} asks for today's date (strftime_now) in a way that cannot be "
            "fixed to one day, so token ids would change every day; set model.chat_template to the path of a "
            'Jinja file that calls strftime_now("%d %b %Y") or holds a date'
        )
    if calls:
        logger.warning(
            "the chat template of %s writes today's date; it always gets %s here, so that token ids do not "
            "change by day (model.chat_template_date in the recipe)",
            brief(model),
            day,
        )
    return fixed


def _apply_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    add_generation_prompt: bool,
    tools: list[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    template = _template(tokenizer)
    given = {**getattr(tokenizer, _KWARGS, {}), **(chat_template_kwargs or {})}
    arguments = {key: value for key, value in given.items() if key not in _OURS}
    # The template writes the special tokens itself; apply_chat_template encodes its text without adding any,
    # which is what keeps the beginning-of-sequence token from appearing twice.
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            tools=tools,
            **arguments,
        )
    except Exception as error:  # a template may raise anything, Jinja's own errors among them
        if messages[0].get("role") == "system" and not messages[0].get("content") and messages[1:]:
            # Many templates refuse a system turn, and this one says nothing.
            return _apply_chat_template(
                tokenizer, messages[1:], add_generation_prompt, tools, chat_template_kwargs
            )
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} cannot render messages of "
            f"{', '.join(shown(message.get('role')) for message in messages)}: {type(error).__name__}: "
            f"{brief(error)}; drop the row, or give a template that can"
        ) from error
    return _checked(tokenizer, list(encoded["input_ids"]))


def chat_prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Token ids of `messages` with the generation prompt at the end: what the model answers to.

    Special tokens are exactly those that the template writes; feed the ids to the model as they are and never
    encode decoded text again. Raises `MissingChatTemplate` if the tokenizer has no chat template, and another
    ValueError where the template cannot render the messages.
    """
    return _apply_chat_template(tokenizer, messages, add_generation_prompt=True)


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Token ids of a whole conversation, without a generation prompt. Raises as `chat_prompt_ids`."""
    return _apply_chat_template(tokenizer, messages, add_generation_prompt=False)


def _common_prefix_length(first: list[int], second: list[int]) -> int:
    for position, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return position
    return min(len(first), len(second))


def _check_content(name: str, completion: str | Messages, end_of_sequence: str) -> None:
    if isinstance(completion, str):
        content = completion.removesuffix(end_of_sequence)
    elif any(message.get("tool_calls") for message in completion):
        return
    else:
        texts = (message.get(key) for message in completion for key in ("reasoning_content", "content"))
        content = "".join(str(text) for text in texts if text)
    if not content.strip():
        raise ValueError(f"the {name} completion is empty: {shown(completion)}; drop the pair")


def _tokenize_conversation(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
    tools: list[Any] | None,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> tuple[list[int], list[int], list[int]]:
    more = (tools, chat_template_kwargs)
    return (
        _apply_chat_template(tokenizer, prompt, True, *more),
        _apply_chat_template(tokenizer, prompt + chosen, False, *more),
        _apply_chat_template(tokenizer, prompt + rejected, False, *more),
    )


def _tokenize_text(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chosen: str, rejected: str, end_of_sequence: str
) -> tuple[list[int], list[int], list[int]]:
    def encode(text: str) -> list[int]:
        return _checked(tokenizer, list(tokenizer(text)["input_ids"]))

    def ended(text: str) -> str:
        return text if text.endswith(end_of_sequence) else text + end_of_sequence

    return encode(prompt), encode(prompt + ended(chosen)), encode(prompt + ended(rejected))


@cache  # once a process: it usually holds for every row of a model
def _warn_of_dropped_prompt_end() -> None:
    logger.warning(
        "the prompt's tokens are not a prefix of prompt + completion (the chat template renders the prompt "
        "differently once it is answered, or tokens merge across the boundary); the end of the prompt that "
        "differs is dropped, so the model is trained on another context than the one it answers. Use a chat "
        "template that renders the prompt the same way in both cases, or end plain prompts on a token "
        "boundary. This is shown once, but may concern every row."
    )


def tokenize_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    chosen: str | Messages,
    rejected: str | Messages,
    max_length: int,
    tools: list[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TokenizedPair:
    """Tokenise one preference pair; the ids are those of TRL 1.16's DPOTrainer before truncation.

    Two shapes, as in TRL. Conversational: all three are lists of messages; the chat template renders the
    prompt with the generation prompt, and prompt + completion without it. Plain: all three are strings; the
    end-of-sequence token is added to a completion that does not end with it, and prompt + completion is
    encoded as one text. A completion's ids are what follows the part that the prompt shares with *both*
    prompt + completion sequences. Normally that part is the whole prompt. Where it is not (a template renders
    the last turn differently, or tokens merge across the boundary) the differing end of the prompt is
    dropped, as in TRL, and a warning is logged. A conversation's `tools` (JSON schemas) and
    `chat_template_kwargs`, which go before those of the tokenizer, are given to the template.

    TRL truncates rows longer than `max_length` tokens, which changes what is preferred; here they raise
    `PairTooLong`, so that the caller can quarantine the row. Other ValueErrors that concern the row: mixed
    shapes, messages that the template cannot render, a completion without content, no prompt token before the
    completion, chosen and rejected with the same ids. Concerning the model: `MissingChatTemplate`.
    """
    end_of_sequence = tokenizer.eos_token or ""
    _check_content("chosen", chosen, end_of_sequence)
    _check_content("rejected", rejected, end_of_sequence)
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        prompt_ids, chosen_row, rejected_row = _tokenize_text(tokenizer, prompt, chosen, rejected, end_of_sequence)
    elif isinstance(prompt, list) and isinstance(chosen, list) and isinstance(rejected, list):
        prompt_ids, chosen_row, rejected_row = _tokenize_conversation(
            tokenizer, prompt, chosen, rejected, tools, chat_template_kwargs
        )
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
