"""A preference pair from a row that somebody has: the shapes that TRL documents, and others; byte for byte.

The texts are the user's. What is taken away is only what is there twice (a prompt at the head of both responses),
or says nothing (a key of a message whose value is null). Token ids made of a `Preference` are those that TRL
1.16's DPOTrainer makes of the row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from congrad_ray.config.printable import brief, shown
from congrad_ray.config.settings import SettingsError
from congrad_ray.data.records import BadRow, Record, check_unicode, joined_parts
from congrad_ray.data.tables import LANGUAGE, PAIR_ID, field, row_id

ChatMessage: TypeAlias = dict[str, Any]
"""role, content, and whatever else the chat template reads: tool_calls, name, reasoning_content, ..."""

_TEXTS = ("prompt", "chosen", "rejected")
_GIVEN = ("tools", "chat_template_kwargs")
_IDENTIFIED = 300  # characters: enough to be as often right as whole texts, in a tenth of the time
# ShareGPT's names of roles.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}


@dataclass(frozen=True)
class Columns:
    """Which columns of a row hold what; a dot leads into structs, and through lists of them."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    language: str = "language"
    system: str | None = None
    """A system turn before the prompt's."""
    tools: str = "tools"
    chat_template_kwargs: str = "chat_template_kwargs"
    responses: str | None = None
    """With `ratings`: a list of responses, of which the best rated is chosen and the worst rejected."""
    ratings: str | None = None

    @classmethod
    def of(cls, pairs: Mapping[str, str]) -> Columns:
        """Raises SettingsError for a name that is none of these, and for ratings without responses."""
        names = [known.name for known in fields(cls)]
        for name in pairs:
            if name not in names:
                raise SettingsError(f"--columns: there is no {shown(name)}; there are {', '.join(names)}")
        if ("responses" in pairs) != ("ratings" in pairs):
            raise SettingsError(
                "--columns: responses and ratings go together, as in responses=answers,ratings=scores"
            )
        if "responses" in pairs and {"chosen", "rejected"} & pairs.keys():
            raise SettingsError("--columns: give chosen and rejected, or responses and ratings")
        return cls(**pairs)

    @property
    def needed(self) -> list[str]:
        """The columns that a file must have, but for the language's; a prompt may be in the responses."""
        if self.responses and self.ratings:
            return [_top(self.responses), _top(self.ratings)]
        return [_top(self.chosen), _top(self.rejected)]

    @property
    def read(self) -> list[str]:
        """All columns that are looked at where they are there."""
        others = (self.prompt, self.language, self.system, self.tools, self.chat_template_kwargs)
        return list(dict.fromkeys([*self.needed, *(_top(name) for name in others if name)]))


def _top(name: str) -> str:
    return name.partition(".")[0]


@dataclass(frozen=True)
class Preference:
    """One pair: all three texts strings (plain), or all three lists of messages (chat)."""

    prompt: str | list[ChatMessage]
    chosen: str | list[ChatMessage]
    rejected: str | list[ChatMessage]
    language: str
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prompt_from: Literal["column", "responses", "both"] = "column"
    """responses: it has no column, as in TRL's implicit prompts; both: it is at the head of both as well."""

    @property
    def is_chat(self) -> bool:
        """Whether the chat template renders it."""
        return isinstance(self.prompt, list)

    @property
    def identifier(self) -> str:
        """A hash of all that decides the pair's token ids, and of its language."""
        more = [value for value in (self.tools, self.chat_template_kwargs) if value]
        return row_id("preference", self.language, self.prompt, self.chosen, self.rejected, *more)


PREFERENCES = pa.schema(
    [
        PAIR_ID,
        LANGUAGE,
        field("row", pa.int64(), "number of the row in the input, from 0"),
        field("chat", pa.bool_(), "whether the three texts are chat messages"),
        *(field(name, pa.string(), "the text, or the messages as JSON") for name in _TEXTS),
        field("tools", pa.string(), "tools given to the chat template, as JSON", nullable=True),
        field("chat_template_kwargs", pa.string(), "what else it is given, as JSON", nullable=True),
    ]
)


