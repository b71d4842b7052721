"""pair: the best against the worst response of every prompt, as TRL preference rows."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from congrad_ray.config.recipe import Pair, Recipe
from congrad_ray.data.tables import pair_id, table_of
from congrad_ray.planning.volume import rows_of
from congrad_ray.rundir.directory import RunDirectoryError, StageFolder
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.runtime.resources import driver_demand
from congrad_ray.stages.base import Stage
from congrad_ray.stages.pair.best_and_worst import BestAndWorst, JudgedResponse, NoPair, best_and_worst
from congrad_ray.stages.pair.estimate import ESTIMATE
from congrad_ray.stages.pair.schema import PAIRS
from congrad_ray.stages.view import Step, rows_by_language

logger = logging.getLogger(__name__)

_READ = ["response_id", "prompt_id", "language", "prompt", "sample", "response", "truncated"]
_ROWS_AT_A_TIME = 4096


def run(context: Context) -> Outcome:
    """Joins responses and judgements by id and pairs them prompt by prompt.

    Only the pairs' own texts are held: a prompt's responses lie in one part, or in a few, and are let go as soon
    as the last of them was read.
    """
    settings = context.recipe.pair
    responses = context.input("responses")
    waiting = Counter(responses.read_table(["prompt_id"])["prompt_id"].to_pylist())
    prompts = len(waiting)
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    said: dict[str, Counter[str]] = {"wrong": Counter(), "unknown": Counter()}
    dropped: Counter[str] = Counter()
    pairs, found = [], []
    for row in _judged(context, responses):
        identifier = row["prompt_id"]
        if row["verdict"] in said:
            said[row["verdict"]][row["language"]] += 1
        groups[identifier].append(row)
        waiting[identifier] -= 1
        if waiting[identifier]:
            continue
        del waiting[identifier]
        group = groups.pop(identifier)
        pair = _best_and_worst(group, settings)
        if isinstance(pair, BestAndWorst):
            found.append(_row(pair, group[0], identifier, context.iteration))
        else:
            dropped[f"{pair} {row['language']}"] += 1
        if len(found) == _ROWS_AT_A_TIME:
            pairs.append(table_of(found, PAIRS))
            found = []
    table = pa.concat_tables([*pairs, table_of(found, PAIRS)])
    if not len(table):
        raise RunDirectoryError(
            f"not one pair from {prompts} prompts ({dict(dropped)}): look at the judgements in "
            f"{context.input('judgements').path}, or raise generate.num_generations or generate.temperature"
        )
    _write_sorted(context, table)
    counts = table["language"].value_counts().to_pylist()
    return Outcome(
        len(table),
        {
            "pairs": {row["values"]: row["counts"] for row in sorted(counts, key=lambda row: row["values"])},
            "no_pair": dict(sorted(dropped.items())),
            "wrong_language": dict(sorted(said["wrong"].items())),
            "unknown_language": dict(sorted(said["unknown"].items())),
        },
    )


def _judged(context: Context, responses: StageFolder) -> Iterator[dict[str, Any]]:
    """Every response with its score and what the language check says of it, a part at a time."""
    settings = context.recipe.pair
    score_of = _scores(context)
    check = None
    if settings.language_check:
        from congrad_ray.stages.pair.language_check import LanguageCheck

        logger.info("identifying the languages of the responses")
        languages = context.recipe.prompts.languages
        check = LanguageCheck(languages, settings.language_confidence, settings.language_min_characters)
    for path in responses.files(".parquet"):
        part = responses.read_parquet(path, _READ)
        texts, languages = part["response"].to_pylist(), part["language"].to_pylist()
        verdicts = check.verdicts(texts, languages) if check else [None] * len(part)
        scores = score_of(part["response_id"])
        for row, score, verdict in zip(part.to_pylist(), scores, verdicts, strict=True):
            yield {**row, "score": score, "verdict": verdict}


def _scores(context: Context) -> Callable[[pa.ChunkedArray], list[float | None]]:
    """Looks up the scores of response ids; None where there is none. Arrays take a fifth of a dictionary."""
    judgements = context.input("judgements").read_table(["response_id", "score"]).combine_chunks()
    ids = np.array(judgements["response_id"].to_numpy(), dtype=np.bytes_)
    scores = judgements["score"].to_numpy()  # NaN for null, which takes no part either
    order = np.argsort(ids)
    ids, scores = ids[order], scores[order]

    def look_up(wanted: pa.ChunkedArray) -> list[float | None]:
        asked = np.array(wanted.to_numpy(), dtype=np.bytes_)
        places = np.minimum(np.searchsorted(ids, asked), len(ids) - 1)
        known = ids[places] == asked if len(ids) else np.zeros(len(asked), np.bool_)
        return [
            float(scores[place]) if there else None for place, there in zip(places, known.tolist(), strict=True)
        ]

    return look_up


def _write_sorted(context: Context, table: pa.Table) -> None:
    """Writes the pairs in the order of their prompts' ids, whatever the order of the responses."""
    order = pc.sort_indices(table["prompt_id"])
    with (
        context.output.output_stream("pairs.parquet") as sink,
        pq.ParquetWriter(sink, PAIRS, compression="zstd", write_page_checksum=True) as writer,
    ):
        for start in range(0, len(table), _ROWS_AT_A_TIME):
            writer.write_table(table.take(order[start : start + _ROWS_AT_A_TIME]), row_group_size=1024)


def _best_and_worst(group: Sequence[dict[str, Any]], settings: Pair) -> BestAndWorst | NoPair:
    return best_and_worst(
        [
            JudgedResponse(
                response_id=row["response_id"],
                sample=row["sample"],
                text=row["response"],
                score=row["score"],
                truncated=row["truncated"],
                wrong_language=row["verdict"] == "wrong",
            )
            for row in group
        ],
        settings.min_margin,
        settings.truncated,
        settings.wrong_language,
    )


def _row(pair: BestAndWorst, row: dict[str, Any], prompt_id: str, iteration: int) -> dict[str, Any]:
    return {
        "pair_id": pair_id(prompt_id, iteration),
        "prompt_id": prompt_id,
        "language": row["language"],
        "prompt": row["prompt"],
        "chosen": [{"role": "assistant", "content": pair.chosen.text}],
        "rejected": [{"role": "assistant", "content": pair.rejected.text}],
        "chosen_score": pair.chosen.score,
        "rejected_score": pair.rejected.score,
        "chosen_response_id": pair.chosen.response_id,
        "rejected_response_id": pair.rejected.response_id,
    }


def _settings(recipe: Recipe, iteration: int) -> Any:
    return [
        recipe.pair.model_dump(mode="json"),
        recipe.prompts.languages if recipe.pair.language_check else [],
    ]


STAGE = Stage(
    name="pair",
    folder="pairs",
    summary="Pair the best with the worst response of every prompt",
    example="pair.min_margin=0.5",
    inputs=lambda iteration: [("responses", iteration), ("judgements", iteration)],
    settings=_settings,
    run=run,
    demand=lambda recipe, profile: driver_demand("pair", rows_of(recipe).training),
    schema=lambda recipe: PAIRS,
    estimate=ESTIMATE,
    step=Step("pairs", "pairs", "of prompts", rows_by_language, "prompts"),
    uses_ray=False,
)
