"""One pair as a row of each trainer's own format, and what to tell the trainer.

The rules of LLaMA-Factory, axolotl and OpenRLHF are restated from their sources of July and August 2026. A pair
that such a reader would drop, change or crash on is refused here, with a short fixed word for counting.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import yaml

from congrad_ray.config.names import Trainer
from congrad_ray.data.preferences import ChatMessage, Preference

Shape = Literal["plain", "chat"]

# What chat templates in use write before an answer: axolotl looks for the answer's first occurrence in all of it.
_HEADERS = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n[[dummy_message]]<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n[[dummy_message]]<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<bos><start_of_turn>user\n[[dummy_message]]<end_of_turn>\n<start_of_turn>model\n",
    "<s>[INST] [[dummy_message]] [/INST]",
)

LLAMA_FACTORY_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


class NotWritten(ValueError):
    """The trainer's reader cannot take this pair as it is; the text is a short fixed word for counting."""


def shape_of(preference: Preference) -> Shape:
    """Whether the pair is plain text or chat messages."""
    return "plain" if isinstance(preference.prompt, str) else "chat"


def json_text(value: Any) -> str:
    """JSON as people read it; a text with a lone surrogate, which UTF-8 has no bytes for, in ASCII escapes."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, default=str)
    return text


def trainer_row(trainer: Trainer, preference: Preference) -> dict[str, Any]:
    """The pair as a row of the trainer's format, its texts byte for byte. Raises NotWritten."""
    if shape_of(preference) == "plain":
        return _plain(trainer, preference)
    return _CHAT[trainer](preference)


def _plain(trainer: Trainer, preference: Preference) -> dict[str, Any]:
    texts = {"prompt": preference.prompt, "chosen": preference.chosen, "rejected": preference.rejected}
    if not all(texts.values()):
        raise NotWritten("empty_text")
    # OpenRLHF strips line ends before it adds the end-of-sequence token.
    if trainer == "openrlhf" and any(str(texts[side]).endswith("\n") for side in ("chosen", "rejected")):
        raise NotWritten("ends_with_newline")
    return texts


def _trl(preference: Preference) -> dict[str, Any]:
    if not (preference.prompt and preference.chosen and preference.rejected):
        raise NotWritten("no_messages")
    return {
        "prompt": preference.prompt,
        "chosen": preference.chosen,
        "rejected": preference.rejected,
        "tools": json_text(preference.tools) if preference.tools is not None else None,
        "chat_template_kwargs": preference.chat_template_kwargs,
    }


def _llama_factory(preference: Preference) -> dict[str, Any]:
    """ShareGPT: human or observation, then gpt or function_call, in turns; one answer each."""
    _refuse_template_kwargs(preference)
    messages: list[Any] = list(preference.prompt)
    system = ""
    if messages and messages[0].get("role") == "system":
        system = _text(_only(messages[0], ("role", "content")))
        if not system:  # the template's default would take its place
            raise NotWritten("empty_system_message")
        messages = messages[1:]
    turns = [_turn(message) for message in messages]
    asked, answered = ("human", "observation"), ("gpt", "function_call")
    if len(turns) % 2 == 0 or any(t["from"] not in (asked, answered)[i % 2] for i, t in enumerate(turns)):
        raise NotWritten("turns_do_not_alternate")
    answers = {"chosen": _turn(_one(preference.chosen)), "rejected": _turn(_one(preference.rejected))}
    if any(answer["from"] not in answered for answer in answers.values()):
        raise NotWritten("answer_not_of_assistant")
    tools = json_text(preference.tools) if preference.tools else ""
    return {"conversations": turns, **answers, "system": system, "tools": tools}


def _turn(message: ChatMessage) -> dict[str, str]:
    role = message.get("role")
    calls = message.get("tool_calls")
    if role == "assistant" and calls:
        _only(message, ("role", "content", "tool_calls"))
        if message.get("content"):
            raise NotWritten("text_beside_tool_calls")
        return {"from": "function_call", "value": json_text([_call(call) for call in calls])}
    if role == "tool":  # which call a result answers is told by its place
        return {"from": "observation", "value": _text(_only(message, ("role", "content", "tool_call_id", "name")))}
    if role not in ("user", "assistant"):
        raise NotWritten("role_not_known")
    return {
        "from": "human" if role == "user" else "gpt",
        "value": _text(_only(message, ("role", "content"))),
    }


