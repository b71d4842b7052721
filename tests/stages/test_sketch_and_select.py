"""Sketch and select on a tiny real model, against autograd and a NumPy re-derivation."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from congrad_ray.config.profile import Profile
from congrad_ray.config.recipe import Recipe, Select, Sketch
from congrad_ray.config.settings import validate
from congrad_ray.data.tables import FAILURE, row_id, table_of
from congrad_ray.modeling.source import ModelSource
from congrad_ray.pipeline.runner import run_stage
from congrad_ray.rundir.directory import RunDirectory, StageFolder
from congrad_ray.rundir.ids import Ids
from congrad_ray.runtime.rows import MissingRows
from congrad_ray.stages.pair.schema import PAIRS
from congrad_ray.stages.select import stage as select
from congrad_ray.stages.select.keep import keep_pairs
from congrad_ray.stages.select.scores import Agreement, score_of
from congrad_ray.stages.select.selection import SelectionError, select_pairs
from congrad_ray.stages.select.shares import moving_average_shares
from congrad_ray.stages.select.streaming import StreamedSketches
from congrad_ray.stages.select.sums import Layout, sums_of
from congrad_ray.stages.sketch.replicas import ReplicaSpec, SketchReplica
from congrad_ray.stages.sketch.schema import sketch_bytes, sketch_numbers, sketches_schema
from congrad_ray.stages.sketch.stage import _drawn_for_audit

pytestmark = pytest.mark.usefixtures("shared_ray")
WIDTH = 256


def recipe_for(model: Path, **sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "test",
        "model": {"name": str(model), "dtype": "float32", "max_length": 64},
        "prompts": {"languages": ["en", "de"]},
        "generate": {"max_tokens": 16},
        "judge": {"max_tokens": 16},
        "evaluate": {"max_tokens": 16},
        "sketch": {"width": WIDTH, "dtype": "float32", "max_tokens_per_batch": 256},
        "train": {"beta": 0.2, "length_penalty": 0.01},
    }
    return validate(Recipe, values | sections, "test")


def pair(number: int, prompt: str, chosen: str, rejected: str, language: str = "en") -> dict[str, Any]:
    def message(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return {
        "pair_id": f"pair-{number}",
        "prompt_id": f"prompt-{number}",
        "language": language,
        "prompt": message("user", prompt),
        "chosen": message("assistant", chosen),
        "rejected": message("assistant", rejected),
        "chosen_score": 4.0,
        "rejected_score": 1.0,
        "chosen_response_id": "a",
        "rejected_response_id": "b",
    }


ROWS = [
    pair(0, "How are you?", "Fine, the fox is quick.", "The dog"),
    pair(1, "Wie geht es dir?", "Der Fuchs ist schnell.", "Faul", "de"),
    pair(2, "2 + 2", "4", "5 6 7 8 9 0 1 2 3"),
    pair(3, "x", "too long " * 40, "y"),
    pair(4, "same", "word", "word"),
]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_replica_writes_the_sketch_of_autograds_gradient(tiny_model: Path, dtype: str) -> None:
    import torch

    from congrad_ray.modeling.batching import collate_pairs
    from congrad_ray.modeling.tokenization import tokenize_pair
    from congrad_ray.stages.sketch.countsketch import CountSketch
    from congrad_ray.stages.sketch.exact import pair_gradient

    recipe = recipe_for(tiny_model, sketch={"width": WIDTH, "dtype": dtype, "max_tokens_per_batch": 256})
    source = ModelSource(str(tiny_model), recipe.model)
    replica = SketchReplica(ReplicaSpec(source, recipe), audited=Ids.from_parts([["pair-0"]]))
    table = replica(table_of(ROWS, PAIRS))
    found = table.to_pylist()
    assert [row["pair_id"] for row in found] == [row["pair_id"] for row in ROWS]
    assert [row[FAILURE] and row[FAILURE]["reason"] for row in found] == [
        None,
        None,
        None,
        "pair_too_long",
        "cannot_tokenize",
    ]
    good = table_of(found[:3], sketches_schema(WIDTH, dtype))
    numbers = sketch_numbers(good, dtype)
    assert numbers.dtype == np.float32
    tolerance = {"float32": 1e-5, "float16": 1e-3, "int8": 0.02}[dtype]
    tokenizer, model = source.load_tokenizer(), source.load_model("cpu")
    whole = []
    for row, result, sketch in zip(ROWS[:3], found, numbers, strict=False):
        tokens = tokenize_pair(tokenizer, row["prompt"], row["chosen"], row["rejected"], 64)
        batch = collate_pairs([tokens], 2, "cpu")
        exact = pair_gradient(model, batch)
        whole.append(torch.cat([values.flatten() for values in exact.values()]).double().numpy())
        expected = CountSketch(WIDTH, recipe.sketch.seed).sketch_vector(exact).numpy()
        assert np.linalg.norm(sketch - expected) <= tolerance * np.linalg.norm(expected)
        assert result["norm"] == pytest.approx(np.linalg.norm(whole[-1]), rel=1e-5)
        longer = len(tokens.chosen_ids) - len(tokens.rejected_ids)
        assert result["coefficient"] == pytest.approx(0.2 / (1 + np.exp(0.01 * longer)), rel=1e-6)
        counts = [len(tokens.prompt_ids), len(tokens.chosen_ids), len(tokens.rejected_ids)]
        assert [result[f"{name}_tokens"] for name in ("prompt", "chosen", "rejected")] == counts
        assert result["positions"] == sum(counts)
    for vectors, column in ((np.stack(whole), "audit_exact"), (numbers.astype(float), "audit_sketched")):
        for index, result in enumerate(found[:3]):
            others = vectors[[other for other in range(3) if other != index]].mean(axis=0)
            cosine = vectors[index] @ others / np.linalg.norm(vectors[index]) / np.linalg.norm(others)
            assert result[column] == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize("most_positions", [60, 30, 1])
def test_a_micro_batch_that_does_not_fit_the_memory_is_done_in_halves(
    tiny_model: Path, most_positions: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A backward pass that runs out of memory when more positions than these reach it."""
    import torch

    recipe = recipe_for(tiny_model)
    source = ModelSource(str(tiny_model), recipe.model)
    table = table_of([pair(n, f"Count to {n}", "1 2 3 4 5 6", "fox", "en") for n in range(6)], PAIRS)
    whole = SketchReplica(ReplicaSpec(source, recipe))(table)
    replica = SketchReplica(ReplicaSpec(source, recipe))
    positions: list[int] = []

    def fill_memory(gradient: torch.Tensor) -> None:
        positions.append(gradient.shape[-2])
        if gradient.shape[-2] > most_positions:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def after(module: object, inputs: object, output: Any) -> None:
        (output[0] if isinstance(output, tuple) else output).register_hook(fill_memory)

    replica.capture.model.get_submodule("model.layers.0").register_forward_hook(after)
    found = replica(table)
    if most_positions == 1:
        failures = [row[FAILURE] for row in found.to_pylist()]
        assert {failure["reason"] for failure in failures} == {"out_of_memory"}
        assert "Tried to allocate 2.00 GiB" in failures[0]["detail"]
        return
    assert max(positions) > most_positions >= positions[-1]
    assert "did not fit into memory; the limit is now" in caplog.text
    columns = [table_of(rows.to_pylist(), sketches_schema(WIDTH, "float32")) for rows in (whole, found)]
    np.testing.assert_allclose(*(sketch_numbers(rows, "float32") for rows in columns), rtol=1e-4, atol=1e-5)
    calls = len(positions)
    replica(table)
    assert max(positions[calls:]) <= most_positions, "later micro-batches are smaller from the start"


