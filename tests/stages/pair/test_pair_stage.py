"""The pair stage against a plain re-derivation, whatever parts the responses are in."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import validate
from congrad_ray.data.records import InputError
from congrad_ray.data.tables import row_id, table_of
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.runtime.context import Context, Outcome
from congrad_ray.stages.generate.schema import RESPONSES
from congrad_ray.stages.judge.schema import JUDGEMENTS
from congrad_ray.stages.pair import pairing
from congrad_ray.stages.pair import stage as pair
from congrad_ray.stages.pair.schema import PAIRS

PROMPTS, SAMPLES = 40, 3


def rows(scores: dict[tuple[int, int], float | None]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Responses of all prompts, and judgements of those that have one in `scores`."""
    keys = [(prompt, sample) for prompt in range(PROMPTS) for sample in range(SAMPLES)]
    about = {
        key: {"response_id": f"{key[0]:04}-{key[1]}", "prompt_id": f"{key[0]:04}", "language": _language(key[0])}
        for key in keys
    }
    responses = [
        {
            **about[key],
            "prompt": [{"role": "user", "content": f"say {key[0]}"}],
            "sample": key[1],
            "seed": 0,
            "response": f"{key[0]} {key[1]}",
            "prompt_tokens": 1,
            "response_tokens": 1,
            "truncated": False,
        }
        for key in keys
    ]
    judgements = [
        {**about[key], "score": score, "readable": 1, "asked": 1, "outputs": [""]} for key, score in scores.items()
    ]
    return responses, judgements


def _language(prompt: int) -> str:
    return ("en", "de")[prompt % 2]


def paired(
    folder: Path,
    responses: list[dict[str, Any]],
    judgements: list[dict[str, Any]],
    parts: int,
    check: bool = False,
) -> Context:
    run = RunDirectory.open(folder)
    for name, table, schema in (("responses", responses, RESPONSES), ("judgements", judgements, JUDGEMENTS)):
        size = -(-len(table) // parts)
        for part in range(parts):
            some = table[part * size : (part + 1) * size]
            run.stage(name, 0).write_table(f"part-{part}.parquet", table_of(some, schema))
    values = {"name": "t", "prompts": {"languages": ["en", "de"]}, "pair": {"language_check": check}}
    return Context(validate(Recipe, values, "t"), Profile(name="t"), run, 0, run.stage("pairs", 0))


def test_best_against_worst_whatever_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "_ROWS_AT_A_TIME", 7)
    chance = random.Random(0)
    scores: dict[tuple[int, int], float | None] = {
        (prompt, sample): chance.choice([None, 0.0, 1.5, 3.0, 5.0])
        for prompt in range(PROMPTS)
        for sample in range(SAMPLES)
        if chance.random() < 0.95  # of the others the judgement is missing
    }
    responses, judgements = rows(scores)
    expected = {}
    for prompt in range(PROMPTS):
        readable = [(score, s) for s in range(SAMPLES) if (score := scores.get((prompt, s))) is not None]
        best = max(readable, key=lambda found: (found[0], -found[1]), default=None)
        others = [found for found in readable if found is not best]
        worst = min(others, default=None)
        if best and worst and best[0] > worst[0]:
            expected[f"{prompt:04}"] = (f"{prompt} {best[1]}", f"{prompt} {worst[1]}", best[0], worst[0])
    context = paired(tmp_path / "in order", responses, judgements, 1)
    outcome = pair.STAGE.run(context)
    found = pq.read_table(context.output.files(".parquet")[0])
    assert found["prompt_id"].to_pylist() == sorted(expected)
    assert {
        row["prompt_id"]: (
            row["chosen"][0]["content"],
            row["rejected"][0]["content"],
            row["chosen_score"],
            row["rejected_score"],
        )
        for row in found.to_pylist()
    } == expected
    assert outcome.rows == len(expected) == sum(outcome.counters["pairs"].values())
    assert outcome.rows + sum(outcome.counters["no_pair"].values()) == PROMPTS
    chance.shuffle(responses)
    chance.shuffle(judgements)
    elsewhere = paired(tmp_path / "shuffled", responses, judgements, 11)
    assert pair.STAGE.run(elsewhere).counters == outcome.counters
    assert pq.read_table(elsewhere.output.files(".parquet")[0]).equals(found)


