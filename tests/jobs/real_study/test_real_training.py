"""What trained models are asked and what that says, the report, and the whole study from beginning to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from congrad_ray.modeling.source import named_model
from congrad_ray.modeling.tokenization import TokenizedPair
from congrad_ray.rundir.directory import RunDirectory
from real_study.measuring import Question, fingerprint, log_probabilities, measured, over, questions
from real_study.pairs import StudyDataError
from real_study.protocol import KEYS, Cell, Protocol, cells, load_protocol, recipe_for
from real_study.report import tables, write_tables
from real_study.training import Trial, run_training, selected, training_table
from study.results import Results, read_results

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = ROOT / "jobs" / "real_study" / "open_answer.jinja"
PAGE = ROOT / "docs" / "results" / "real-model.md"


def test_log_probabilities_are_those_of_the_logits(
    protocol: Protocol, made_data: Path, sketched_run: RunDirectory, tiny_model: Path
) -> None:
    recipe = recipe_for(protocol, str(tiny_model), TEMPLATE)
    source = named_model(recipe.model.name, recipe.model)
    asked = questions(protocol, made_data, sketched_run, source.load_tokenizer())
    counts = {
        group: sum(question.group == group for question in asked)
        for group in ("held_out", "tata", "xcopa", "plain")
    }
    assert counts == {"held_out": 9, "tata": 2, "xcopa": 3, "plain": 3}
    tokenizer, model = source.load_tokenizer(), source.load_model("cpu")
    xcopa = [question.pair for question in asked if question.group == "xcopa"]
    assert tokenizer.decode(xcopa[0].prompt_ids).endswith(
        " weil"
    )  # the first asks for the cause; choice1 is right
    assert tokenizer.decode(xcopa[0].chosen_ids).startswith(" it ")
    assert tokenizer.decode(xcopa[1].prompt_ids).endswith(" also")
    assert tokenizer.decode(xcopa[1].chosen_ids).startswith(" she ")
    found = log_probabilities(model, asked, 128)
    for question, logps in list(zip(asked, found, strict=True))[::3]:
        pair = question.pair
        for answer, logp in zip((pair.chosen_ids, pair.rejected_ids), logps, strict=True):
            logits = model(torch.tensor([pair.prompt_ids + answer])).logits[0, len(pair.prompt_ids) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()
            assert logp == pytest.approx(expected, abs=1e-3)


def test_measures_by_hand() -> None:
    pair = TokenizedPair([1], [2, 3], [4, 5, 6])
    asked = [
        Question("held_out", "de", pair),
        Question("held_out", "de", pair),
        Question("held_out", "en", pair),
        Question("xcopa", "de", pair),
        Question("plain", "de", pair),
    ]
    start = np.array([[-5.0, -4.0], [-5.0, -6.0], [-3.0, -3.0], [-4.0, -5.0], [-6.0, -9.0]])
    logps = start + np.array([[1.0, -1.0], [-2.0, 1.0], [0.0, 0.0], [0.0, -1.0], [-1.0, 1.0]])
    row = measured(asked, logps, start, 0.1)
    assert row["held_out_accuracy"] == {"de": 0.5, "en": 0.5}
    assert row["held_out_margin"] == {"de": pytest.approx(0.1 * (2 - 3) / 2), "en": 0.0}
    assert row["held_out_likelier"] == {"de": 0.5, "en": 0.0}
    assert row["xcopa_accuracy"] == {"de": 1.0} and row["xcopa_right"] == {"de": -2.0}
    assert row["plain_logp"] == {"de": -3.0}
    assert row["held_out_margins"] == {"de": [pytest.approx(0.2), pytest.approx(-0.3)], "en": [0.0]}
    assert row["held_out_by_start"] == {"likelier": 0.0, "less likely": 0.75}  # -5, -6; then -5, -4 and a tie
    assert fingerprint(asked, "float32") == fingerprint(list(asked), "float32")
    assert (
        len({fingerprint(asked, "float32"), fingerprint(asked, "bfloat16"), fingerprint(asked[:-1], "float32")})
        == 3
    )
    assert over({"de": 0.5, "en": 1.0}) == 0.75 and over({"de": 0.5}, ["fr"]) is None


def test_what_is_trained_on(protocol: Protocol, sketched_run: RunDirectory, tiny_model: Path) -> None:
    """A flipped pair is trained on as it is labelled now, with the reference's log-probabilities to match."""
    of_all, of_oracle = (Cell("flipped2", strategy, 1, 1e-3) for strategy in ("all", "oracle_overall"))
    drawn, choice, kept = selected(protocol, sketched_run, of_all)
    table = training_table(drawn, choice, kept)
    assert kept.all() and sorted(set(table["language"].to_pylist())) == ["de", "en"] and drawn.flipped.sum() == 4
    pairs = (sketched_run / "alpaca").read_table(name="pairs.parquet").to_pylist()
    files = {row["pair_id"]: row for row in pairs}
    stored = (sketched_run / "alpaca" / "sketches").read_table().to_pylist()
    logps = {row["pair_id"]: (row["chosen_logps"], row["rejected_logps"]) for row in stored}
    for row, flipped in zip(table.to_pylist(), drawn.flipped, strict=True):
        file, (first, second) = files[row["pair_id"]], logps[row["pair_id"]]
        assert row["chosen"] == file["rejected" if flipped else "chosen"]
        assert (row["ref_chosen_logps"], row["ref_rejected_logps"]) == (
            (second, first) if flipped else (first, second)
        )
    again, _, chosen = selected(protocol, sketched_run, of_oracle)
    assert again.data.pairs.equals(drawn.data.pairs)
    assert not drawn.flipped[chosen].any() and chosen.sum() == 6