def sketch_table(rows: list[dict[str, Any]]) -> pa.Table:
    stored = [{**row, "sketch": sketch_bytes(row["sketch"][None])[0]} for row in rows]
    return table_of(stored, sketches_schema(WIDTH, "float32"))


def write_sketches(folder: StageFolder, count: int, seed: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    shift = {"en": generator.normal(size=WIDTH), "de": generator.normal(size=WIDTH)}
    rows = [
        {
            "pair_id": f"pair-{number:03}",
            "language": language,
            "sketch": (generator.normal(size=WIDTH) + shift[language]).astype(np.float32),
            "sketch_scale": 1.0,
            "norm": 1.0,
            "coefficient": float(generator.uniform(0.01, 0.2)),
            "chosen_logps": -float(number),
            "rejected_logps": -float(number) - 1,
            "prompt_tokens": 3,
            "chosen_tokens": 4,
            "rejected_tokens": 5 + number,
            "positions": 12 + number,
            "attention_padding": 0,
            "audit_exact": None,
            "audit_sketched": None,
        }
        for number in range(count)
        for language in [("en", "de")[number % 2]]
    ]
    for start in range(0, count, 7):
        folder.write_table(f"part-{start}.parquet", sketch_table(rows[start : start + 7]))
    folder.commit("sketch", 0, "sketches", None, {}, count, 0.0, {})
    return rows


def test_selection_equals_a_direct_derivation(tmp_path: Path, tiny_model: Path) -> None:
    run = RunDirectory.open(tmp_path / "run")
    rows = write_sketches(run.stage("sketches", 0), 40, seed=1)
    pairs = run.stage("pairs", 0)
    pairs.write_table(
        "pairs.parquet",
        table_of([{**pair(0, "p", "c", "r", row["language"]), "pair_id": row["pair_id"]} for row in rows], PAIRS),
    )
    pairs.commit("pair", 0, "pairs", None, {}, 40, 0.0, {})
    recipe = recipe_for(tiny_model, select={"keep": 0.3, "seed": 5})
    run_stage(select.STAGE, recipe, Profile(name="test"), run)

    gradients = {}
    for language in ("de", "en"):
        members = [row for row in rows if row["language"] == language]
        gradients[language] = np.mean(
            [row["coefficient"] * row["sketch"].astype(float) for row in members], axis=0
        )
    # Two languages have one order only: each is projected against the other's original gradient.
    de, en = gradients["de"], gradients["en"]
    inner = de @ en
    direction = (de - min(inner / (en @ en), 0) * en) + (en - min(inner / (de @ de), 0) * de)
    expected = {
        row["pair_id"]: row["sketch"] @ direction / np.linalg.norm(row["sketch"]) / np.linalg.norm(direction)
        for row in rows
    }
    folder = run.stage("selection", 0)
    scores = folder.read_table(name="scores.parquet").to_pylist()
    for row in scores:
        assert row["cosine"] == pytest.approx(expected[row["pair_id"]], abs=1e-6)
    for language in ("de", "en"):
        ranked = sorted((r for r in scores if r["language"] == language), key=lambda r: -r["cosine"])
        assert [row["kept"] for row in ranked] == [True] * 6 + [False] * 14
    selected = folder.read_table(name="selected.parquet").to_pylist()
    assert {row["pair_id"] for row in selected} == {row["pair_id"] for row in scores if row["kept"]}
    for row in selected:
        number = int(row["pair_id"].split("-")[1])
        assert (row["ref_chosen_logps"], row["ref_rejected_logps"]) == (-number, -number - 1)
        assert row["congrad_score"] == pytest.approx(expected[row["pair_id"]], abs=1e-6)
        assert (row["prompt_tokens"], row["chosen_tokens"], row["rejected_tokens"]) == (3, 4, 5 + number)
        assert (row["chosen_score"], row["rejected_score"]) == (4.0, 1.0)
    summary = json.loads(folder.read_bytes("summary.json"))
    cosine = inner / np.linalg.norm(de) / np.linalg.norm(en)
    assert summary["cosine_before"][0][1] == pytest.approx(cosine, abs=1e-6)
    assert summary["per_language"]["en"]["kept"] == 6


@pytest.fixture(scope="module")
def sketched(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """40 pairs with judge's scores and lengths that differ."""
    run = RunDirectory.open(tmp_path_factory.mktemp("sketched") / "run")
    rows = write_sketches(run.stage("sketches", 0), 40, seed=1)
    generator = np.random.default_rng(4)
    pairs = [
        {
            **pair(0, "p", "c", "r", row["language"]),
            "pair_id": row["pair_id"],
            "chosen_score": float(generator.uniform(2, 5)),
        }
        for row in rows
    ]
    folder = run.stage("pairs", 0)
    folder.write_table("pairs.parquet", table_of(pairs, PAIRS))
    folder.commit("pair", 0, "pairs", None, {}, 40, 0.0, {})
    return run


def selected(run: RunDirectory, tiny_model: Path, **settings: Any) -> tuple[dict[str, dict[str, Any]], Any]:
    """scores.parquet by id and summary.json after a selection with `settings`; nothing else is done again."""
    before = {path: run.filesystem.get_file_info(path).mtime_ns for path in run.stage("sketches", 0).files()}
    sections: dict[str, Any] = {"select": settings}
    if settings.get("per_block"):
        sections["sketch"] = {"width": WIDTH, "dtype": "float32", "groups": 4}
    recipe = recipe_for(tiny_model, **sections)
    run_stage(select.STAGE, recipe, Profile(name="test"), run, redo=True)
    assert before == {path: run.filesystem.get_file_info(path).mtime_ns for path in before}
    folder = run.stage("selection", 0)
    scores = {row["pair_id"]: row for row in folder.read_table(name="scores.parquet").to_pylist()}
    kept = folder.read_table(["pair_id", "congrad_score"], name="selected.parquet").to_pylist()
    assert {row["pair_id"]: row["congrad_score"] for row in kept} == {
        name: row["score"] for name, row in scores.items() if row["kept"]
    }
    return scores, json.loads(folder.read_bytes("summary.json"))


def kept_ids(scores: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, row in scores.items() if row["kept"]}


def test_a_baseline_that_reads_the_judges_scores(sketched: RunDirectory, tiny_model: Path) -> None:
    gaps = {
        row["pair_id"]: row["chosen_score"] - row["rejected_score"]
        for row in sketched.stage("pairs", 0).read_table().to_pylist()
    }
    by_gap, summary = selected(sketched, tiny_model, strategy="reward_gap", keep_rule="overall", keep=0.25)
    assert kept_ids(by_gap) == set(sorted(gaps, key=lambda name: -gaps[name])[:10])
    assert summary["settings"]["strategy"] == "reward_gap"
    with pytest.raises(SelectionError, match=r"no pair is kept: select\.threshold left none of 40"):
        selected(sketched, tiny_model, keep_rule="threshold", threshold=2.0)


def test_training_gets_the_scores_that_it_weighs_by(sketched: RunDirectory, tiny_model: Path) -> None:
    recipe = recipe_for(tiny_model, train={"margin_weighting": True})
    run_stage(select.STAGE, recipe, Profile(name="test"), sketched, redo=True)
    kept = sketched.stage("selection", 0).read_table(name="selected.parquet").to_pylist()
    of_pairs = {row["pair_id"]: row for row in sketched.stage("pairs", 0).read_table().to_pylist()}
    assert len(kept) == 20
    for row in kept:
        for name in ("chosen_score", "rejected_score"):
            assert row[name] == of_pairs[row["pair_id"]][name]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strategy": "reward_gap", "keep_rule": "overall", "keep": 0.25},
        {"strategy": "random", "keep_rule": "token_budget", "token_budget": 200},
        {"strategy": "no_surgery", "keep_rule": "threshold"},
        {"direction": "mgda", "score": "worst_cosine", "language_weights": {"de": 2.0}},
        {"direction": "gradvac", "leave_out": "pair", "language_gradient": "ema", "ema_batch_size": 6},
        {"per_block": True, "leave_out": "language"},
        {"direction": "raco", "score": "dot", "band": "middle", "language_weights": {"de": 2.0}},
        {"strategy": "rip"},
    ],
    ids=str,
)
def test_a_table_in_memory_gives_what_the_stage_gives(
    sketched: RunDirectory, tiny_model: Path, settings: dict[str, Any]
) -> None:
    streamed, summary = selected(sketched, tiny_model, **settings)
    table = sketched.stage("sketches", 0).read_table()
    judged = sketched.stage("pairs", 0).read_table()
    rows = pc.index_in(table["pair_id"], value_set=judged["pair_id"].combine_chunks())
    for name in ("chosen_score", "rejected_score"):
        table = table.append_column(name, judged[name].take(rows))
    sketch = Sketch(width=WIDTH, dtype="float32", groups=4 if settings.get("per_block") else 1)
    found = select_pairs(validate(Select, settings, "select"), table, sketch)
    assert len(found.scores) == len(streamed) == 40
    for row in found.scores.to_pylist():
        expected = streamed[row["pair_id"]]
        assert (row["language"], row["kept"]) == (expected["language"], expected["kept"])
        for name in ("score", "cosine", "dot", "worst_cosine", "own_cosine"):
            assert row[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-12)
    said = found.summary()
    assert said["languages"] == summary["languages"] and said["settings"] == summary["settings"]
    for language in ("de", "en"):
        assert said["per_language"][language] == pytest.approx(summary["per_language"][language])
    for when in ("cosine_before", "cosine_after"):
        np.testing.assert_allclose(said[when], summary[when], atol=1e-9)
    assert said["order_spread"] == pytest.approx(summary["order_spread"])


