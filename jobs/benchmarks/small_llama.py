"""A Llama of any shape with its own tokenizer, trained a little on real preference data, and that data as tokens.

Random weights have gradients unlike those of a trained model, and a model to download is not always at hand; so
the benchmarks train one, for a few minutes.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from congrad_ray.modeling.tokenization import TokenizedPair, tokenize_pair

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]


@dataclass(frozen=True)
class Shape:
    """The shape of the model and how long it is trained."""

    hidden_size: int = 512
    layers: int = 8
    intermediate_size: int = 1408
    heads: int = 8
    key_value_heads: int = 4
    vocabulary: int = 8192
    positions: int = 4096
    steps: int = 600
    tokens_per_step: int = 1024
    learning_rate: float = 1e-3


def read_preferences(path: Path) -> list[dict[str, str]]:
    """The rows of a JSONL file with the strings prompt, chosen, rejected and language."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def prepare(folder: Path, preferences: Path, shape: Shape) -> Path:
    """Makes `folder`/model (weights and tokenizer) and `folder`/pairs.parquet unless they are there already.

    Raises ValueError if the folder holds a model of another shape.
    """
    described = {"shape": asdict(shape), "preferences": preferences.name}
    marker = folder / "small_llama.json"
    if marker.exists():
        if json.loads(marker.read_text())["shape"] != asdict(shape):
            raise ValueError(f"{folder} holds a model of another shape: {marker.read_text()}; use another folder")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_preferences(preferences)
    tokenizer = _train_tokenizer([row[key] for row in rows for key in ("prompt", "chosen", "rejected")], shape)
    pairs = [
        tokenize_pair(
            tokenizer,
            [{"role": "user", "content": row["prompt"]}],
            [{"role": "assistant", "content": row["chosen"]}],
            [{"role": "assistant", "content": row["rejected"]}],
            shape.positions,
        )
        for row in rows
    ]
    _write_pairs(folder / "pairs.parquet", pairs, [row["language"] for row in rows])
    model = _train_model(pairs, shape)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    marker.write_text(json.dumps(described, indent=2))
    return folder


def load_pairs(folder: Path) -> tuple[list[TokenizedPair], list[str]]:
    """The tokenised pairs that `prepare` wrote, and their languages."""
    table = pq.read_table(folder / "pairs.parquet").to_pydict()
    pairs = [
        TokenizedPair(*ids)
        for ids in zip(table["prompt_ids"], table["chosen_ids"], table["rejected_ids"], strict=True)
    ]
    return pairs, table["language"]


def _write_pairs(path: Path, pairs: list[TokenizedPair], languages: list[str]) -> None:
    columns = {
        name: [getattr(pair, name) for pair in pairs] for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    }
    pq.write_table(pa.table({**columns, "language": languages}), path)


def _train_tokenizer(texts: list[str], shape: Shape) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=shape.vocabulary,
            special_tokens=_SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def random_llama(shape: Shape) -> LlamaForCausalLM:
    """A Llama of this shape with random weights, float32."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            max_position_embeddings=shape.positions,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            tie_word_embeddings=False,
        )
    )


def save_random(folder: Path, shape: Shape, texts: list[str]) -> None:
    """Saves a Llama with random weights and a tokenizer trained on `texts`."""
    tokenizer = _train_tokenizer(texts, shape)
    random_llama(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_model(pairs: list[TokenizedPair], shape: Shape) -> LlamaForCausalLM:
    model = random_llama(shape)
    # Chosen and rejected texts as one stream, cut into rows of 512 tokens.
    stream = [
        token for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids) for token in pair.prompt_ids + ids
    ]
    tokens = torch.tensor(stream[: len(stream) // 512 * 512]).view(-1, 512)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    rows = shape.tokens_per_step // 512
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, shape.learning_rate, shape.steps, pct_start=0.1)
    start = time.monotonic()
    for step in range(shape.steps):
        chosen = torch.arange(step * rows, (step + 1) * rows) % len(tokens)
        batch = tokens[order[chosen]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == shape.steps - 1:
            print(
                f"training the model: step {step}, loss {loss.item():.3f}, {time.monotonic() - start:.0f} s",
                flush=True,
            )
    return model.eval()
