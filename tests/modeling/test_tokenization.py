from __future__ import annotations

import logging
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer

from congrad_ray.modeling import tokenization
from congrad_ray.modeling.tokenization import (
    MissingChatTemplate,
    PairTooLong,
    TokenizedPair,
    chat_prompt_ids,
    load_tokenizer,
    tokenize_pair,
)

PROMPT = [{"role": "user", "content": "Welche Farbe hat der Himmel?"}]
CHOSEN = [{"role": "assistant", "content": "Der Himmel ist blau."}]
REJECTED = [{"role": "assistant", "content": "Lisbon."}]
LONG_PROMPT = [
    {"role": "user", "content": "Quelle est la couleur du ciel?"},
    {"role": "assistant", "content": "Le ciel est bleu."},
    {"role": "user", "content": "空は何色ですか？"},
]

# Ends the generation prompt with an empty block of thoughts that an answered conversation does not have.
TEMPLATE_WITHOUT_PREFIX = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>{% endif %}"
)


def trl_template(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text()


def trl_ids(tokenizer: PreTrainedTokenizerFast, prompt: Any, chosen: Any, rejected: Any) -> TokenizedPair:
    """The ids of TRL's own dataset preparation."""
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    rows = Dataset.from_list([{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
    row = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, arguments, "train")[0]
    return TokenizedPair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])


@pytest.mark.parametrize("template", ["llama3", "qwen2_5", "qwen3", "gemma", "without prefix"])
@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT], ids=["one turn", "three turns"])
def test_chat_ids_are_those_of_trl(
    tokenizer: PreTrainedTokenizerFast, template: str, prompt: list[dict[str, str]]
) -> None:
    tokenizer.chat_template = TEMPLATE_WITHOUT_PREFIX if template == "without prefix" else trl_template(template)
    pair = tokenize_pair(tokenizer, prompt, CHOSEN, REJECTED, max_length=1000)
    assert pair == trl_ids(tokenizer, prompt, CHOSEN, REJECTED)
    assert "Der Himmel ist blau." in tokenizer.decode(pair.chosen_ids)
    assert "Der Himmel ist blau." not in tokenizer.decode(pair.prompt_ids)
    if template != "without prefix":
        assert pair.prompt_ids == chat_prompt_ids(tokenizer, prompt)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("The capital of Portugal is", " Lisbon.", " blau."),
        ("The capital of Portugal is", " Lisbon.</s>", " blau."),
        ("空は何色", "ですか？", "いです。"),
        # The end of the prompt and the start of "iel" merge into one token, with one completion or the other.
        ("Quelle est la couleur du c", "iel", " blau."),
        ("Quelle est la couleur du c", " blau.", "iel"),
    ],
)
def test_text_ids_are_those_of_trl(
    tokenizer: PreTrainedTokenizerFast, prompt: str, chosen: str, rejected: str
) -> None:
    pair = tokenize_pair(tokenizer, prompt, chosen, rejected, max_length=1000)
    assert pair == trl_ids(tokenizer, prompt, chosen, rejected)
    for ids in (pair.chosen_ids, pair.rejected_ids):
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id


def test_a_dropped_prompt_end_is_said_once(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    tokenization._warn_of_dropped_prompt_end.cache_clear()
    tokenizer.chat_template = TEMPLATE_WITHOUT_PREFIX
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            pair = tokenize_pair(tokenizer, PROMPT, CHOSEN, REJECTED, max_length=1000)
    assert len(caplog.records) == 1
    assert pair.prompt_ids == chat_prompt_ids(tokenizer, PROMPT)[: len(pair.prompt_ids)]
    assert tokenizer.convert_tokens_to_ids("<think>") not in pair.prompt_ids


def test_beginning_of_sequence_appears_once(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = trl_template("llama3")
    ids = chat_prompt_ids(tokenizer, PROMPT)
    assert type(ids) is list and all(type(token) is int for token in ids)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_missing_chat_template_names_the_model_and_the_ways_out(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(MissingChatTemplate, match=r"'tiny/base-model'.*model\.chat_template: .*--chat-template"):
        chat_prompt_ids(tokenizer, PROMPT)
    with pytest.raises(MissingChatTemplate):
        tokenize_pair(tokenizer, PROMPT, CHOSEN, REJECTED, max_length=1000)


def test_too_long_pair_tells_its_numbers_and_the_limit_itself_fits(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = ("The capital of Portugal is", " Lisbon.", " blau. Der Himmel ist blau.")
    pair = tokenize_pair(tokenizer, *texts, max_length=1000)
    assert pair.longest_row == len(pair.prompt_ids) + len(pair.rejected_ids)
    assert tokenize_pair(tokenizer, *texts, max_length=pair.longest_row) == pair
    numbers = rf"prompt has {len(pair.prompt_ids)} .* chosen {len(pair.chosen_ids)}, .* {pair.longest_row}, .* = "
    with pytest.raises(PairTooLong, match=numbers + str(pair.longest_row - 1)):
        tokenize_pair(tokenizer, *texts, max_length=pair.longest_row - 1)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "reason"),
    [
        ("The sky is", "", " blau.", "chosen completion is empty"),
        ("The sky is", " blau.", "</s>", "rejected completion is empty"),
        ("The sky is", " blau.", " \n", "rejected completion is empty"),
        (PROMPT, CHOSEN, [{"role": "assistant", "content": ""}], "rejected completion is empty"),
        (PROMPT, CHOSEN, [], "rejected completion is empty"),
        ("The sky is", " blau.", " blau.</s>", "same .* tokens"),
        (PROMPT, CHOSEN, list(CHOSEN), "same .* tokens"),
        (PROMPT, "blau", "Lisbon", "prompt is a list, chosen a str"),
    ],
)
def test_pairs_without_a_preference_are_refused(
    tokenizer: PreTrainedTokenizerFast, prompt: Any, chosen: Any, rejected: Any, reason: str
) -> None:
    tokenizer.chat_template = trl_template("llama3")
    with pytest.raises(ValueError, match=reason):
        tokenize_pair(tokenizer, prompt, chosen, rejected, max_length=1000)


def test_a_completion_needs_a_prompt_token_before_it(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenize_pair(tokenizer, "", "blau", "Lisbon", max_length=1000).prompt_ids == [tokenizer.bos_token_id]
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(ValueError, match="no prompt token"):
        tokenize_pair(tokenizer, [{"role": "user", "content": ""}], CHOSEN, REJECTED, max_length=1000)


def test_load_tokenizer_sets_padding_and_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer.pad_token is None
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.pad_token, loaded.chat_template) == ("</s>", None)
    assert load_tokenizer(str(tmp_path), chat_template="{{ 1 }}").chat_template == "{{ 1 }}"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a pad token nor an end-of-sequence token"):
        load_tokenizer(str(tmp_path))