def test_strategies_and_keep_rules_go_by_the_same_products(sketched: RunDirectory) -> None:
    pairs = sketched.stage("sketches", 0).read_table().sort_by("pair_id").combine_chunks()
    lengths = [pairs[name].to_numpy() for name in ("chosen_tokens", "rejected_tokens")]
    random = np.random.default_rng(0)
    found = Agreement(*(random.permutation(np.linspace(-0.5, 0.9, 40)) for _ in range(4)))
    expected = {
        "congrad": found.cosine,
        "no_surgery": found.cosine,
        "own_language": found.own_cosine,
        "length_balanced": -np.abs(lengths[0] - lengths[1]) / (lengths[0] + lengths[1]),
    }
    for strategy, scores in expected.items():
        settings = Select(strategy=strategy)  # type: ignore[arg-type]
        np.testing.assert_allclose(score_of(settings, pairs, found), scores)
    for name in ("cosine", "dot", "worst_cosine"):
        scores = score_of(Select(score=name), pairs, found)  # type: ignore[arg-type]
        np.testing.assert_array_equal(scores, getattr(found, name))
    chance = [score_of(Select(strategy="random", seed=seed), pairs, found) for seed in (3, 3, 4)]
    np.testing.assert_array_equal(chance[0], chance[1])
    assert not np.array_equal(chance[0], chance[2])

    def kept(**settings: Any) -> np.ndarray:
        return keep_pairs(Select(**settings), found.cosine, pairs)

    german = np.array(pairs["language"].to_pylist()) == "de"
    assert kept(strategy="all", keep=0.1).all()
    assert (kept(keep=0.25)[german].sum(), kept(keep=0.25)[~german].sum()) == (5, 5)
    np.testing.assert_array_equal(kept(keep_rule="overall"), found.cosine > np.median(found.cosine))
    np.testing.assert_array_equal(kept(keep_rule="threshold", threshold=0.3), found.cosine > 0.3)
    place = pairs.schema.get_field_index("rejected_tokens")
    pairs = pairs.set_column(place, pairs.schema.field(place), pa.array([5] * len(pairs), pa.int32()))
    budget = kept(keep_rule="token_budget", token_budget=125)  # 12 tokens each
    assert set(np.flatnonzero(budget)) == set(np.argsort(-found.cosine)[:10])


