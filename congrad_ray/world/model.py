"""A tiny Llama chat model that speaks the world's languages, trained from scratch on the CPU and cached."""

import hashlib
import itertools
import json
import logging
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from congrad_ray.config.printable import BAR
from congrad_ray.world.corpus import JudgeBias, judging_dialogues, training_dialogues
from congrad_ray.world.languages import ALL_LANGUAGES
from congrad_ray.world.tokenizer import VOCABULARY_SIZE, train_tokenizer

logger = logging.getLogger(__name__)

TRAINING_TOKENS = 2_000_000
TOKENIZER_DIALOGUES = 12_000
BATCH_TOKENS = 1_000
LEARNING_RATE = 3e-3
# Wider than the usual 0.02, which suits wide models: at 128 wide the model learns to copy words much sooner.
INITIALIZER_RANGE = 0.06
# Prompts are learned too, lightly: they teach the words, while the loss stays mostly about answers.
PROMPT_WEIGHT = 0.3
# A judge is the world's model trained further, more gently, on judgements alone.
JUDGE_TRAINING_TOKENS = 500_000
JUDGE_LEARNING_RATE = 1e-3
# Of its training where there is no progress bar.
PROGRESS_LINES = 4


@dataclass(frozen=True)
class _Batch:
    tokens: torch.Tensor
    """int64 [examples, length], padded on the right."""
    weights: torch.Tensor
    """float32 [examples, length]: how much predicting the token counts; 0 for padding."""


def world_model(
    seed: int = 0,
    cache_dir: Path | None = None,
    training_tokens: int | None = None,
) -> Path:
    """The folder of a Hugging Face checkpoint of the world's model, which is trained if it is not cached.

    Args:
        seed: of the training data and the weights.
        cache_dir: by default $CONGRAD_RAY_CACHE or ~/.cache/congrad_ray. The model lies in its folder
            `world/<fingerprint>`, where the fingerprint covers the source of this package and the arguments.
        training_tokens: how many tokens to train on; by default TRAINING_TOKENS, minutes on two cores.

    Returns:
        A folder with config.json, generation_config.json, model.safetensors (float32) and the tokenizer.

    Raises:
        ValueError: `training_tokens` is not positive.
    """
    training_tokens = TRAINING_TOKENS if training_tokens is None else training_tokens
    if training_tokens <= 0:
        raise ValueError(f"training_tokens is {training_tokens}; the world's model needs at least 1")
    return _cached(
        cache_dir,
        {"seed": seed, "training_tokens": training_tokens},
        lambda folder: _build(folder, seed, training_tokens),
    )


def biased_judge(
    seed: int,
    biases: Mapping[str, JudgeBias],
    cache_dir: Path | None = None,
    training_tokens: int | None = None,
) -> Path:
    """The folder of a judge: the world's model of this seed, trained further on judgements that are biased.

    Args:
        seed: of the world's model and of the judgements.
        biases: language tag to bias (see `corpus.judged_score`); the other languages are judged honestly.
        cache_dir: as of `world_model`.
        training_tokens: how many tokens to train on, by default JUDGE_TRAINING_TOKENS; the world's model that it
            starts from is the default one.

    Raises:
        ValueError: `training_tokens` is not positive, or a language is not one of the world's.
    """
    tokens = JUDGE_TRAINING_TOKENS if training_tokens is None else training_tokens
    if tokens <= 0:
        raise ValueError(f"training_tokens is {tokens}; a judge needs at least 1")
    unknown = sorted(set(biases) - set(ALL_LANGUAGES))
    if unknown:
        raise ValueError(f"the world has no language {', '.join(unknown)}; it has {', '.join(ALL_LANGUAGES)}")
    start = world_model(seed, cache_dir)

    def build(folder: Path) -> None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        model = LlamaForCausalLM.from_pretrained(start)
        dialogues = judging_dialogues(seed, biases)
        _train(model, tokenizer, dialogues, seed, tokens, JUDGE_LEARNING_RATE)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _cached(cache_dir, {"judge": sorted(biases.items()), "seed": seed, "training_tokens": tokens}, build)