def stored(preference: Preference, row: int) -> dict[str, Any]:
    """A row of PREFERENCES."""
    return {
        "pair_id": preference.identifier,
        "language": preference.language,
        "row": row,
        "chat": preference.is_chat,
        **{name: _as_text(getattr(preference, name)) for name in _TEXTS},
        **{name: value and _as_text(value) for name in _GIVEN for value in [getattr(preference, name)]},
    }


def tokenize_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """What `tokenize_pair` is to be given for a row of PREFERENCES, or of the stage pair's table."""
    arguments = {name: row[name] for name in _TEXTS}
    if row.get("chat"):
        arguments = {name: json.loads(text) for name, text in arguments.items()}
    return arguments | {name: json.loads(row[name]) for name in _GIVEN if row.get(name)}


def preference_of(row: Mapping[str, Any]) -> Preference:
    """The pair in a row of PREFERENCES."""
    return Preference(**tokenize_arguments(row), language=row["language"])


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def preference_in(record: Record, columns: Columns, language: str, chat: bool = False) -> Preference:
    """The pair in a row. With `chat` strings become messages. Raises BadRow.

    The shape is the row's own: three strings are continued as plain text; where a response is a list of messages,
    strings beside it are messages too. A prompt that is missing is what both responses begin with. Responses that
    are whole conversations lose the prompt, which is taken once.
    """
    if record.problem:
        raise BadRow(*record.problem)
    values = record.values
    prompt = _value(values, columns.prompt)
    if columns.responses and columns.ratings:
        chosen, rejected = _best_and_worst(_value(values, columns.responses), _value(values, columns.ratings))
    else:
        chosen, rejected = (_required(values, name) for name in (columns.chosen, columns.rejected))
    system = _value(values, columns.system) if columns.system else None
    texts = [
        _text_or_messages(value, what) for value, what in zip((prompt, chosen, rejected), _TEXTS, strict=True)
    ]
    has_messages = any(isinstance(text, list) for text in texts)
    source: Literal["column", "responses", "both"] = "column"
    if has_messages or chat:
        source, *texts = _chat(*texts)
        if system:
            texts[0] = [*_messages([{"role": "system", "content": system}], "system"), *texts[0]]
    else:
        if system:
            raise BadRow("system_of_plain_text", "a system turn before plain text; take it for a chat with --chat")
        if texts[0] is None:
            source, texts = "responses", list(_common_start(texts[1], texts[2]))
    for what, text in zip(_TEXTS[1:], texts[1:], strict=True):
        if _is_blank(text):
            raise BadRow(f"{what}_empty", f"{what} is empty")
    if texts[1] == texts[2]:
        raise BadRow("identical_responses", "chosen and rejected are the same")
    return Preference(
        prompt=texts[0],
        chosen=texts[1],
        rejected=texts[2],
        language=language,
        tools=_tools(_value(values, columns.tools)),
        chat_template_kwargs=_kwargs(_value(values, columns.chat_template_kwargs)),
        prompt_from=source,
    )


def texts_to_identify(preference: Preference) -> str:
    """What of a pair tells its language best: the heads of its prompt's last turn and of its chosen response."""
    return "\n".join(_content(text)[:_IDENTIFIED] for text in (preference.prompt, preference.chosen))


def _content(text: str | list[ChatMessage]) -> str:
    return text if isinstance(text, str) else str(text[-1].get("content") or "") if text else ""


def _value(values: Any, name: str) -> Any:
    """What a column holds, None where it is missing; `a.b` is a column of that name, or b of what is in a."""
    if isinstance(values, Mapping):
        if name in values:
            return values[name]
        head, _, rest = name.partition(".")
        return _value(values.get(head), rest) if rest else None
    if isinstance(values, list):
        return [_value(item, name) for item in values]
    return None


def _required(values: Mapping[str, Any], name: str) -> Any:
    if _top(name) not in values:
        raise BadRow("missing_column", f"no '{brief(name)}' in this row")
    return _value(values, name)


