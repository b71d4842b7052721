"""The world's tokenizer: a small byte-level BPE with a chat template."""

from collections.abc import Iterable
from importlib import resources

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 1536  # a multiple of 64
PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<|pad|>", "<|begin|>", "<|end|>"
ROLE_TOKENS = ("<|user|>", "<|assistant|>")

# GPT-2's pattern splits words at Hindi vowel signs (marks are no letters to it). Here a word is whatever
# stands between spaces, digits and punctuation. A digit stands alone and takes no space, so that it is one
# and the same token wherever it occurs, in every language and as the judge's score.
_PIECE = Regex(r"\d| ?[^\s\d\p{P}\p{S}]+|[\p{P}\p{S}]+ ?|\s")


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most VOCABULARY_SIZE entries; it never adds special tokens on its own.

    The chat template writes the beginning token once, ends an assistant's turn with the end token and renders
    a prompt with `add_generation_prompt=True` as an exact prefix of the prompt with its answer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECE, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, *ROLE_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    template_file = resources.files("congrad_ray.world").joinpath("chat_template.jinja")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        additional_special_tokens=list(ROLE_TOKENS),
        chat_template=template_file.read_text(encoding="utf-8").strip(),
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )
