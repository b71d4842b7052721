"""Selecting from a table in memory. That the select stage gives the same is tested with the stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from congrad_ray.config.names import Band
from congrad_ray.config.recipe import Select, Sketch
from congrad_ray.config.settings import validate
from congrad_ray.data.tables import table_of
from congrad_ray.stages.select.selection import SelectionError, overlap_with_exact, select_pairs
from congrad_ray.stages.sketch.audit import expected_overlap
from congrad_ray.stages.sketch.schema import sketch_bytes, sketch_numbers, sketches_schema

WIDTH, LANGUAGES = 256, ("de", "en", "hi")


def sketches(dtype: str = "int8", count: int = 30) -> pa.Table:
    """Pairs of three languages in no order, as the sketch stage writes them."""
    generator = np.random.default_rng(3)
    centres = generator.normal(size=(len(LANGUAGES), WIDTH))
    rows: list[dict[str, Any]] = [
        {
            "pair_id": f"pair-{number:03}",
            "language": LANGUAGES[number % 3],
            "sketch": sketch_bytes(
                (20 * (generator.normal(size=WIDTH) + centres[number % 3])).clip(-127, 127).astype(dtype)[None]
            )[0],
            "sketch_scale": float(generator.uniform(0.5, 2.0)),
            **dict.fromkeys(("norm", "chosen_logps", "rejected_logps"), 1.0),
            "coefficient": float(generator.uniform(0.01, 0.2)),
            "prompt_tokens": 3,
            "chosen_tokens": int(generator.integers(1, 20)),
            "rejected_tokens": int(generator.integers(1, 20)),
            **dict.fromkeys(("positions", "attention_padding"), 0),
            **dict.fromkeys(("audit_exact", "audit_sketched")),
        }
        for number in generator.permutation(count).tolist()
    ]
    return table_of(rows, sketches_schema(WIDTH, dtype))


def conflicting_sketches() -> pa.Table:
    """Those of `sketches`, with the languages on three sides of one plane: each conflicts with both others."""
    table = sketches("float32", 60)
    numbers = sketch_numbers(table, "float32")
    plane = np.random.default_rng(0).normal(size=(2, WIDTH))
    angles = np.array([LANGUAGES.index(language) for language in table["language"].to_pylist()]) * 1.9
    sides = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    changed = (0.3 * numbers + 20 * sides @ plane).astype(np.float32)
    column = pa.FixedSizeBinaryArray.from_buffers(
        table.schema.field("sketch").type, len(table), [None, pa.py_buffer(changed.tobytes())]
    )
    return table.set_column(table.schema.get_field_index("sketch"), table.schema.field("sketch"), column)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
def test_a_selection_in_memory_equals_a_direct_derivation(tmp_path: Path, dtype: str) -> None:
    for part in range(2):
        pq.write_table(sketches(dtype).slice(15 * part, 15), tmp_path / f"{part}.parquet")
    table = pq.read_table(tmp_path)
    vectors = sketch_numbers(table, dtype).astype(np.float64)
    languages, weights = np.array(table["language"].to_pylist()), table["coefficient"].to_numpy()
    gradients = [(vectors * weights[:, None])[languages == language].mean(axis=0) for language in LANGUAGES]
    direction = gradients[0] + 2 * gradients[1] + gradients[2]

    selection = select_pairs(Select(direction="sum", language_weights={"en": 2.0}, keep=0.3), table)

    ids = table["pair_id"].to_pylist()
    assert selection.scores["pair_id"].to_pylist() == sorted(ids)
    order = np.argsort(ids)
    np.testing.assert_allclose(selection.cosine, [unit(vectors[i]) @ unit(direction) for i in order], atol=1e-6)
    own = [unit(vectors[i]) @ unit(gradients[LANGUAGES.index(languages[i])]) for i in order]
    np.testing.assert_allclose(selection.scores["own_cosine"], own, atol=1e-6)
    for language, row in zip(LANGUAGES, selection.languages, strict=True):
        members = languages[order] == language
        best = np.argsort(-selection.cosine[members])[:3]
        assert set(np.flatnonzero(selection.kept[members])) == set(best)
        assert (row.language, row.pairs, row.kept) == (language, 10, 3)
        assert row.mean_cosine == pytest.approx(selection.cosine[members].mean())
    np.testing.assert_allclose(selection.direction[:, 0], np.tile(direction, (3, 1)), rtol=1e-4, atol=1e-4)
    expected = [[unit(one) @ unit(other) for other in gradients] for one in gradients]
    np.testing.assert_allclose(selection.cosine_before, expected, atol=1e-6)


def test_blocks_are_those_of_the_sketch_section() -> None:
    table, settings = sketches(), Select(per_block=True)
    with pytest.raises(SelectionError, match=r"select\.per_block needs `sketch`"):
        select_pairs(settings, table)
    blocks = select_pairs(settings, table, Sketch(width=WIDTH, groups=4))
    assert blocks.weights.shape == (3, 4, 3) and blocks.gradients.shape == (3, 4, 64)
    assert not np.array_equal(blocks.weights[:, 0], blocks.weights[:, 1])
    with pytest.raises(SelectionError, match="256 bytes, but 512 int8 numbers have 512"):
        select_pairs(settings, table, Sketch(width=512))
    bare = table.replace_schema_metadata().cast(pa.schema([field.remove_metadata() for field in table.schema]))
    with pytest.raises(SelectionError, match="does not name a dtype needs `sketch`"):
        select_pairs(Select(), bare)
    assert select_pairs(Select(), bare, Sketch(width=WIDTH)).scores.equals(select_pairs(Select(), table).scores)


def test_what_a_selection_cannot_do_is_said_before_anything_is_computed() -> None:
    table = sketches()
    with pytest.raises(SelectionError, match=r"no column norm; it has pair_id, language, sketch"):
        select_pairs(Select(), table.drop_columns("norm"))
    with pytest.raises(SelectionError, match="no column prompt_tokens"):
        budget = Select(keep_rule="token_budget", token_budget=9)
        select_pairs(budget, table.drop_columns("prompt_tokens"))
    with pytest.raises(SelectionError, match=r"a judge's scores \(chosen_score, rejected_score\)"):
        select_pairs(Select(strategy="reward_gap"), table)
    with pytest.raises(SelectionError, match=r"strategy 'rip' needs pairs with a judge's scores"):
        select_pairs(Select(strategy="rip"), table)
    with pytest.raises(SelectionError, match="needs several judges' scores"):
        select_pairs(Select(strategy="judge_agreement"), table)
    with pytest.raises(SelectionError, match="no column chosen_logps; it has pair_id"):
        select_pairs(Select(strategy="logp_gap"), table.drop_columns("chosen_logps"))
    with pytest.raises(SelectionError, match="no pairs to select from"):
        select_pairs(Select(), table.slice(0, 0))
    with pytest.raises(SelectionError, match="column sketch is binary; it should be binary of a fixed size"):
        select_pairs(Select(), table.set_column(2, "sketch", table["sketch"].cast(pa.binary())))
    with pytest.raises(SelectionError, match="30 pairs have no language"):
        select_pairs(Select(), table.set_column(1, "language", pa.nulls(30, pa.string())))
    with pytest.raises(SelectionError, match=r"no pair is kept: select\.threshold left none of 30"):
        select_pairs(Select(keep_rule="threshold", threshold=1.5), table)


def test_the_estimated_overlap_goes_by_the_spread_within_languages() -> None:
    selection = select_pairs(Select(keep=0.4), sketches())
    languages = np.array(selection.scores["language"].to_pylist())
    of_languages = [selection.cosine[languages == language] for language in LANGUAGES]
    spread = np.concatenate([cosines - cosines.mean() for cosines in of_languages]).std()
    assert overlap_with_exact(selection, 0.02) == pytest.approx((expected_overlap(0.02, spread, 0.4), spread))
    overall = select_pairs(Select(keep=0.4, keep_rule="overall"), sketches())
    found = overlap_with_exact(overall, 0.02)
    assert found is not None and found[1] == pytest.approx(overall.cosine.std())
    assert overlap_with_exact(select_pairs(Select(strategy="random"), sketches()), 0.02) is None
    assert overlap_with_exact(select_pairs(Select(band="middle"), sketches()), 0.02) is None


def test_bands_take_another_part_of_the_same_ranking() -> None:
    table = sketches()
    kept = {band: select_pairs(Select(score="dot", keep=0.2, band=band), table) for band in get_args(Band)}
    for language in LANGUAGES:
        scores = kept["highest"].scores
        members = np.array(scores["language"].to_pylist()) == language
        ranked = np.argsort(-scores["score"].to_numpy()[members])
        for band, places in {"highest": (0, 1), "middle": (4, 5), "lowest": (8, 9)}.items():
            assert set(np.flatnonzero(kept[band].kept[members])) == set(ranked[list(places)])


@pytest.mark.parametrize("direction", ["pcgrad", "gradvac"])
@pytest.mark.parametrize("how", [{}, {"orders": 3, "score": "dot", "band": "lowest"}, {"leave_out": "pair"}])
def test_the_spread_over_orders_is_that_of_selections_with_other_seeds(
    direction: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = conflicting_sketches()
    settings = validate(Select, {"direction": direction, "keep": 0.3, **how}, "select")
    mine = select_pairs(settings, table)
    cosines, shares = [], []
    for draw in range(1, 17):
        other = select_pairs(settings.model_copy(update={"seed": draw * settings.orders}), table)
        cosines += [
            unit(one) @ unit(two) for one, two in zip(mine.direction[:, 0], other.direction[:, 0], strict=True)
        ]
        shares.append((mine.kept & other.kept).sum() / mine.kept.sum())
    spread = mine.order_spread
    assert spread is not None
    assert (spread.directions, spread.selections) == (16, 16)
    assert spread.least_cosine == pytest.approx(min(cosines), abs=1e-6)
    assert spread.mean_cosine == pytest.approx(np.mean(cosines), abs=1e-6)
    assert spread.least_cosine < 0.9999  # the orders make a difference
    assert (spread.least_kept, spread.mean_kept) == (min(shares), pytest.approx(np.mean(shares)))
    # Where there are many pairs, fewer selections are compared.
    monkeypatch.setattr("congrad_ray.stages.select.selection._MOST_COMPARED", 5 * len(table))
    fewer = select_pairs(settings, table).order_spread
    assert fewer is not None and fewer.selections == 5
    assert (fewer.least_kept, fewer.least_cosine) == (min(shares[:5]), spread.least_cosine)


def test_no_spread_over_orders_where_none_is_drawn_or_the_direction_decides_nothing() -> None:
    table = conflicting_sketches()
    for settings in (Select(direction="upgrad"), Select(strategy="random"), Select(strategy="no_surgery")):
        assert select_pairs(settings, table).order_spread is None
    spread = select_pairs(Select(score="worst_cosine"), table).order_spread
    assert spread is not None
    assert (spread.selections, spread.mean_kept, spread.least_kept) == (0, None, None)
    assert str(spread).endswith("of 16)")