def test_moving_averages_and_weights(sketched: RunDirectory, tiny_model: Path) -> None:
    rows = sorted(sketched.stage("sketches", 0).read_table().to_pylist(), key=lambda row: row["pair_id"])
    vectors = np.stack([np.frombuffer(row["sketch"], np.float32).astype(float) for row in rows])
    vectors *= np.array([row["coefficient"] for row in rows])[:, None]
    languages = np.array([row["language"] for row in rows])
    settings = {
        "language_gradient": "ema",
        "ema_decay": 0.5,
        "ema_batch_size": 6,
        "seed": 2,
        "language_weights": {"de": 3.0},
        "direction": "sum",
    }
    scores, _ = selected(sketched, tiny_model, **settings)
    direction = np.zeros(WIDTH)
    for language, weight in (("de", 3.0), ("en", 1.0)):
        shares = moving_average_shares(20, 0.5, 6, 2)
        direction += weight * shares @ vectors[languages == language]
    for row, vector in zip(rows, vectors, strict=True):
        expected = vector @ direction / np.linalg.norm(vector) / np.linalg.norm(direction)
        assert scores[row["pair_id"]]["cosine"] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(SelectionError, match="language_weights names fr; the pairs are in de, en"):
        selected(sketched, tiny_model, language_weights={"fr": 2.0})
    with pytest.raises(SelectionError, match=r"no language has select.min_pairs \(21\) pairs: de \(20\), en"):
        selected(sketched, tiny_model, min_pairs=21)