def test_not_one_pair_is_an_error_that_says_why(tmp_path: Path) -> None:
    context = paired(tmp_path, *rows({}), 2)
    with pytest.raises(InputError, match=r"not one pair from 40 prompts .*too_few_judged en.*: 20"):
        pair.STAGE.run(context)
    assert not context.output.files(), "so that other settings may begin"


def hashed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With ids as in a run, which spread the prompts over the buckets."""
    return [{**row, **{name: row_id(row[name]) for name in ("response_id", "prompt_id")}} for row in rows]


def in_buckets(
    folder: Path, monkeypatch: pytest.MonkeyPatch, by_disk: bool = False
) -> tuple[Outcome, pa.Table, Context]:
    """What pairing in one bucket gives, and the same responses to be paired in several."""
    chance = random.Random(1)
    keys = [(prompt, sample) for prompt in range(PROMPTS) for sample in range(SAMPLES)]
    responses, judgements = map(hashed, rows({key: chance.choice([None, 0.0, 1.5, 3.0]) for key in keys}))
    chance.shuffle(responses)
    one, several = (paired(folder / name, responses, judgements, 3) for name in ("one", "several"))
    outcome = pair.STAGE.run(one)
    assert len(one.output.files()) == 1 and outcome.rows
    monkeypatch.setattr(pair, "_ROWS_PER_BUCKET", 12)
    monkeypatch.setattr(pair, "_BY_DISK", 1 if by_disk else 1000)
    return outcome, one.output.read_table(), several


@pytest.mark.parametrize("by_disk", [False, True])
def test_several_buckets_give_what_one_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_disk: bool, shared_ray: None
) -> None:
    expected, table, several = in_buckets(tmp_path, monkeypatch, by_disk)
    assert pair.STAGE.run(several) == expected
    names = [Path(path).name for path in several.output.files()]
    assert names == [f"pairs-{bucket:05}-of-00010.parquet" for bucket in range(10)]
    assert several.output.read_table().equals(table)


def test_buckets_that_are_there_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_ray: None
) -> None:
    _, _, several = in_buckets(tmp_path, monkeypatch)
    outcome = pair.STAGE.run(several)
    parts = several.output.files()
    before = [Path(path).read_bytes() for path in parts]
    Path(parts[3]).unlink()
    Path(parts[5]).write_bytes(before[5][:-20])
    (several.output / "x").write_bytes("y", b"")
    several.output.write_table("pairs.parquet", PAIRS.empty_table())  # of an earlier version
    times = {path: Path(path).stat().st_mtime_ns for path in parts if path not in (parts[3], parts[5])}
    assert pair.STAGE.run(several) == outcome
    assert several.output.files() == parts and [Path(path).read_bytes() for path in parts] == before
    assert times == {path: Path(path).stat().st_mtime_ns for path in times}


@pytest.mark.parametrize("rows_per_bucket", [1, 7, 10**6])
def test_buckets_are_ranges_of_the_ids(rows_per_bucket: int) -> None:
    ids = sorted(row_id(number) for number in range(1000))
    number = -(-1000 // rows_per_bucket)
    buckets = pair._bucket_of(pa.chunked_array([ids]), number)
    assert (np.diff(buckets) >= 0).all() and buckets[0] >= 0 and buckets[-1] < number
    assert np.bincount(buckets).max() <= 5 * rows_per_bucket + 5


def test_wrong_and_unknown_languages_are_counted_apart_and_only_wrong_ones_never_chosen(tmp_path: Path) -> None:
    english = "The weather will be fine tomorrow in the whole country."
    german = "Das Wetter wird morgen im ganzen Land schön sein."
    responses, judgements = rows({(p, s): float(5 - s) for p in range(PROMPTS) for s in range(SAMPLES)})
    for number, response in enumerate(responses):
        right = {"en": english, "de": german}[response["language"]]
        # The best answer of a prompt is English, the second says nothing of its language.
        response["response"] = (english, "`x = 1`", right)[number % SAMPLES]
    context = paired(tmp_path, responses, judgements, 3, check=True)
    counters = pair.STAGE.run(context).counters
    assert counters["wrong_language"] == {"de": PROMPTS // 2}
    assert counters["unknown_language"] == {"de": PROMPTS // 2, "en": PROMPTS // 2}
    chosen = {row["language"]: row["chosen"][0]["content"] for row in context.output.read_table().to_pylist()}
    assert chosen == {"en": english, "de": "`x = 1`"}
