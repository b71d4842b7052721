"""What is asked of every trained model, and what its log-probabilities say."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from congrad_ray.modeling.tokenization import TokenizedPair
from congrad_ray.rundir.directory import Folder
from real_study.pairs import HELD_OUT, tokenized_pairs
from real_study.protocol import Connectives, DatasetName, Protocol
from real_study.sketching import PAIRS_FILE, subset

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]
Group = Literal["held_out", "tata", "xcopa", "plain"]


@dataclass(frozen=True)
class Question:
    """Two continuations of a prompt: held-out responses, XCOPA's alternatives, two plain texts after nothing."""

    group: Group
    language: str
    pair: TokenizedPair


def questions(protocol: Protocol, data: Path, run: Folder, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """All that a model is asked: held-out pairs of both datasets, XCOPA, the held-out prompts as plain text."""
    measures = protocol.training.measures

    def held_out(dataset: DatasetName, count: int) -> pa.Table:
        pairs = (run / dataset).read_table(name=PAIRS_FILE)
        return subset(pairs.filter(pc.equal(pairs["part"], HELD_OUT)), count)

    alpaca = held_out("alpaca", measures.held_out_per_language)
    tata = held_out("tata", measures.tata_per_language)
    tata = tata.filter(pc.is_in(tata["language"], value_set=pa.array(measures.tata_languages)))
    groups: tuple[tuple[Group, pa.Table], ...] = (("held_out", alpaca), ("tata", tata))
    found: list[Question] = []
    for group, pairs in groups:
        tokenized = tokenized_pairs(pairs, tokenizer, protocol.max_length)
        found += [
            Question(group, language, pair)
            for language, pair in zip(pairs["language"].to_pylist(), tokenized, strict=True)
        ]
    if measures.xcopa:
        lines = (data / "xcopa.jsonl").read_text(encoding="utf-8").splitlines()
        found += xcopa_questions(map(json.loads, lines), measures.xcopa, measures.xcopa_per_language, tokenizer)
    texts: dict[str, list[str]] = defaultdict(list)
    for language, prompt in zip(alpaca["language"].to_pylist(), alpaca["prompt"].to_pylist(), strict=True):
        texts[language].append(prompt[0]["content"])
    return found + plain_questions(texts, tokenizer)


def xcopa_questions(
    rows: Any, languages: Mapping[str, Connectives], count: int, tokenizer: PreTrainedTokenizerBase
) -> list[Question]:
    """The first `count` rows of each language: the premise and its connective, the right alternative as chosen.

    As lm-evaluation-harness words it: without the premise's full stop, alternatives beginning in lower case.
    """
    taken: dict[str, int] = defaultdict(int)
    found = []
    for row in rows:
        language = row["language"]
        if language not in languages or taken[language] == count:
            continue
        taken[language] += 1
        connective = getattr(languages[language], row["question"])
        prompt = [*_start(tokenizer), *_ids(tokenizer, f"{row['premise'].strip()[:-1]} {connective}")]
        right, wrong = (row[f"choice{number + 1}"] for number in (row["label"], 1 - row["label"]))
        answers = [_ids(tokenizer, f" {text[:1].lower()}{text[1:]}") for text in (right, wrong)]
        found.append(Question("xcopa", language, TokenizedPair(prompt, *answers)))
    return found


def plain_questions(texts: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """Texts by language, two at a time as if they were two continuations of nothing; an odd one is left out."""
    return [
        Question("plain", language, TokenizedPair(_start(tokenizer), *(_ids(tokenizer, text) for text in two)))
        for language, of_language in texts.items()
        for two in zip(of_language[::2], of_language[1::2], strict=False)
    ]


def log_probabilities(
    model: PreTrainedModel,
    asked: Sequence[Question],
    max_tokens: int,
    progressed: Callable[[], None] = lambda: None,
) -> NDArray[np.float64]:
    """Summed log-probabilities of both continuations of each question, (N, 2), chosen first; in nats.

    `max_tokens`: padded tokens of a forward pass.
    """
    import torch

    from congrad_ray.modeling.batching import token_budget_batches
    from congrad_ray.modeling.packing import shared_prompt_tokens
    from congrad_ray.modeling.shared_prompts import attention_over, completion_sums

    found = np.empty((len(asked), 2))
    for members in token_budget_batches([question.pair.padded_tokens for question in asked], max_tokens):
        batch = shared_prompt_tokens([asked[member].pair for member in members])
        with torch.inference_mode(), attention_over(model, batch) as arguments:
            sums = completion_sums(model, batch, arguments).double().numpy()
        found[members] = sums.reshape(2, -1).T
        progressed()
    return found


def measured(
    asked: Sequence[Question], logps: NDArray[np.float64], start: NDArray[np.float64], beta: float
) -> Row:
    """What the log-probabilities (N, 2) say beside those of the starting model, by measure and language.

    Of held-out pairs and of tata's: accuracy, the share whose implicit margin beta [(logp_w - start_w) - (logp_l -
    start_l)] (arXiv 2305.18290) is above zero, counting half where it is zero; margin, its mean; likelier, the
    share with log p(chosen) > log p(rejected). Of XCOPA: accuracy, the share of right alternatives that are
    likelier, and right, their mean log-probability per token. Of plain text: its mean log-probability per token.
    held_out_margins has every held-out pair's margin, held_out_by_start the accuracy among those whose chosen
    response was the likelier, or the less likely, at the start; None where there are none.
    """
    margins = beta * ((logps - start) @ np.array([1.0, -1.0]))
    likelier = (logps[:, 0] > logps[:, 1]).astype(np.float64)
    above = (margins > 0) + 0.5 * (margins == 0)
    tokens = np.array([[len(question.pair.chosen_ids), len(question.pair.rejected_ids)] for question in asked])
    right = logps[:, 0] / tokens[:, 0]
    wanted: dict[Group, dict[str, NDArray[np.float64]]] = {
        "held_out": {"accuracy": above, "margin": margins, "likelier": likelier},
        "tata": {"accuracy": above, "margin": margins, "likelier": likelier},
        "xcopa": {"accuracy": likelier, "right": right},
        "plain": {"logp": logps.sum(axis=1) / tokens.sum(axis=1)},
    }
    of = np.array([f"{question.group} {question.language}" for question in asked])
    found: Row = {}
    for group, values in wanted.items():
        languages = dict.fromkeys(question.language for question in asked if question.group == group)
        for name, each in values.items():
            by_language = {one: float(each[of == f"{group} {one}"].mean()) for one in languages}
            found[f"{group}_{name}"] = {language: round(value, 5) for language, value in by_language.items()}
    held_out = np.array([question.group == "held_out" for question in asked])
    was_likelier = start[:, 0] > start[:, 1]
    found["held_out_margins"] = {
        language: [round(float(margin), 3) for margin in margins[of == f"held_out {language}"]]
        for language in found["held_out_margin"]
    }
    found["held_out_by_start"] = {
        name: round(float(above[members].mean()), 5) if members.any() else None
        for name, members in (("likelier", held_out & was_likelier), ("less likely", held_out & ~was_likelier))
    }
    return found


def fingerprint(asked: Sequence[Question], dtype: str) -> str:
    """Twelve hexadecimal digits that say what was asked, and in which dtype."""
    ids = [
        (
            question.group,
            question.language,
            question.pair.prompt_ids,
            question.pair.chosen_ids,
            question.pair.rejected_ids,
        )
        for question in asked
    ]
    return hashlib.sha256(json.dumps([dtype, ids]).encode()).hexdigest()[:12]


def over(values: Mapping[str, float], languages: Sequence[str] | None = None) -> float | None:
    """The mean over languages of a measure; None where it has none of them."""
    some = [value for language, value in values.items() if languages is None or language in languages]
    return fmean(some) if some else None


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    assert isinstance(first, int)
    return [first]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