def test_the_gradient_of_a_language_whose_judges_disagree_counts_less(
    sketched: RunDirectory, tiny_model: Path
) -> None:
    judging = sketched.stage("judgements", 0)
    agreement = {tag: {"tau": tau, "prompts": 9, "left_out": 0} for tag, tau in (("de", 0.2), ("fr", -1.0))}
    judging.commit("judge", 0, "judgements", None, {}, 1, 0.0, {"agreement": agreement})
    weighted, _ = selected(sketched, tiny_model, language_weights={"de": 0.5 * 0.2})
    also = [{"model": str(tiny_model), "max_tokens": 16}]
    judge = {"max_tokens": 16, "also": also, "min_agreement": 0.5, "disagreement": "weight"}
    recipe = recipe_for(tiny_model, select={"language_weights": {"de": 0.5}}, judge=judge)
    run_stage(select.STAGE, recipe, Profile(name="test"), sketched, redo=True)
    folder = sketched.stage("selection", 0)
    found = {row["pair_id"]: row for row in folder.read_table(name="scores.parquet").to_pylist()}
    assert {name: row["score"] for name, row in found.items()} == {
        name: row["score"] for name, row in weighted.items()
    }
    kept = recipe.model_copy(update={"judge": recipe.judge.model_copy(update={"disagreement": "keep"})})
    assert select.STAGE.settings(kept, 0) == kept.select.model_dump(mode="json")
    assert select.STAGE.settings(recipe, 0) != select.STAGE.settings(kept, 0)