def test_no_oracle_where_no_label_is_wrong(protocol: Protocol) -> None:
    found = [(cell.variant, cell.strategy) for cell in cells(protocol)]
    of_each = {"clean": ["all", "congrad"], "flipped2": ["all", "congrad", "oracle_overall"]}
    assert found == [(variant, strategy) for variant, names in of_each.items() for strategy in names]


def test_models_that_were_asked_something_else_are_refused(
    protocol: Protocol, made_data: Path, sketched_run: RunDirectory, tiny_model: Path, tmp_path: Path
) -> None:
    trial = Trial(protocol, recipe_for(protocol, str(tiny_model), TEMPLATE), made_data, sketched_run)
    results = Results(tmp_path / "results.jsonl", KEYS)
    results.add({"kind": "start", "asked": trial.asked()[::-1]})
    with pytest.raises(StudyDataError, match="asked other questions"):
        run_training(trial, results, list(cells(protocol)), 1)


def cell(strategy: str, seed: int, accuracy: float, variant: str = "clean") -> dict[str, Any]:
    languages = {"de": accuracy, "en": accuracy + 0.1, "es": 0.5}
    return {
        "kind": "cell", "variant": variant, "strategy": strategy, "seed": seed, "learning_rate": 1e-3, "kept": 6,
        "flipped_kept": 0.25, "held_out_accuracy": languages, "held_out_margin": languages,
        "steps": 6, "kept_by_language": {"de": 4, "en": 2},
        "held_out_margins": {"de": [accuracy - 0.7, 0.1], "en": [0.1, -0.1], "es": [0.1]},
        "held_out_by_start": {"likelier": accuracy, "less likely": None},
        "tata_accuracy": {"es": 0.5}, "xcopa_accuracy": {"de": 0.5}, "xcopa_right": {"de": -2.0},
        "plain_logp": {"de": -3.0},
    }  # fmt: skip