def _best_and_worst(responses: Any, ratings: Any) -> tuple[Any, Any]:
    """The responses with the highest and the lowest rating, the first of several. Raises BadRow."""
    if not isinstance(responses, list) or not isinstance(ratings, list) or len(responses) != len(ratings):
        raise BadRow("ratings_not_lists", f"responses and ratings should be lists of one length: {shown(ratings)}")
    rated = [(_number(rating), response) for rating, response in zip(ratings, responses, strict=True)]
    known = [(rating, response) for rating, response in rated if rating is not None and response is not None]
    if len(known) < 2:
        raise BadRow("too_few_ratings", f"fewer than two responses have a rating: {shown(ratings)}")
    best, worst = max(known, key=lambda pair: pair[0]), min(known, key=lambda pair: pair[0])
    if best[0] == worst[0]:
        raise BadRow("equal_ratings", f"all responses have the same rating: {shown(ratings)}")
    return best[1], worst[1]


def _number(value: Any) -> float | None:
    """A rating; those of UltraFeedback are texts here and there, "N/A" where there is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _text_or_messages(value: Any, what: str) -> Any:
    """A string as it is, messages in one form; None for a prompt that is missing. Raises BadRow."""
    if value is None and what == "prompt":
        return None
    if isinstance(value, str):
        check_unicode(value, what)
        return value
    if isinstance(value, dict):  # a response of one turn, as LLaMA-Factory has it
        value = [value]
    if isinstance(value, list):
        return _messages(value, what)
    raise BadRow(f"{what}_not_text", f"{what} is {type(value).__name__}: {shown(value)}")


def _messages(values: list[Any], what: str) -> list[ChatMessage]:
    messages = [message for value in values if (message := _message(value, what)) is not None]
    if not messages:
        raise BadRow(f"{what}_empty", f"{what} has no messages")
    return messages


def _message(value: Any, what: str) -> ChatMessage | None:
    """A message with all its keys that are not null; None for a system turn without a content. Raises BadRow."""
    if not isinstance(value, dict):
        raise BadRow(f"{what}_not_messages", f"{what} should hold role and content, found {shown(value)}")
    if "role" not in value and "from" in value:
        value = _from_sharegpt(value, what)
    if not isinstance(value.get("role"), str):
        raise BadRow(f"{what}_not_messages", f"{what} should hold role and content, found {shown(value)}")
    message = {key: found for key, found in value.items() if found is not None}
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = joined_parts(content, what)
    elif content is None:
        if value["role"] == "system":
            return None
        if not message.get("tool_calls"):
            raise BadRow(f"{what}_not_text", f"content of {what} is missing: {shown(value)}")
        if "content" in value:
            message["content"] = None  # templates look whether it is there
    elif not isinstance(content, str):
        raise BadRow(f"{what}_not_text", f"content of {what} is {type(content).__name__}: {shown(content)}")
    check_unicode(json.dumps(message, ensure_ascii=False, default=str), what)
    return message


def _from_sharegpt(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    role = _ROLES.get(str(value["from"]).lower())
    if role is None:
        raise BadRow(f"{what}_unknown_role", f"{what}: from is {shown(value['from'])}; known: {', '.join(_ROLES)}")
    rest = {key: found for key, found in value.items() if key not in ("from", "value")}
    if role != "function_call":
        return {"role": role, "content": value.get("value"), **rest}
    try:
        calls = json.loads(value["value"])
        calls = calls if isinstance(calls, list) else [calls]
        functions = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    except (TypeError, ValueError, KeyError) as error:
        raise BadRow(f"{what}_bad_function_call", f"{what}: {shown(value.get('value'))}: {error}") from error
    calls = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": "", "tool_calls": calls, **rest}


def _chat(
    prompt: str | list[ChatMessage] | None,
    chosen: str | list[ChatMessage],
    rejected: str | list[ChatMessage],
) -> tuple[Literal["column", "responses", "both"], list[ChatMessage], list[ChatMessage], list[ChatMessage]]:
    """Where the prompt was, and the three texts as messages. Raises BadRow."""
    if prompt is None and (isinstance(chosen, str) or isinstance(rejected, str)):
        raise BadRow("prompt_missing", "a chat without a prompt; name its column with --columns prompt=NAME")
    chosen, rejected = (
        [{"role": "assistant", "content": text}] if isinstance(text, str) else text for text in (chosen, rejected)
    )
    if prompt is None:
        shared, ours, theirs = _common_start(chosen, rejected)
        if not shared:
            raise BadRow(
                "prompt_missing",
                "there is no prompt, and chosen and rejected begin with different turns; name its column with "
                "--columns prompt=NAME",
            )
        return "responses", shared, ours, theirs
    whole = [text[0]["role"] in ("user", "system") for text in (chosen, rejected)]
    if whole == [False, False]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return "column", messages, chosen, rejected
    count = _turns_of_prompt(prompt, chosen, rejected)
    if not count:
        raise BadRow(
            "prompt_not_at_head",
            f"{'chosen' if whole[0] else 'rejected'} begins with a {'' if all(whole) else 'user or system '}turn "
            "that is not the prompt's: the prompt would be there twice. Make them answers alone, or whole "
            "conversations that begin with the prompt",
        )
    if len(chosen) == count or len(rejected) == count:
        empty = "chosen" if len(chosen) == count else "rejected"
        raise BadRow(f"{empty}_empty", f"{empty} has no turn after the prompt")
    return "both", chosen[:count], chosen[count:], rejected[count:]


def _turns_of_prompt(
    prompt: str | list[ChatMessage], chosen: list[ChatMessage], rejected: list[ChatMessage]
) -> int:
    """How many turns at the head of both conversations are the prompt; 0 where it is not there."""
    common = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours != theirs:
            break
        common += 1
    if isinstance(prompt, list):
        if chosen[: len(prompt)] == prompt and common >= len(prompt):
            return len(prompt)
        # The conversations may have a system turn that the prompt lacks.
        before = [turn for turn in chosen[:1] if turn["role"] == "system"]
        with_system = [*before, *prompt]
        is_there = bool(before) and chosen[: len(with_system)] == with_system and common >= len(with_system)
        return len(with_system) if is_there else 0
    # All that both share, as TRL takes it, where a user turn of it is the prompt; a turn of the assistant at its
    # end belongs to the responses.
    while common and chosen[common - 1]["role"] == "assistant":
        common -= 1
    asked = [turn.get("content") for turn in chosen[:common] if turn["role"] == "user"]
    return common if asked and prompt in (asked[0], asked[-1]) else 0


def _common_start(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The prompt that both responses begin with, and what is left of them, as TRL's `extract_prompt` cuts them.

    Strings are cut where they differ, before a space there. Raises BadRow where one is empty.
    """
    length = min(len(chosen), len(rejected))
    if not length:
        raise BadRow("chosen_empty" if not chosen else "rejected_empty", "a response is empty")
    place = next((i for i in range(length) if chosen[i] != rejected[i]), None)
    if place is None:
        place = length - 1
    elif place and chosen[place - 1] == " ":
        place -= 1
    return chosen[:place], chosen[place:], rejected[place:]


def _is_blank(text: str | list[ChatMessage]) -> bool:
    if isinstance(text, str):
        return not text.strip()
    return not any(
        turn.get("tool_calls") or str(turn.get("reasoning_content") or turn.get("content") or "").strip()
        for turn in text
    )


def _tools(value: Any) -> list[Any] | None:
    found = _json(value, "tools")
    if found is not None and not isinstance(found, list):
        raise BadRow("tools_not_a_list", f"tools should be a list of JSON schemas: {shown(found)}")
    return found or None


def _kwargs(value: Any) -> dict[str, Any] | None:
    found = _json(value, "chat_template_kwargs")
    if found is not None and not isinstance(found, dict):
        raise BadRow(
            "chat_template_kwargs_not_a_mapping", f"chat_template_kwargs should be a mapping: {shown(found)}"
        )
    return {key: setting for key, setting in (found or {}).items() if setting is not None} or None


def _json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRow(f"{what}_not_json", f"{what}: {error}: {shown(value)}") from error
