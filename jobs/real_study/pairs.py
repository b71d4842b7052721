"""The pairs of the study, from the files: which are selected from, which are held out, and how they are cut."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from congrad_ray.data.tables import LANGUAGE, MESSAGES, PAIR_ID, PROMPT, field, row_id
from congrad_ray.modeling.tokenization import TokenizedPair, tokenize_pair
from real_study.protocol import Alpaca, DatasetName, Protocol, Tata

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]

SELECT, HELD_OUT = "select", "held_out"
TRUE = 2  # what a person's rating of an understandable and true sentence is in tata.jsonl

PAIRS = pa.schema(
    [
        PAIR_ID,
        LANGUAGE,
        PROMPT,
        field("chosen", MESSAGES, "as labelled in the file, cut where the protocol cuts"),
        field("rejected", MESSAGES, "the other response"),
        field("chosen_score", pa.float32(), "people's rating; null where nobody rated", nullable=True),
        field("rejected_score", pa.float32(), "as chosen_score", nullable=True),
        field("part", pa.string(), "select: may be selected and trained on; held_out: measured on"),
        field("place", pa.int32(), "row within its language in the file, from 0"),
    ]
)


class StudyDataError(ValueError):
    """The data do not allow what the protocol asks; the text names numbers and files."""


def study_pairs(
    dataset: DatasetName, protocol: Protocol, data: Path, tokenizer: PreTrainedTokenizerBase
) -> pa.Table:
    """The dataset's pairs that the study uses, a table of PAIRS sorted by pair_id.

    Raises OSError for a missing file, StudyDataError where parts of the split are not apart, or nothing is left.
    """
    if dataset == "alpaca":
        check_parallel(_rows(data / "preferences.jsonl"), _rows(data / "eval_prompts.jsonl"), protocol.alpaca.gap)
        rows = alpaca_pairs(_rows(data / "preferences.jsonl"), protocol.alpaca, tokenizer, protocol.seed)
    else:
        rows = tata_pairs(_rows(data / "tata.jsonl"), protocol.tata, tokenizer, protocol.seed)
    found = pa.Table.from_pylist(list(rows), schema=PAIRS)
    if not len(found):
        raise StudyDataError(f"no pair of {dataset} in {data} fits the protocol")
    return found.sort_by("pair_id")


def alpaca_pairs(
    rows: Iterable[Row], settings: Alpaca, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[Row]:
    """Rows of PAIRS: from the first rows of each language those to select from, held-out ones from behind the gap.

    The languages have the same instructions in nearly the same order, so that an instruction behind the gap is
    among the first rows of no language. Pairs are drawn for each language by itself: few instructions are drawn in
    all of them.
    """
    for language, of_language in _by_language(rows).items():
        usable: dict[str, list[Row]] = {SELECT: [], HELD_OUT: []}
        for place, row in enumerate(of_language):
            if settings.rows <= place < settings.rows + settings.gap:
                continue
            if len(_ids(tokenizer, row["prompt"])) > settings.max_prompt_tokens:
                continue
            texts = cut_to_equal(
                tokenizer,
                row["chosen"],
                row["rejected"],
                settings.min_response_tokens,
                settings.max_response_tokens,
            )
            if texts is None:
                continue
            part = SELECT if place < settings.rows else HELD_OUT
            usable[part].append(_pair("alpaca", language, place, part, row["prompt"], *texts))
        for part, count in ((SELECT, settings.pairs_per_language), (HELD_OUT, settings.held_out_per_language)):
            yield from _drawn(usable[part], count, seed, "alpaca", language, part)


def tata_pairs(
    rows: Iterable[Row], settings: Tata, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[Row]:
    """Rows of PAIRS whose chosen response is true; a table is held out in all its languages or in none."""
    rated = [row for row in rows if row["chosen_score"] == TRUE]
    tables = sorted({table_of(row) for row in rated})
    held_out = set(random.Random(seed).sample(tables, round(settings.held_out_share * len(tables))))
    for language, of_language in _by_language(rated).items():
        usable: dict[str, list[Row]] = {SELECT: [], HELD_OUT: []}
        for place, row in enumerate(of_language):
            texts = row["prompt"], row["chosen"], row["rejected"]
            if sum(len(_ids(tokenizer, text)) for text in texts) > settings.max_tokens:
                continue
            part = HELD_OUT if table_of(row) in held_out else SELECT
            scores = row["chosen_score"], row["rejected_score"]
            usable[part].append(_pair("tata", language, place, part, *texts, *scores))
        if len(usable[SELECT]) >= settings.min_pairs:
            yield from _drawn(usable[SELECT], settings.pairs_per_language, seed, "tata", language, SELECT)
            yield from usable[HELD_OUT]


def table_of(row: Mapping[str, Any]) -> str:
    """The table of a row of tata.jsonl, alike in all languages: its report and number.

    An id is <report>-<language>-<table>/<system>/<system>.
    """
    report, _, number = row["id"].partition("/")[0].rsplit("-", 2)
    return f"{report}-{number}"


def cut_to_equal(
    tokenizer: PreTrainedTokenizerBase, chosen: str, rejected: str, least: int, most: int
) -> tuple[str, str] | None:
    """Both responses cut to the same number of tokens, neither at its end; None where that leaves too few.

    The cut is the shorter one's tokens less one, or `most`: of two cut texts none is known by its end. A text that
    is cut can have other tokens at its end than it had there; then both are cut earlier, down to `least`.
    """
    ids = [_ids(tokenizer, text) for text in (chosen, rejected)]
    for count in range(min(*(len(one) - 1 for one in ids), most), least - 1, -1):
        texts = [str(tokenizer.decode(one[:count])) for one in ids]
        if all(_ids(tokenizer, text) == one[:count] for text, one in zip(texts, ids, strict=True)):
            return (texts[0], texts[1]) if texts[0] != texts[1] else None
    return None


def check_parallel(rows: Iterable[Row], parallel: Iterable[Row], gap: int) -> int:
    """The rows by which languages drift apart, as far as prompts can be matched; must be below `gap`.

    `parallel` has the same prompts in each language in the same order. Raises StudyDataError.
    """
    places = {
        language: {row["prompt"]: place for place, row in enumerate(of_language)}
        for language, of_language in _by_language(rows).items()
    }
    instructions: dict[int, list[int]] = defaultdict(list)
    for language, of_language in _by_language(parallel).items():
        for number, row in enumerate(of_language):
            if (place := places.get(language, {}).get(row["prompt"])) is not None:
                instructions[number].append(place)
    drift = max((max(found) - min(found) for found in instructions.values()), default=0)
    if drift >= gap:
        raise StudyDataError(
            f"the same instruction is up to {drift} rows apart in two languages, but alpaca.gap is {gap}, so that "
            "held-out instructions would be trained on: raise alpaca.gap"
        )
    return drift


def tokenized_pairs(pairs: pa.Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[TokenizedPair]:
    """The pairs as the stages tokenise them. Raises ValueError for one that cannot be."""
    return [
        tokenize_pair(tokenizer, row["prompt"], row["chosen"], row["rejected"], max_length)
        for row in pairs.select(["prompt", "chosen", "rejected"]).to_pylist()
    ]


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _by_language(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["language"]].append(row)
    return dict(sorted(found.items()))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _drawn(rows: Sequence[Row], count: int, seed: int, *parts: str) -> list[Row]:
    return random.Random(row_id(seed, *parts)).sample(rows, min(count, len(rows)))


def _pair(
    dataset: str,
    language: str,
    place: int,
    part: str,
    prompt: str,
    chosen: str,
    rejected: str,
    chosen_score: float | None = None,
    rejected_score: float | None = None,
) -> Row:
    return {
        "pair_id": row_id(dataset, language, place, prompt),
        "language": language,
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "chosen_score": chosen_score,
        "rejected_score": rejected_score,
        "part": part,
        "place": place,
    }