def _call(call: Any) -> dict[str, Any]:
    """A tool call with its arguments as an object: the reader writes them as JSON itself."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise NotWritten("tool_call_not_json") from None
    if not isinstance(function.get("name"), str) or arguments is None:
        raise NotWritten("tool_call_not_json")
    return {"name": function["name"], "arguments": arguments}


def _axolotl(preference: Preference) -> dict[str, Any]:
    """Role and content of each message, and of the answer what comes after its first occurrence."""
    messages, chosen, rejected = _role_and_content(preference)
    answers = {"chosen": _one(chosen), "rejected": _one(rejected)}
    for message in (*messages, *answers.values()):
        if message["role"] not in ("user", "assistant", "system", "tool"):
            raise NotWritten("role_not_known")
    for answer in answers.values():
        # It strips the end, and cuts in the wrong place where the template strips the start.
        if answer["content"] != answer["content"].strip():
            raise NotWritten("space_around_answer")
        if any(answer["content"] in header for header in _HEADERS):
            raise NotWritten("answer_not_found_again")
    return {"messages": messages, **answers}


def _openrlhf(preference: Preference) -> dict[str, Any]:
    messages, chosen, rejected = _role_and_content(preference)
    return {"prompt": messages, "chosen": chosen, "rejected": rejected}


_CHAT: Mapping[Trainer, Callable[[Preference], dict[str, Any]]] = {
    "trl": _trl,
    "llama-factory": _llama_factory,
    "axolotl": _axolotl,
    "openrlhf": _openrlhf,
}


def _role_and_content(preference: Preference) -> list[list[ChatMessage]]:
    """The three lists of messages, for readers that know nothing else. Raises NotWritten."""
    _refuse_template_kwargs(preference)
    if preference.tools:
        raise NotWritten("tools")
    lists: list[Any] = [preference.prompt, preference.chosen, preference.rejected]
    if not all(lists):
        raise NotWritten("no_messages")
    # The prompt is rendered with the beginning of an assistant's message.
    if any(messages[0].get("role") != "assistant" for messages in lists[1:]):
        raise NotWritten("answer_not_of_assistant")
    return [
        [
            {"role": message.get("role"), "content": _text(_only(message, ("role", "content")))}
            for message in messages
        ]
        for messages in lists
    ]


def _refuse_template_kwargs(preference: Preference) -> None:
    if preference.chat_template_kwargs:
        raise NotWritten("chat_template_kwargs")


def _only(message: ChatMessage, known: Sequence[str]) -> ChatMessage:
    """The message, where it says nothing beyond the fields that the reader knows. Raises NotWritten."""
    if message.get("tool_calls") and "tool_calls" not in known:
        raise NotWritten("tool_calls")
    if any(value is not None and value != [] for name, value in message.items() if name not in known):
        raise NotWritten("other_message_fields")
    return message


def _text(message: ChatMessage) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise NotWritten("content_not_text")
    return content


def _one(messages: Any) -> ChatMessage:
    if len(messages) != 1:
        raise NotWritten("answer_of_several_messages")
    message: ChatMessage = messages[0]
    return message


def llama_factory_info(shape: Shape) -> dict[str, Any]:
    """What LLaMA-Factory's dataset_info.json says of the file; the dataset is called `congrad`."""
    entry: dict[str, Any] = {"file_name": "train.jsonl", "ranking": True}
    if shape == "plain":
        columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
        return {"congrad": {**entry, "formatting": "alpaca", "columns": columns}}
    columns = {
        "messages": "conversations",
        "chosen": "chosen",
        "rejected": "rejected",
        "system": "system",
        "tools": "tools",
    }
    return {"congrad": {**entry, "formatting": "sharegpt", "columns": columns, "tags": LLAMA_FACTORY_TAGS}}


def axolotl_config(shape: Shape, path: str, max_length: int) -> dict[str, Any]:
    """The part of axolotl's YAML that reads the file at `path`; `max_length` in tokens."""
    dataset: dict[str, Any] = {"path": path, "ds_type": "json", "split": "train"}
    if shape == "plain":
        kind = {f"field_{name}": name for name in ("prompt", "chosen", "rejected")}
        kind |= {f"{name}_format": f"{{{name}}}" for name in ("prompt", "chosen", "rejected")}
        return {"rl": "dpo", "datasets": [{**dataset, "type": kind}], "sequence_len": max_length}
    dataset |= {
        "type": "chat_template.default",
        "field_messages": "messages",
        "field_chosen": "chosen",
        "field_rejected": "rejected",
        "message_property_mappings": {"role": "role", "content": "content"},
    }
    template = {"chat_template": "tokenizer_default"}
    return {"rl": "dpo", **template, "datasets": [dataset], "sequence_len": max_length}


def snippet(trainer: Trainer, shape: Shape, place: str, model: str, max_length: int) -> str:
    """What to tell the trainer so that it reads the export at `place`; `max_length` in tokens."""
    if trainer == "trl":
        return (
            f'dataset = datasets.load_dataset({json.dumps(place)}, split="train")\n'
            f"trainer = DPOTrainer(model={json.dumps(model)}, args=DPOConfig(max_length={max_length}), "
            "train_dataset=dataset)\n"
        )
    if trainer == "llama-factory":
        template = (
            "template: empty" if shape == "plain" else "template: ...  # the model's, by LLaMA-Factory's name"
        )
        return (
            f"{place}/dataset_info.json:\n{json.dumps(llama_factory_info(shape), indent=2)}\n\n"
            f"stage: dpo\ndataset_dir: {place}\ndataset: congrad\n{template}\ncutoff_len: {max_length}\n"
        )
    if trainer == "axolotl":
        return yaml.safe_dump(axolotl_config(shape, f"{place}/train.jsonl", max_length), sort_keys=False)
    lines = [
        "python -m openrlhf.cli.train_dpo",
        f"--data.dataset {place}/train.jsonl",
        "--data.prompt_key prompt",
        "--data.chosen_key chosen",
        "--data.rejected_key rejected",
        *(["--data.apply_chat_template"] if shape == "chat" else []),
        f"--data.max_len {max_length}",
    ]
    return " \\\n   ".join(lines) + "\n# versions before these names: --dataset, --prompt_key and so on\n"
