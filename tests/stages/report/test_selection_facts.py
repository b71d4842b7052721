"""What the report says of a selection, against numbers worked out another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, mannwhitneyu

from congrad_ray.config.recipe import Select
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.report.intervals import separation
from congrad_ray.stages.report.pairs import COLUMNS, pair_table
from congrad_ray.stages.report.selection import FATES, Scored, bin_edges, read_scored, selection_facts
from congrad_ray.stages.select.selection import select_pairs
from congrad_ray.stages.sketch.schema import sketch_bytes, sketches_schema

WIDTH = 32


def sketches(pairs: int = 120, seed: int = 0) -> pa.Table:
    """Pairs of three languages, the last of which pulls against the others."""
    random = np.random.default_rng(seed)
    common = random.normal(size=WIDTH)
    rows = []
    for number in range(pairs):
        language = ("de", "en", "sw")[number % 3]
        sign = -0.4 if language == "sw" else 1.0
        vector = (sign * common + 3 * random.normal(size=WIDTH)).astype(np.float32)
        rows.append(
            {
                "pair_id": f"{(number * 7919) % 100003:06d}",
                "language": language,
                "sketch": sketch_bytes(vector[None])[0],
                "sketch_scale": 1.0,
                "norm": float(np.linalg.norm(vector)),
                "coefficient": 0.05,
                "positions": 20,
                "attention_padding": 0,
                "audit_exact": None,
                "audit_sketched": None,
                "chosen_logps": -3.0,
                "rejected_logps": -4.0,
                "prompt_tokens": int(random.integers(4, 9)),
                "chosen_tokens": int(random.integers(4, 30)),
                "rejected_tokens": int(random.integers(4, 30)),
                "chosen_score": float(random.uniform(2, 5)),
                "rejected_score": float(random.uniform(0, 3)),
            }
        )
    schema = sketches_schema(WIDTH, "float32")
    judged = [pa.field(name, pa.float32()) for name in ("chosen_score", "rejected_score")]
    names = [field for field in schema if field.name in rows[0]]
    return pa.Table.from_pylist(rows, pa.schema([*names, *judged], metadata=schema.metadata))


def scored(how: Select, table: pa.Table) -> Scored:
    found = select_pairs(how, table).scores
    by_id = table.sort_by("pair_id")
    for name in ("prompt_tokens", "chosen_tokens", "rejected_tokens", "chosen_score", "rejected_score"):
        found = found.append_column(name, by_id[name])
    named = how.score if how.strategy == "congrad" else how.strategy
    return Scored(found.combine_chunks(), how, named)


def facts_of(how: Select, table: pa.Table) -> Any:
    return selection_facts(scored(how, table), select_pairs(how, table).summary(), None)


HOWS = [
    Select(),
    Select(keep=0.9),
    Select(keep_rule="overall", keep=0.3),
    Select(keep_rule="threshold", threshold=0.1),
    Select(keep_rule="token_budget", token_budget=600),
    Select(score="worst_cosine"),
    Select(strategy="reward_gap"),
    Select(strategy="random"),
    Select(strategy="all"),
]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: f"{how.strategy} {how.score} {how.keep_rule} {how.keep}")
def test_every_pair_is_kept_or_dropped_for_one_reason(how: Select) -> None:
    table = sketches()
    rows = select_pairs(how, table).scores.to_pylist()
    facts = facts_of(how, table)
    by_cosine = how.strategy in ("congrad", "all")
    for found in facts.languages:
        mine = [row for row in rows if found.language in (row["language"], "*")]
        below = [row["score"] if by_cosine else row["cosine"] for row in mine]
        dropped = [value for value, row in zip(below, mine, strict=True) if not row["kept"]]
        assert found.pairs == len(mine) == found.kept + found.quota + found.conflict
        assert found.conflict == sum(value < 0 for value in dropped)
        assert found.kept_in_conflict == sum(v < 0 and r["kept"] for v, r in zip(below, mine, strict=True))
        assert found.opposing == sum(row["worst_cosine"] < 0 for row in mine)
        assert found.threshold == min((row["score"] for row in mine if row["kept"]), default=None)
        for fate, count in zip(FATES, (found.kept, found.quota, found.conflict), strict=True):
            assert sum(found.bins[fate]) == count
    # A rule by score drops what is below the threshold of the language, or of all.
    if how.strategy != "all":
        for row in rows:
            of = (
                facts.all
                if how.keep_rule != "per_language"
                else next(found for found in facts.languages if found.language == row["language"])
            )
            if of.threshold is not None:
                assert row["kept"] == (row["score"] >= of.threshold)


@pytest.mark.parametrize("strategy", ["own_language", "reward_gap", "length_balanced", "length_gap", "random"])
@pytest.mark.parametrize("how", [Select(), Select(keep_rule="token_budget", token_budget=600)])
def test_the_overlap_with_another_strategy_is_that_of_its_own_selection(how: Select, strategy: str) -> None:
    table = sketches()
    other = select_pairs(how.model_copy(update={"strategy": strategy}), table)
    mine = select_pairs(how, table)
    found = dict(facts_of(how, table).agreement)[strategy]
    assert found.kept_both == int((mine.kept & other.kept).sum())
    assert (found.kept_first, found.kept_second) == (int(mine.kept.sum()), int(other.kept.sum()))


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_bins_cover_all_scores_and_have_an_edge_at_zero(values: list[float]) -> None:
    edges = bin_edges(np.array(values))
    assert np.abs(edges).min() == 0.0
    assert edges[0] <= min(values) + 1e-9 and edges[-1] >= max(values) - 1e-9
    assert np.allclose(np.diff(edges), edges[1] - edges[0])
    assert len(edges) <= 60


def test_a_separation_is_mann_whitneys_and_its_interval_a_bootstraps() -> None:
    random = np.random.default_rng(3)
    values = np.concatenate([random.normal(0.5, 1, 150), random.normal(0, 1, 200)])
    first = np.arange(350) < 150
    found = separation(values, first, np.full(350, "de"))
    assert found is not None
    expected = mannwhitneyu(values[first], values[~first]).statistic / (150 * 200)
    assert found.chance == pytest.approx(expected)

    def chance(one: Any, two: Any) -> float:
        return float((one[:, None] > two).mean() + 0.5 * (one[:, None] == two).mean())

    samples = (values[first], values[~first])
    interval = bootstrap(samples, chance, n_resamples=400, vectorized=False, method="percentile", rng=0)
    assert (found.low, found.high) == pytest.approx(tuple(interval.confidence_interval), abs=0.015)


def test_a_separation_compares_within_a_language_only() -> None:
    # Within each language there is no difference; between them there is a large one.
    values = np.array([1.0, 2.0, 1.0, 2.0, 11.0, 12.0, 11.0, 12.0])
    first = np.array([True, True, False, False] * 2)
    strata = np.array(["a"] * 4 + ["b"] * 4)
    found = separation(values, first, strata)
    assert found is not None and found.chance == 0.5
    assert separation(values, np.zeros(8, dtype=bool), strata) is None
    weighted = separation(np.array([3.0, 4.0, 1.0, 2.0, *values[4:]]), first, strata)
    assert weighted is not None and weighted.chance == 0.75


def write_pairs(run: RunDirectory, table: pa.Table, length: int) -> None:
    rows = []
    for row in table.to_pylist():
        say = {
            name: [{"role": "user", "content": f"{name} of {row['pair_id']} " + "x" * length}]
            for name in ("prompt", "chosen", "rejected")
        }
        rows.append({"pair_id": row["pair_id"], "language": row["language"], **say})
    run.stage("pairs", 0).write_table("part.parquet", pa.Table.from_pylist(rows))


def test_all_pairs_are_there_where_they_fit(tmp_path: Path) -> None:
    table = sketches()
    run = RunDirectory.open(tmp_path)
    write_pairs(run, table, 10)
    found = pair_table(scored(Select(), table), run.stage("pairs", 0))
    assert found is not None and not found.sampled and len(found.rows) == 120
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in found.rows]
    expected = {row["pair_id"]: row for row in select_pairs(Select(), table).scores.to_pylist()}
    given = {row["pair_id"]: row for row in table.to_pylist()}
    for row in rows:
        identifier = row["prompt"].split()[2]
        assert row["language"] == expected[identifier]["language"]
        assert row["score"] == pytest.approx(expected[identifier]["score"], abs=1e-4)
        assert (FATES[row["fate"]] == "kept") == expected[identifier]["kept"]
        margin = given[identifier]["chosen_score"] - given[identifier]["rejected_score"]
        assert row["margin"] == pytest.approx(margin, abs=1e-3)
        assert row["chosen_tokens"] == given[identifier]["chosen_tokens"]


def test_of_too_many_pairs_there_is_a_sample_of_every_language_with_its_extremes(tmp_path: Path) -> None:
    import json

    table = sketches(600)
    run = RunDirectory.open(tmp_path)
    write_pairs(run, table, 5000)
    budget = 200 * 1024
    found = pair_table(scored(Select(), table), run.stage("pairs", 0), budget)
    assert found is not None and found.sampled and found.total == 600
    assert 0.9 * budget < len(json.dumps(found.rows, ensure_ascii=False).encode()) <= budget + 2
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in found.rows]
    counts = {(tag, kept): 0 for tag in ("de", "en", "sw") for kept in (True, False)}
    for row in rows:
        counts[row["language"], row["fate"] == 0] += 1
    assert max(counts.values()) - min(counts.values()) <= 2
    scores = select_pairs(Select(), table).scores.to_pylist()
    for tag in ("de", "en", "sw"):
        mine = [row["score"] for row in scores if row["language"] == tag]
        shown = [row["score"] for row in rows if row["language"] == tag]
        assert (min(shown), max(shown)) == pytest.approx((min(mine), max(mine)), abs=1e-4)
    assert all(len(row["prompt"]) < 1300 for row in rows)


def test_a_selection_without_a_score_is_none(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    assert read_scored(run.stage("selection", 0), run.stage("pairs", 0), run.stage("sketches", 0)) is None
