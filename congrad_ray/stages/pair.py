"""pair: the best against the worst response of every prompt, as TRL preference rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pyarrow as pa

from congrad_ray.preference.pairs import BestAndWorst, JudgedResponse, best_and_worst
from congrad_ray.recipe import Recipe
from congrad_ray.rundir import RunDirectoryError
from congrad_ray.stages.base import Context, Outcome, Stage
from congrad_ray.tables import PAIRS, pair_id, table_of


def run(context: Context) -> Outcome:
    """Joins responses and judgements by id and pairs them prompt by prompt."""
    settings = context.recipe.pair
    judgements = context.input("judgements").read_table(["response_id", "score"])
    scores = dict(zip(judgements["response_id"].to_pylist(), judgements["score"].to_pylist(), strict=True))
    responses = context.input("responses").read_table(
        ["response_id", "prompt_id", "language", "prompt", "sample", "response", "truncated"]
    )
    wrong = _wrong_language(context, responses)
    by_prompt: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row, is_wrong in zip(responses.to_pylist(), wrong, strict=True):
        by_prompt[row["prompt_id"]].append({**row, "wrong_language": is_wrong})
    rows = []
    dropped: Counter[str] = Counter()
    for identifier, group in sorted(by_prompt.items()):
        pair = best_and_worst(
            [
                JudgedResponse(
                    response_id=row["response_id"],
                    sample=row["sample"],
                    text=row["response"],
                    score=scores.get(row["response_id"]),
                    truncated=row["truncated"],
                    wrong_language=row["wrong_language"],
                )
                for row in group
            ],
            settings.min_margin,
            settings.truncated,
            settings.wrong_language,
        )
        if isinstance(pair, BestAndWorst):
            rows.append(_row(pair, group[0], identifier, context.iteration))
        else:
            dropped[f"{pair} {group[0]['language']}"] += 1
    if not rows:
        raise RunDirectoryError(
            f"not one pair from {len(by_prompt)} prompts ({dict(dropped)}): look at the judgements in "
            f"{context.input('judgements').path}, or raise generate.num_generations or generate.temperature"
        )
    context.output.write_table("pairs.parquet", table_of(rows, PAIRS))
    return Outcome(
        len(rows),
        {
            "pairs": dict(sorted(Counter(row["language"] for row in rows).items())),
            "no_pair": dict(sorted(dropped.items())),
            "wrong_language": dict(
                sorted(Counter(responses["language"].filter(pa.array(wrong)).to_pylist()).items())
            ),
        },
    )


def _wrong_language(context: Context, responses: pa.Table) -> list[bool]:
    settings = context.recipe.pair
    if not settings.language_check:
        return [False] * responses.num_rows
    from congrad_ray.preference.language_check import LanguageCheck

    context.log("identifying the languages of the responses")
    check = LanguageCheck(
        context.recipe.prompts.languages, settings.language_confidence, settings.language_min_characters
    )
    return check.wrong(responses["response"].to_pylist(), responses["language"].to_pylist())


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
    summary="pairing the best with the worst response of each prompt",
    inputs=lambda iteration: [("responses", iteration), ("judgements", iteration)],
    settings=_settings,
    run=run,
    uses_ray=False,
)