def test_the_report_pairs_seeds(protocol: Protocol, tmp_path: Path) -> None:
    rows = [cell("all", seed, 0.5 + 0.1 * seed) for seed in (1, 2)]
    rows += [cell("congrad", seed, 0.52 + 0.12 * seed) for seed in (1, 2)]
    rows += [cell("random", seed, 0.5 + 0.1 * seed) for seed in (1, 2)]
    rows += [cell("congrad", 9, 0.0), cell("all", 1, 0.1, "flipped2")]  # for the learning rate; another variant
    lists = {"auc": [0.6, 0.7, None], "auc_se": [0.05, 0.05, 0.05], "per_language_flipped": [0.3, 0.4, 0.5]}
    about = {"kind": "selection", "dataset": "alpaca", "planting": "flipped2"}
    rows += [
        {**about, "strategy": "congrad", **lists},
        {**about, "strategy": "mean", **lists, "auc": [0.65, 0.75, 0.7]},
        {**about, "strategy": "congrad@0", **lists, "auc": [0.5, 0.5, 0.5]},
    ]
    found = tables(rows, protocol)

    def line(table: str) -> list[str]:
        return next(line for line in found[table].splitlines() if "`congrad`" in line).split(" | ")

    # Means .76 and .70; the differences .04 and .06 have mean .05 and a t of 12.706 for one degree of freedom.
    assert line("training-clean")[1:3] == ["0.750", "+0.050 (−0.077..+0.177)"]
    assert line("held-out-clean")[4:8] == ["0.700", *["+0.050 (−0.077..+0.177)"] * 2, "–"]
    # Six steps of four pairs over six. Of four held-out pairs one is right (margins -.06 and .06) in one of two
    # seeds where `random`'s (-.1 and 0) is not: .5, 0, 0, 0 have a standard deviation of .25; 1.96 * .25 / 2.
    assert line("trained-on-clean")[1:] == ["2", "4", "2", "4.00", "25.0 %", "0.245 |"]
    assert "| `congrad` | 0.650 (0.015..1.285) |" in found["auc-alpaca"] and "@" not in found["auc-alpaca"]
    assert "+0.050 (+0.050..+0.050) | 0.098 |" in found["auc-alpaca"]  # of mean, to congrad; over pairs
    assert "| `mean` | 40.0 % (15.2..64.8) |" in found["per_language-alpaca"]
    assert "| 0 | 0.500 (0.500..0.500) |" in found["blocks-alpaca"]
    assert found["auc-tata"] == "*No results yet.*"
    page = tmp_path / "page.md"
    page.write_text(
        "Before.\n<!-- table training-clean -->\nold\n<!-- end -->\n"
        "Between.\n<!-- table auc-tata -->\n<!-- end -->\n"
    )
    write_tables(rows, protocol, page)
    once = page.read_text()
    assert found["training-clean"] in once and "old" not in once and "Between.\n" in once
    write_tables(rows, protocol, page)
    assert page.read_text() == once
    page.write_text("<!-- table auc-nothing -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="no such table: auc-nothing"):
        write_tables(rows, protocol, page)


def test_the_page_has_every_place_of_the_protocol() -> None:
    text = PAGE.read_text()
    names = tables([], load_protocol(ROOT / "jobs" / "real_study" / "protocol.yaml"))
    assert [name for name in names if f"<!-- table {name} -->" not in text] == []


@pytest.mark.slow
def test_a_study_from_beginning_to_end(
    tiny_model: Path, made_data: Path, protocol_file: Path, protocol: Protocol, tmp_path: Path
) -> None:
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    page.write_text(PAGE.read_text())

    def run(verb: str, *more: str) -> None:
        command = [sys.executable, "jobs/run_real_study.py", verb, str(protocol_file), "--data", str(made_data)]
        command += ["--model", str(tiny_model), "--run", str(tmp_path / "run"), "--results", str(results)]
        ended = subprocess.run(
            command + list(more), cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr

    run("sketch")
    run("select")
    run("train", "--tuning")
    run("train")
    lines = results.read_text().splitlines()
    wanted = list(cells(protocol))
    assert sum(json.loads(line)["kind"] == "cell" for line in lines) == len(wanted) + 1
    results.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:30])  # as a kill leaves it
    run("train")
    rows = [row for row in read_results(results, KEYS) if row["kind"] == "cell"]
    assert len(rows) == len(wanted) + 1
    again, before = json.loads(results.read_text().splitlines()[-1]), json.loads(lines[-1])
    timed = {"seconds", "train_seconds"}
    assert {name: again[name] for name in again.keys() - timed} == {
        name: before[name] for name in before.keys() - timed
    }
    of_all = next(row for row in rows if (row["variant"], row["strategy"]) == ("clean", "all"))
    assert of_all["kept"] == of_all["pairs"] == 12 and any(of_all["held_out_margin"].values())
    run("report", "--page", str(page))
    assert "| `oracle_overall` |" in page.read_text() and "seeds" in page.read_text()
