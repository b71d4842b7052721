"""The study's arithmetic: reading results, pairing cells, intervals, and tables in Markdown."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from study.analysis import (
    KEYS,
    Group,
    difference_text,
    differences,
    estimate,
    groups,
    markdown_table,
    rate_text,
    selection_summaries,
    signed_text,
    summaries,
    table,
    without_seeds,
)
from study.results import ResultsError, cut_torn_line, read_results

# Upper 2.5 % points of Student's t by degrees of freedom, from printed tables.
T_975 = {1: 12.706, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622}


def cell(seed: int, strategy: str, seen: float | None, **more: Any) -> dict[str, Any]:
    row = {"kind": "cell", "seed": seed, "variant": "inverted", "strategy": strategy, "keep": 0.5}
    if strategy == "all":
        row["keep"] = 1.0
    row |= {"learning_rate": 1e-4, "iterations": 1, "pairs": 700, "kept": 350, "steps": 44, "seen": seen}
    return row | {"unseen": 0.7, "held_out": 0.6, "held_out_unseen": 0.5, "tokens": 17.25} | more


def start(seed: int, seen: float) -> dict[str, Any]:
    nothing = {"variant": "", "keep": 1.0, "learning_rate": 0.0, "pairs": 0, "kept": 0, "steps": 0}
    return cell(seed, "start", seen, **nothing)


def selection(seed: int, strategy: str, **more: Any) -> dict[str, Any]:
    row = {"kind": "selection", "seed": seed, "variant": "inverted", "strategy": strategy, "keep": 0.5}
    row |= {"pairs": 700, "kept": 350, "better_kept": 0.7, "better_all": 0.6, "auc": 0.7, "auc_biased": None}
    row |= {"auc_healthy": None, "conflicting_pairs": None, "cosine_before": None, "cosine_after": None}
    return row | {"negative_before": None, "negative_after": None} | more


def lines(path: Path, *rows: dict[str, Any] | str, end: str = "\n") -> Path:
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(texts) + end, encoding="utf-8")
    return path


class TestReadResults:
    def test_later_rows_replace_earlier_ones_of_the_same_key(self, tmp_path: Path) -> None:
        rows = [
            cell(1, "all", 0.1),
            cell(1, "congrad", 0.2),
            cell(1, "congrad", 0.3, keep=0.25),
            cell(1, "congrad", 0.4, learning_rate=2e-4),
            cell(1, "congrad", 0.5, iterations=2),
            cell(1, "congrad", 0.6, variant="plain"),
            selection(1, "congrad"),
            cell(1, "congrad", 0.9),
            selection(1, "congrad", auc=0.8),
        ]
        found = read_results(lines(tmp_path / "r", *rows), KEYS)
        assert sorted(row["seen"] for row in found if row["kind"] == "cell") == [0.1, 0.3, 0.4, 0.5, 0.6, 0.9]
        assert [row["auc"] for row in found if row["kind"] == "selection"] == [0.8]

    def test_a_cut_anywhere_in_the_last_line_leaves_the_others(self, tmp_path: Path) -> None:
        first, last = cell(1, "all", 0.1), json.dumps(cell(2, "é", 0.2), ensure_ascii=False).encode()
        before = json.dumps(first).encode() + b"\n"
        inside_letter = last.index("é".encode()) + 1
        for cut in (0, 1, inside_letter, *range(9, len(last), 9), len(last) - 1):
            (tmp_path / "r").write_bytes(before + last[:cut])
            assert read_results(tmp_path / "r", KEYS) == [first]
        (tmp_path / "r").write_bytes(before + last)
        assert len(read_results(tmp_path / "r", KEYS)) == 2

    @pytest.mark.parametrize(
        ("bad", "why"),
        [
            ('{"kind": "cell", "seed"', "not JSON"),
            ("[1]", "should be an object"),
            ('{"kind": "else"}', "kind should be"),
            ('{"kind": ["cell"]}', "kind should be"),
            (json.dumps(cell(1, "all", 0.1) | {"seed": "1"}), "seed is '1'"),
            (json.dumps({k: v for k, v in cell(1, "all", 0.1).items() if k != "iterations"}), "needs iterations"),
            (json.dumps(cell(1, "all", math.nan)), "NaN is no number"),
        ],
    )
    def test_any_other_bad_line_is_named(self, tmp_path: Path, bad: str, why: str) -> None:
        path = lines(tmp_path / "r", cell(1, "all", 0.1), "", bad, cell(2, "all", 0.1))
        with pytest.raises(ResultsError, match=rf"r, line 3: .*{why}"):
            read_results(path, KEYS)
        # The last line as well, once it has its end.
        with pytest.raises(ResultsError, match="line 1"):
            read_results(lines(tmp_path / "r", bad), KEYS)

    def test_a_torn_line_is_cut_off_before_more_is_appended(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "r", cell(1, "all", 0.1), '{"kind": "ce', end="")
        assert cut_torn_line(path)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell(2, "all", 0.2)) + "\n")
        assert [row["seed"] for row in read_results(path, KEYS)] == [1, 2]
        assert not cut_torn_line(path)
        path.write_text('{"kind')
        assert cut_torn_line(path) and path.read_bytes() == b""
        assert not cut_torn_line(path)


class TestEstimate:
    @pytest.mark.parametrize("values", [[0.01, 0.03], [0.1, -0.2, 0.05], [0.5, 0.7, 0.6, 0.9, 0.2]])
    def test_against_printed_tables(self, values: list[float]) -> None:
        found, count = estimate(values), len(values)
        margin = T_975[count - 1] * statistics.stdev(values) / math.sqrt(count)
        assert found.seeds == count
        assert found.mean == pytest.approx(statistics.fmean(values))
        assert found.low == pytest.approx(statistics.fmean(values) - margin, abs=1e-4 * margin)
        assert found.high == pytest.approx(statistics.fmean(values) + margin, abs=1e-4 * margin)

    def test_few_seeds(self) -> None:
        assert (estimate([0.3]).low, estimate([0.3]).high, estimate([0.3]).mean) == (None, None, 0.3)
        with pytest.raises(ValueError, match="at least one"):
            estimate([])


class TestDifferences:
    def test_pairs_by_seed(self) -> None:
        # Seeds differ far more than strategies; unpaired the interval would be a hundred times as wide.
        base, gain = [0.1, 0.5, 0.9], [0.01, 0.02, -0.003]
        rows = [cell(seed, "all", value) for seed, value in enumerate(base)]
        rows += [cell(s, "congrad", base[s] + gain[s]) for s in (2, 0, 1)]
        (found,) = differences(rows, "all", "seen")
        margin = T_975[2] * statistics.stdev(gain) / math.sqrt(3)
        assert (found.variant, found.strategy, found.keep) == ("inverted", "congrad", 0.5)
        assert (found.learning_rate, found.iterations) == (1e-4, 1)
        assert (found.baseline, found.measure, found.seeds, found.wins) == ("all", "seen", 3, 2)
        assert found.mean == pytest.approx(0.009)
        assert found.low == pytest.approx(0.009 - margin, rel=1e-3)
        assert found.high == pytest.approx(0.009 + margin, rel=1e-3)

    def test_seeds_that_miss_either_or_the_measure_are_left_out(self) -> None:
        rows = [cell(seed, "all", 0.5) for seed in (1, 2, 3, 4)] + [cell(5, "all", None)]
        rows += [cell(2, "congrad", 0.6), cell(4, "congrad", 0.8), cell(5, "congrad", 0.9), cell(6, "congrad", 0)]
        rows += [cell(3, "congrad", None), cell(1, "random", 0.4)]
        found = {d.strategy: d for d in differences(rows, "all", "seen")}
        assert found["congrad"].seeds == 2
        assert found["congrad"].mean == pytest.approx(0.2)
        assert (found["random"].seeds, found["random"].low, found["random"].high) == (1, None, None)
        assert found["random"].mean == pytest.approx(-0.1)
        assert differences(rows, "oracle", "seen") == []

    def test_a_seed_given_twice_counts_once(self) -> None:
        rows = [cell(1, "all", 0.5), cell(1, "congrad", 0.6), cell(1, "congrad", 0.7)]
        (found,) = differences(rows, "all", "seen")
        assert (found.seeds, found.mean) == (1, pytest.approx(0.2))

    def test_variant_and_training_have_to_be_the_same(self) -> None:
        for change in ({"variant": "plain"}, {"learning_rate": 2e-4}, {"iterations": 2}, {"seed": 2}):
            rows = [cell(1, "all", 0.5), cell(1, "random", 0.5)]
            rows.append(cell(1, "congrad", 0.6) | change)
            assert [d.strategy for d in differences(rows, "all", "seen")] == ["random"]
            assert "congrad" not in [d.strategy for d in differences(rows, "random", "seen")]

    def test_keep_ratios(self) -> None:
        rows = [cell(1, "all", 0.5), cell(1, "random", 0.4), cell(1, "random", 0.3, keep=0.25)]
        rows += [cell(1, "congrad", 0.6), cell(1, "congrad", 0.7, keep=0.25), cell(1, "congrad", 0.8, keep=0.75)]

        def means(baseline: str) -> dict[tuple[str, float], float]:
            return {(d.strategy, d.keep): round(d.mean, 6) for d in differences(rows, baseline, "seen")}

        # `all` for any keep ratio; `random` for its own; 0.75 has none, and nothing is compared with itself.
        assert means("all") == {
            ("random", 0.5): -0.1,
            ("random", 0.25): -0.2,
            ("congrad", 0.5): 0.1,
            ("congrad", 0.25): 0.2,
            ("congrad", 0.75): 0.3,
        }
        assert means("random") == {("congrad", 0.5): 0.2, ("congrad", 0.25): 0.4}

    def test_the_start_is_matched_by_the_seed_alone(self) -> None:
        rows = [start(1, 0.3), start(2, 0.4), cell(1, "all", 0.5, variant="plain"), cell(2, "all", 0.9)]
        rows.append(cell(2, "congrad", 0.5, keep=0.25, learning_rate=1e-3, iterations=3))
        found = {(d.variant, d.strategy): round(d.mean, 6) for d in differences(rows, "start", "seen")}
        assert found == {("plain", "all"): 0.2, ("inverted", "all"): 0.5, ("inverted", "congrad"): 0.1}
        # A start belongs to no variant, so it is no competitor.
        assert differences([start(1, 0.3), cell(1, "all", 0.5)], "all", "seen") == []

    def test_measures(self) -> None:
        rows = [cell(1, "all", 0.5, tokens=10.0), cell(1, "congrad", 0.5, tokens=12.5, held_out_unseen=0.25)]
        means = {m: differences(rows, "all", m)[0].mean for m in ("unseen", "held_out_unseen", "tokens")}
        assert means == {"unseen": 0.0, "held_out_unseen": -0.25, "tokens": 2.5}
        assert differences(rows, "all", "seen")[0].wins == 0  # a tie is no win
        with pytest.raises(ValueError, match="no such measure: seconds"):
            differences(rows, "all", "seconds")

    def test_order(self) -> None:
        names = ["oracle", "mean", "congrad", "a", "random", "all"]
        rows = [start(1, 0.1)] + [cell(1, name, 0.5, variant=v) for v in ("z", "b") for name in names]
        found = [(d.variant, d.strategy) for d in differences(rows, "start", "seen")]
        order = ["all", "random", "congrad", "a", "mean", "oracle"]
        assert found == [(v, name) for v in ("z", "b") for name in order]


def test_summaries() -> None:
    rows = [cell(seed, "congrad", seen) for seed, seen in ((1, 0.5), (2, 0.75))]
    rows += [cell(1, "congrad", 0.1, keep=0.25), start(1, 0.2), start(2, 0.4)]
    found = {(s.strategy, s.keep, s.measure): s for s in summaries(rows)}
    assert len(found) == 3 * 5
    both = found["congrad", 0.5, "seen"]
    assert (both.seeds, both.mean, both.variant, both.learning_rate) == (2, 0.625, "inverted", 1e-4)
    assert both.low == pytest.approx(0.625 - 12.706 * 0.125, rel=1e-4)
    assert (found["congrad", 0.25, "seen"].mean, found["congrad", 0.25, "seen"].low) == (0.1, None)
    assert found["start", 1.0, "seen"].mean == pytest.approx(0.3)
    assert found["congrad", 0.5, "tokens"].mean == 17.25
    assert [s.measure for s in summaries([{**cell(1, "all", None), "unseen": None}])] == [
        "held_out",
        "held_out_unseen",
        "tokens",
    ]


def test_selection_summaries() -> None:
    rows = [
        selection(1, "congrad", auc=0.6, auc_biased=0.4, better_kept=0.7, negative_before=0.0, kept=350),
        selection(2, "congrad", auc=0.8, auc_biased=None, better_kept=0.8, negative_before=0.5, kept=351),
        selection(2, "congrad", auc=0.9, keep=0.25),
        selection(1, "all", auc=None, keep=1.0),
        cell(1, "congrad", 0.5),
    ]
    everything, quarter, half = selection_summaries(rows)
    assert (everything.strategy, everything.auc, everything.cosine_before) == ("all", None, None)
    assert (quarter.keep, quarter.seeds) == (0.25, 1)
    assert quarter.auc is not None and (quarter.auc.mean, quarter.auc.low) == (0.9, None)
    assert half.auc is not None and half.better_kept is not None
    assert (half.seeds, half.kept, half.negative_before) == (2, 350.5, 0.25)
    assert half.auc.mean == pytest.approx(0.7)
    assert half.auc.high == pytest.approx(0.7 + 12.706 * 0.1, rel=1e-4)
    assert half.better_kept.mean == pytest.approx(0.75)
    assert half.auc_biased == 0.4  # undefined in the other seed


def test_groups_and_their_lines() -> None:
    rows = [start(1, 0.3), start(2, 0.4), start(3, 0.9)]
    rows += [cell(seed, name, 0.5) for seed in (1, 2) for name in ("congrad", "all")]
    rows += [cell(3, "all", 0.5, learning_rate=2e-5), cell(1, "all", 0.5, iterations=2)]
    rows.append(selection(1, "congrad"))
    assert groups(rows) == [Group("inverted", 2e-5, 1), Group("inverted", 1e-4, 1), Group("inverted", 1e-4, 2)]
    assert groups(rows)[2].title == "inverted, learning rate 1e-4, 2 iterations"
    found = table(rows, groups(rows)[1])
    assert [(line.strategy, line.seeds) for line in found] == [("start", 2), ("all", 2), ("congrad", 2)]
    assert found[0].scores["seen"].mean == pytest.approx(0.35)  # of this table's seeds only
    assert [line.selection is None for line in found] == [True, True, False]
    assert found[2].differences["start", "seen"].mean == pytest.approx(0.15)
    assert groups([start(1, 0.1), selection(1, "all")]) == []


def test_tuning_seeds_can_be_left_out() -> None:
    rows = [cell(seed, "all", 0.5) for seed in (1, 101, 102)] + [selection(101, "all")]
    assert without_seeds(rows, [101, 102]) == [rows[0]]


def test_markdown_tables() -> None:
    gains = {1: 0.010, 2: 0.014}
    rows = [start(seed, 0.7) for seed in gains]
    for seed, gain in gains.items():
        rows += [
            cell(seed, "all", 0.8),
            cell(seed, "random", 0.79),
            cell(seed, "congrad", 0.8 + gain, unseen=0.69),
        ]
    rows += [cell(3, "congrad", 0.6), cell(1, "a|b", 0.75), cell(1, "all", 0.5, variant="plain")]
    rows += [selection(1, "congrad", auc=0.7), selection(1, "all", auc=None, keep=1.0, better_kept=0.6)]
    margin = 12.706 * math.sqrt(2) * 0.002 / math.sqrt(2)
    assert f"{margin:.3f}" == "0.025"
    text = markdown_table(rows)
    first, second = text.split("\n\nplain, learning rate 1e-4:\n\n")
    assert first.startswith("inverted, learning rate 1e-4:\n\n| strategy |")
    found = [[c.strip() for c in line.replace("\\|", "/").strip("|").split("|")] for line in first.split("\n")[2:]]
    assert len({len(line) for line in found}) == 1
    assert found[2:] == [
        ["start", "–", "2", "–", "–", "0.700", "–", "–", "–", "–", "17.2"],
        ["all", "100 %", "2", "–", "60.0 %", "0.800", "–", "–", "–", "–", "17.2"],
        [
            *("random", "50 %", "2", "–", "–", "0.790", "−0.010 (−0.010..−0.010)", "–"),
            *("0.000 (0.000..0.000)", "0.000 (0.000..0.000)", "17.2"),
        ],
        [
            *("congrad", "50 %", "3", "0.700", "70.0 %", "0.741"),
            *("+0.012 (−0.013..+0.037; 2 seeds)", "+0.022 (−0.003..+0.047; 2 seeds)"),
            *("−0.010 (−0.010..−0.010; 2 seeds)", "0.000 (0.000..0.000; 2 seeds)", "17.2"),
        ],
        [
            *("a/b", "50 %", "1", "–", "–", "0.750", "−0.050 (1 seed)", "−0.040 (1 seed)"),
            *("0.000 (1 seed)", "0.000 (1 seed)", "17.2"),
        ],
    ]
    assert second.count("\n") == 3
    assert markdown_table(rows, variants=["plain"]) == "plain, learning rate 1e-4:\n\n" + second
    assert markdown_table(rows, learning_rates=[2e-4]) == markdown_table([]) == ""


def test_numbers_as_text() -> None:
    assert [signed_text(v) for v in (0.0124, -0.0124, 0.0, -0.0004, 0.0006)] == [
        "+0.012",
        "−0.012",
        "0.000",
        "0.000",
        "+0.001",
    ]
    assert [rate_text(v) for v in (1e-4, 2.5e-5, 0.1, 3.0)] == ["1e-4", "2.5e-5", "1e-1", "3e0"]
    assert difference_text(None) == "–"
    assert difference_text(estimate([0.5, 0.5]), 2) == "+0.500 (+0.500..+0.500)"
    assert difference_text(estimate([0.5, 0.5])) == "+0.500 (+0.500..+0.500)"