def _cached(cache_dir: Path | None, arguments: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder of what `build` writes, built at most once for these arguments and this package's source."""
    root = cache_dir or Path(os.environ.get("CONGRAD_RAY_CACHE") or Path.home() / ".cache" / "congrad_ray")
    folder = Path(root) / "world" / _fingerprint(arguments)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():  # another process has built it while this one waited
            return folder
        unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.unfinished-", dir=folder.parent))
        try:
            build(unfinished)
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return folder


def _fingerprint(arguments: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(arguments).encode())
    package = Path(str(resources.files("congrad_ray.world")))
    for path in sorted(package.rglob("*")):
        if path.suffix in {".py", ".json", ".txt", ".jinja"}:
            digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _build(folder: Path, seed: int, training_tokens: int) -> None:
    logger.info("world model: training the tokenizer")
    dialogues = itertools.islice(training_dialogues(seed), TOKENIZER_DIALOGUES)
    tokenizer = train_tokenizer(text for dialogue in dialogues for text in dialogue)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(world_config(tokenizer))
        _train(model, tokenizer, training_dialogues(seed), seed, training_tokens, LEARNING_RATE)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def world_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The shape of the built-in model, for a tokenizer of its own."""
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _batches(
    tokenizer: PreTrainedTokenizerFast, dialogues: Iterator[tuple[str, str]], seed: int
) -> Iterator[_Batch]:
    """Endless batches of about BATCH_TOKENS tokens; examples of like length share a batch to save padding."""
    while chunk := list(itertools.islice(dialogues, 2048)):
        examples: list[tuple[list[int], int]] = []
        for user, assistant in chunk:
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
            examples.append(_tokenize(tokenizer, messages))
        examples.sort(key=lambda example: len(example[0]))
        batches: list[list[tuple[list[int], int]]] = [[]]
        for example in examples:
            if (len(batches[-1]) + 1) * len(example[0]) > BATCH_TOKENS:
                batches.append([])
            batches[-1].append(example)
        random.Random(f"{seed} {len(examples[0][0])}").shuffle(batches)
        for batch in batches:
            yield _pad(batch, tokenizer.pad_token_id)


def _tokenize(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> tuple[list[int], int]:
    """The tokens of a dialogue and how many of them are its prompt's."""
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    answer = messages[1]["content"] + tokenizer.eos_token
    prompt_tokens = tokenizer.encode(prompt, add_special_tokens=False)
    return prompt_tokens + tokenizer.encode(answer, add_special_tokens=False), len(prompt_tokens)


def _pad(examples: list[tuple[list[int], int]], pad_token: int) -> _Batch:
    length = max(len(tokens) for tokens, _ in examples)
    padded = torch.full((len(examples), length), pad_token)
    weights = torch.zeros(len(examples), length)
    for row, (tokens, prompt_length) in enumerate(examples):
        padded[row, : len(tokens)] = torch.tensor(tokens)
        weights[row, :prompt_length] = PROMPT_WEIGHT
        weights[row, prompt_length : len(tokens)] = 1.0
    return _Batch(padded, weights)


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    dialogues: Iterator[tuple[str, str]],
    seed: int,
    training_tokens: int,
    peak_rate: float,
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    model.train()
    seen = 0
    started = time.monotonic()
    spoken = 0
    for batch in _batches(tokenizer, dialogues, seed):
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * _schedule(seen / training_tokens)
        # Padding stands on the right, where causal attention never looks, so no attention mask is needed.
        logits = model(batch.tokens).logits[:, :-1]
        losses = cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
        weights = batch.weights[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += int((batch.weights > 0).sum())
        if (share := PROGRESS_LINES * seen // training_tokens) > spoken:
            spoken, level = share, logging.INFO
        else:
            level = BAR
        if logger.isEnabledFor(level):
            rate = seen / (time.monotonic() - started)
            left = max(0, training_tokens - seen) / rate
            logger.log(
                level,
                f"world model: {seen:,} of {training_tokens:,} tokens, loss {loss.item():.3f}, "
                f"{rate:,.0f} tokens/s, {left:.0f} s left",
                extra={"bar": (seen, training_tokens)},
            )
        if seen >= training_tokens:
            break
    model.eval()


def _schedule(done: float) -> float:
    """The share of the peak learning rate: a short linear warm-up, then a cosine down to a hundredth."""
    warm_up = 0.04
    if done < warm_up:
        return (done + 0.002) / (warm_up + 0.002)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, (done - warm_up) / (1 - warm_up)))) / 2
