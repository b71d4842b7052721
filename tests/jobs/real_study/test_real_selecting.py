"""Flipping by the sign, draws, and what is said of a selection."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from congrad_ray.config.settings import SettingsError
from congrad_ray.modeling.batching import collate_pairs
from congrad_ray.modeling.source import named_model
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.select.selection import select_pairs
from congrad_ray.stages.sketch.replicas import ReplicaSpec, SketchReplica
from congrad_ray.stages.sketch.schema import sketch_numbers
from real_study.pairs import StudyDataError, tokenized_pairs
from real_study.protocol import KEYS, Planting, Protocol, Strategy, load_protocol, recipe_for
from real_study.selecting import choose, delong_error, facts, run_selection
from real_study.sketches import Draw, Sketched, block_grams, coordinates_of, draw, flip, read_sketched
from real_study.sketching import embedding_gradient, sketch_dataset
from study.results import Results

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = ROOT / "jobs" / "real_study" / "open_answer.jinja"
TURNED = ("chosen_logps", "rejected_logps", "chosen_tokens", "rejected_tokens")


def swapped(pairs: pa.Table) -> pa.Table:
    """The pairs whose files had them the other way round."""
    names = {"chosen": "rejected", "rejected": "chosen"}
    return pa.table({name: pairs[names.get(name, name)] for name in ("pair_id", "language", "prompt", *names)})


def test_a_flipped_label_is_the_sketch_with_another_sign(
    sketched_run: RunDirectory, protocol: Protocol, tiny_model: Path, sketched: Sketched
) -> None:
    recipe = recipe_for(protocol, str(tiny_model), TEMPLATE)
    replica = SketchReplica(ReplicaSpec(named_model(recipe.model.name, recipe.model), recipe))
    stored = (sketched_run / "alpaca" / "sketches").read_table().sort_by("pair_id")
    really = replica(swapped(sketched.pairs))
    before, after = (sketch_numbers(table, "int8") for table in (stored, really))
    np.testing.assert_allclose(after, -before, atol=2 * float(stored["sketch_scale"].to_numpy().max()))
    # As coordinates: the same inner products as those of the real sketches, some of them flipped and others not.
    some = np.arange(len(sketched.pairs)) % 3 == 0
    turned = flip(sketched, some)
    mixed = np.where(some[:, None], after, before)
    for found, block in zip(np.swapaxes(turned.coordinates(), 0, 1), np.split(mixed, 2, axis=1), strict=True):
        expected = block.astype(np.float64) @ block.T
        np.testing.assert_allclose(found @ found.T, expected, atol=0.02 * expected.max())
    for name in TURNED:
        column = np.where(some, really[name].to_numpy(), stored[name].to_numpy())
        np.testing.assert_allclose(turned.pairs[name].to_numpy(), column, rtol=1e-4)
    assert really["coefficient"].to_numpy() == pytest.approx(stored["coefficient"].to_numpy())
    for row, before_, is_flipped in zip(turned.pairs.to_pylist(), sketched.pairs.to_pylist(), some, strict=True):
        assert row["chosen"] == before_["rejected" if is_flipped else "chosen"]


def test_coordinates_select_as_the_sketches_do(
    sketched_run: RunDirectory, protocol: Protocol, sketched: Sketched
) -> None:
    stored = (sketched_run / "alpaca" / "sketches").read_table()
    for settings in (
        Strategy(),
        Strategy(direction="mgda", per_block=True),
        Strategy(leave_out="pair", score="dot"),
    ):
        of_sketches = select_pairs(settings, stored, protocol.sketch)
        of_coordinates = select_pairs(settings, sketched.pairs, sketched.sketch)
        for name in ("score", "cosine", "own_cosine", "worst_cosine"):
            one, other = (found.scores[name].to_numpy() for found in (of_sketches, of_coordinates))
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5 * np.abs(one).max())
    alone = sketched.of_blocks([1])
    numbers = sketch_numbers(stored.sort_by("pair_id"), "int8")[:, protocol.sketch.width // 2 :]
    [gram] = block_grams(alone.coordinates().reshape(len(numbers), -1), 1)
    np.testing.assert_allclose(gram, numbers.astype(np.float64) @ numbers.T, rtol=1e-3, atol=1e-4 * gram.max())


def test_coordinates_of_few_pairs_fill_a_sketch() -> None:
    vectors = np.random.default_rng(0).normal(size=(2, 5, 7))
    found = coordinates_of(vectors @ vectors.transpose(0, 2, 1))
    assert found.shape == (5, 2, 64)
    np.testing.assert_allclose(
        np.einsum("nbi,mbi->bnm", found, found), vectors @ vectors.transpose(0, 2, 1), rtol=1e-4
    )


def test_draws(sketched: Sketched) -> None:
    plantings = {count: Planting(languages=count, share=0.4) for count in (1, 2)}
    one, two = (draw(sketched, plantings[count], 0.75, 3) for count in (1, 2))
    again = draw(sketched, plantings[2], 0.75, 3)
    assert again.data.pairs.equals(two.data.pairs) and (again.flipped == two.flipped).all()
    ids = two.data.pairs["pair_id"].to_pylist()
    assert one.data.pairs["pair_id"].to_pylist() == ids == sorted(ids)
    assert set(one.planted) < set(two.planted) and len(two.planted) == 2
    others = {
        tuple(draw(sketched, plantings[2], 0.75, seed).data.pairs["pair_id"].to_pylist()) for seed in range(5)
    }
    assert len(others) == 5
    for language in ("de", "en", "es"):
        members = two.data.languages == language
        assert members.sum() == 6
        assert two.flipped[members].sum() == (2 if language in two.planted else 0)
    everywhere = draw(sketched, Planting(elsewhere=0.5), 1.0, 0)
    assert everywhere.planted == () and everywhere.flipped.sum() == 12


def test_verbosity_makes_the_longer_response_chosen(sketched_run: RunDirectory, protocol: Protocol) -> None:
    data = read_sketched(sketched_run, "tata", protocol.sketch.groups)
    drawn = draw(data, protocol.plantings["verbose"], 1.0, 0)
    [planted] = drawn.planted
    of = drawn.data.languages == planted
    chosen, rejected = (drawn.data.pairs[f"{side}_tokens"].to_numpy() for side in ("chosen", "rejected"))
    assert (chosen[of] >= rejected[of]).all() and 0 < drawn.flipped[of].sum() < of.sum()
    assert not drawn.flipped[~of].any() and (chosen[~of] < rejected[~of]).any()
    # The judge that gave the label gave it by its scores.
    assert (drawn.data.pairs["chosen_score"].to_numpy() > drawn.data.pairs["rejected_score"].to_numpy()).all()


def test_facts_of_a_selection(sketched: Sketched) -> None:
    drawn = draw(sketched, Planting(languages=2, share=0.5), 1.0, 1)
    right = facts(drawn, choose("oracle_overall", drawn, 0), ["overall"], 0.5)
    assert right["auc"] == right["auc_planted"] == right["auc_within"] == 1.0
    assert right["overall_flipped"] == 0.0
    assert 0.0 < facts(drawn, choose("oracle", drawn, 0), ["per_language"], 0.75)["per_language_flipped"] < 1 / 3
    found = choose(Strategy(), drawn, 0)
    said = facts(drawn, found, ["per_language", "threshold"], 0.5)
    kept = found.scores > 0
    assert said["threshold_kept"] == pytest.approx(kept.mean())
    assert said["threshold_flipped"] == pytest.approx(drawn.flipped[kept].mean())
    assert said["conflicting"] == pytest.approx((found.scores < 0).mean())
    flat = drawn.data.coordinates().reshape(len(drawn.flipped), -1).astype(np.float64)
    means = {name: flat[drawn.data.languages == name].mean(axis=0) for name in ("de", "en", "es")}
    units = {name: mean / np.linalg.norm(mean) for name, mean in means.items()}
    [healthy] = set(units) - set(drawn.planted)
    with_planted = [units[healthy] @ units[name] for name in drawn.planted]
    assert said["planted_cosine"] == pytest.approx(np.mean(with_planted), abs=1e-5)
    both = units[drawn.planted[0]] @ units[drawn.planted[1]]
    assert said["least_cosine"] == pytest.approx(min(*with_planted, both), abs=1e-5)
    assert said["healthy_cosine"] is None  # there is one such language
    clean = draw(sketched, Planting(), 1.0, 1)
    agree = choose(Strategy(), clean, 0).scores >= 0
    as_they_are = facts(clean, choose(Strategy(), clean, 0), ["per_language", "threshold"], 0.5)
    assert as_they_are["threshold_kept_agreeing"] == 1.0 and as_they_are["auc"] is None
    halves = as_they_are["per_language_kept_agreeing"] + as_they_are["per_language_dropped_agreeing"]
    assert halves / 2 == pytest.approx(agree.mean())
    assert facts(drawn, choose(Strategy(strategy="all"), drawn, 0), ["per_language"], 0.5)["auc"] is None
    one, other = (choose(Strategy(strategy="random"), drawn, seed).scores for seed in (0, 1))
    assert (one != other).all()


def test_error_of_an_auc_is_that_of_other_samples() -> None:
    generator = np.random.default_rng(0)

    def auc(higher: np.ndarray, lower: np.ndarray) -> float:
        return float((higher[:, None] > lower).mean())

    samples = [(generator.normal(1, 1, 60), generator.normal(0, 2, 40)) for _ in range(2000)]
    spread = np.std([auc(*sample) for sample in samples])
    assert np.mean([delong_error(*sample) for sample in samples]) == pytest.approx(spread, rel=0.05)  # type: ignore[misc]
    assert delong_error(np.ones(3), np.ones(1)) is None


def test_normalising_by_length_and_norm(sketched: Sketched) -> None:
    """The mean of unit gradients, and of gradients of means over tokens, by numbers."""
    flat = sketched.coordinates().reshape(len(sketched.pairs), -1).astype(np.float64)
    nothing = Draw(sketched, np.zeros(len(flat), np.bool_), ())
    factors = {
        "norm": 1 / sketched.pairs["norm"].to_numpy(),
        "tokens": 1 / sketched.pairs["chosen_tokens"].to_numpy(),
    }
    block = sketched.coordinates()[:, 1].astype(np.float64)
    direction = sum(
        (block / np.linalg.norm(block, axis=1)[:, None])[sketched.languages == language].mean(axis=0)
        for language in ("de", "en", "es")
    )
    expected = block @ direction / np.linalg.norm(block, axis=1) / np.linalg.norm(direction)
    of_block = Strategy(direction="mean", normalise="norm", blocks=[1])
    np.testing.assert_allclose(choose(of_block, nothing, 0).scores, expected, atol=1e-5)
    for normalise, factor in factors.items():
        direction = sum(
            (flat * factor[:, None])[sketched.languages == language].mean(axis=0)
            for language in ("de", "en", "es")
        )
        expected = flat @ direction / np.linalg.norm(flat, axis=1) / np.linalg.norm(direction)
        found = choose(Strategy(direction="mean", normalise=normalise), nothing, 0)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.scores, expected, atol=1e-5)


def test_embedding_gradient(protocol: Protocol, tiny_model: Path, sketched: Sketched) -> None:
    recipe = recipe_for(protocol, str(tiny_model), TEMPLATE)
    source = named_model(recipe.model.name, recipe.model)
    model = source.load_model("cpu")
    [pair] = tokenized_pairs(sketched.pairs.slice(0, 1), source.load_tokenizer(), 100)
    found = embedding_gradient(model, collate_pairs([pair], 0))
    total = torch.zeros(())
    for sign, answer in ((1, pair.chosen_ids), (-1, pair.rejected_ids)):
        logits = model(torch.tensor([pair.prompt_ids + answer])).logits[0, len(pair.prompt_ids) - 1 : -1]
        total = total + sign * logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
    expected = torch.autograd.grad(total, model.get_output_embeddings().weight)[0]
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_sketching_goes_on_with_the_pieces_that_are_missing(
    sketched_run: RunDirectory, protocol: Protocol, tiny_model: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(protocol, str(tiny_model), TEMPLATE)
    source = named_model(recipe.model.name, recipe.model)
    run = RunDirectory.open(tmp_path)
    (run / "alpaca").write_table("pairs.parquet", (sketched_run / "alpaca").read_table(name="pairs.parquet"))
    whole = (sketched_run / "alpaca" / "sketches").read_table().sort_by("pair_id")
    (run / "alpaca" / "sketches").write_table("part-00000.parquet", whole.slice(3, 5))
    sketch_dataset("alpaca", protocol, recipe, source, run, 1)
    found = (run / "alpaca" / "sketches").read_table().sort_by("pair_id")
    assert found["pair_id"].to_pylist() == whole["pair_id"].to_pylist()
    np.testing.assert_allclose(found["norm"].to_numpy(), whole["norm"].to_numpy(), rtol=1e-4)
    assert len((run / "alpaca" / "sketches").files(".parquet")) == 1 + 4  # 19 pairs in pieces of 5
    with pytest.raises(StudyDataError, match=r"other settings, {'model\.dtype': 'float32'}: give"):
        in_half = recipe_for(protocol, str(tiny_model), TEMPLATE, "bfloat16")
        sketch_dataset("alpaca", protocol, in_half, source, run, 1)


def test_a_selection_study_resumes(sketched_run: RunDirectory, protocol: Protocol, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    run_selection(protocol, sketched_run, Results(path, KEYS))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-7]) + "\n" + lines[-7][:20])
    run_selection(protocol, sketched_run, Results(path, KEYS))
    again = path.read_text().splitlines()
    assert again == lines
    rows = Results(path, KEYS).rows
    names = {(row["dataset"], row["planting"], row["strategy"]) for row in rows if row["kind"] == "selection"}
    assert ("tata", "verbose", "reward_gap") in names and ("alpaca", "flipped2", "congrad@1") in names
    assert not any(dataset == "alpaca" and "reward_gap" in strategy for dataset, _, strategy in names)
    assert all(len(row["auc"]) == 3 for row in rows if row["kind"] == "selection" and row["auc"])
    [sketched, embedded] = [row for row in rows if row["kind"] == "against"]
    assert sketched["cosines_rank_correlation"] > 0.8 and 0 < embedded["embedding_share"] < 1


def test_a_protocol_names_what_there_is(tmp_path: Path, protocol_file: Path) -> None:
    assert load_protocol(ROOT / "jobs" / "real_study" / "protocol.yaml").selection.draws == 40
    for before, after, why in (
        ("- oracle_overall\n", "- orakel\n", "training.strategies: no such orakel"),
        ("tuning_seeds:\n  - 9", "tuning_seeds:\n  - 1", "must not be compared on"),
    ):
        text = protocol_file.read_text()
        assert before in text
        (tmp_path / "protocol.yaml").write_text(text.replace(before, after))
        with pytest.raises(SettingsError, match=why):
            load_protocol(tmp_path / "protocol.yaml")


def test_nothing_is_flipped_without_a_flip(sketched: Sketched) -> None:
    same = flip(sketched, np.zeros(len(sketched.pairs), np.bool_))
    assert same.pairs.equals(replace(sketched).pairs)
