"""The world's tokenizer: its words, single bytes for everything else, and a chat template."""

from collections import Counter
from collections.abc import Iterable
from importlib import resources

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 1792  # a multiple of 64
PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<|pad|>", "<|begin|>", "<|end|>"
ROLE_TOKENS = ("<|user|>", "<|assistant|>")

# GPT-2's pattern splits words at Hindi vowel signs (marks are no letters to it). Here a word is whatever
# stands between spaces, digits and punctuation. A digit stands alone and takes no space, so that it is one
# and the same token wherever it occurs, in every language and as the judge's score.
_PIECE = Regex(r"\d| ?[^\s\d\p{P}\p{S}]+|[\p{P}\p{S}]+ ?|\s")
_LONGEST_PIECE = 2_000  # bytes; what is longer without a space becomes one unknown token


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The most frequent words of `texts`, up to VOCABULARY_SIZE entries; it adds no special token on its own.

    Words are whole tokens and other text is spelt in known words and bytes, longest match first. Byte-pair
    merges would spend half of so small a vocabulary on word parts, and copying a word of three parts is
    harder to learn than copying one token.

    The chat template writes the beginning token once, ends an assistant's turn with the end token and renders
    a prompt with `add_generation_prompt=True` as an exact prefix of the prompt with its answer.
    """
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECE, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    counts = Counter(piece for text in texts for piece, _ in splitter.pre_tokenize_str(text))
    special = [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, *ROLE_TOKENS]
    entries = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    words = sorted((piece for piece in counts if len(piece) > 1), key=lambda piece: (-counts[piece], piece))
    entries += words[: VOCABULARY_SIZE - len(entries)]
    tokenizer = Tokenizer(
        models.WordPiece(
            {entry: number for number, entry in enumerate(entries)},
            unk_token=PAD_TOKEN,
            max_input_chars_per_word=_LONGEST_PIECE,
            continuing_subword_prefix="",
        )
    )
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
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