def test_a_setting_that_does_not_fit_the_pairs_leaves_no_claim(tmp_path: Path, tiny_model: Path) -> None:
    run = RunDirectory.open(tmp_path / "run")
    write_sketches(run.stage("sketches", 0), 20, seed=1)
    run.stage("pairs", 0).commit("pair", 0, "pairs", None, {}, 20, 0.0, {})
    wrong = recipe_for(tiny_model, select={"language_weights": {"fr": 2.0}})
    with pytest.raises(SelectionError, match="language_weights names fr; the pairs are in de, en"):
        run_stage(select.STAGE, wrong, Profile(name="test"), run)
    assert not run.stage("selection", 0).exists()


def test_a_language_below_the_floor_takes_no_part_and_is_named(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory.open(tmp_path / "run")
    rows = write_sketches(run.stage("sketches", 0), 41, seed=1)  # 21 en, 20 de
    folder = run.stage("pairs", 0)
    table = [{**pair(0, "p", "c", "r", row["language"]), "pair_id": row["pair_id"]} for row in rows]
    folder.write_table("pairs.parquet", table_of(table, PAIRS))
    folder.commit("pair", 0, "pairs", None, {}, 41, 0.0, {})
    recipe = recipe_for(tiny_model, select={"min_pairs": 21})
    run_stage(select.STAGE, recipe, Profile(name="test"), run)
    lines = caplog.messages
    assert any("fewer than select.min_pairs (21) pairs" in line and line.endswith("de (20)") for line in lines)
    english = np.mean([row["coefficient"] * row["sketch"] for row in rows if row["language"] == "en"], axis=0)
    for row in run.stage("selection", 0).read_table(name="scores.parquet").to_pylist():
        sketch = rows[int(row["pair_id"].split("-")[1])]["sketch"]
        expected = sketch @ english / np.linalg.norm(sketch) / np.linalg.norm(english)
        assert row["cosine"] == pytest.approx(expected, abs=1e-6)


def test_the_order_of_parts_makes_no_difference(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = write_sketches(RunDirectory.open(tmp_path / "a").stage("sketches", 0), 21, seed=2)
    other = RunDirectory.open(tmp_path / "b").stage("sketches", 0)
    shuffled = [rows[i] for i in generator.permutation(len(rows))]
    other.write_table("part.parquet", sketch_table(shuffled))
    layout = Layout(("de", "en"), 1, "float32", exact=False)
    found = []
    for name in ("a", "b"):
        folder = RunDirectory.open(tmp_path / name).stage("sketches", 0)
        pairs = folder.read_table(["pair_id", "language"]).sort_by("pair_id")
        found.append(StreamedSketches(folder, layout, pairs, np.ones(len(rows))).language_gradients())
    np.testing.assert_array_equal(*found)
    direct = sums_of(sketch_table(rows), layout, np.ones(len(rows))).astype(np.float32)
    np.testing.assert_array_equal(found[0], direct)


@pytest.mark.parametrize(("pairs", "drawn"), [(8, 0), (40, 1), (80, 2), (400, 4)])
def test_audits_stay_within_their_share_of_the_micro_batches(tiny_model: Path, pairs: int, drawn: int) -> None:
    recipe = recipe_for(tiny_model, sketch={"width": WIDTH, "audit_pairs": 32, "max_tokens_per_batch": 1000})
    ids = [f"pair-{number:03}" for number in range(pairs)]
    all_of_them = Ids.from_parts([ids])
    # 150 tokens of four bytes each
    missing = MissingRows(None, pairs, 1, all_of_them, ["en"], pa.schema([]), 600 * pairs)
    found = _drawn_for_audit(recipe, missing, "cpu")
    assert len(found) == drawn == found.contains(ids).sum()


def test_the_audited_pairs_are_those_drawn_from_the_sorted_ids(tiny_model: Path) -> None:
    recipe = recipe_for(tiny_model, sketch={"width": WIDTH, "audit_pairs": 32, "max_tokens_per_batch": 1000})
    ids = [row_id("pair", number) for number in range(400)]
    missing = MissingRows(None, 400, 1, Ids.from_parts([ids]), ["en"], pa.schema([]), 600 * 400)
    by_hand = random.Random(recipe.sketch.seed).sample(sorted(ids), 4)
    assert _drawn_for_audit(recipe, missing, "cpu") == Ids.from_parts([by_hand])


def test_the_memory_probe_is_left_out_where_memory_is_plenty(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = []
    for free in (2**40, 2**20):
        monkeypatch.setattr("congrad_ray.stages.sketch.memory.free_memory", lambda device, free=free: free)
        try:
            recipe = recipe_for(tiny_model)
            SketchReplica(ReplicaSpec(ModelSource(str(tiny_model), recipe.model), recipe))
        except ValueError:  # a megabyte is too little for any pair
            assert free == 2**20
        said.append("measuring the memory" in caplog.text)
        caplog.clear()
    assert said == [False, True]
