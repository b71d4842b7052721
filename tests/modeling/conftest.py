"""Tiny tokenizers, trained here, so that no test needs the network."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<think>",
    "</think>",
]
CORPUS = [
    "The capital of Portugal is Lisbon.",
    "Welche Farbe hat der Himmel? Der Himmel ist blau.",
    "Quelle est la couleur du ciel? Le ciel est bleu.",
    "空は何色ですか？空は青いです。",
    "आकाश का रंग नीला है।",
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts <s> before a plain text, has no chat template and no pad token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=SPECIAL_TOKENS[2:],
        name_or_path="tiny/base-model",
    )
