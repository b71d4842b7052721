"""Held-out preferences: which are drawn, and their scores against transformers and NumPy."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from congrad_ray.config.benchmarks import Benchmark
from congrad_ray.config.loss import LossSettings, LossType
from congrad_ray.config.recipe import Model
from congrad_ray.config.training import Lora
from congrad_ray.data.preferences import PREFERENCES
from congrad_ray.data.records import InputError
from congrad_ray.data.tables import table_of
from congrad_ray.modeling.adapters import merge_into, save_adapter, with_adapter
from congrad_ray.modeling.source import ModelSource, named_model
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.benchmark.preferences import Drawn, draw, margins, preference_scores
from congrad_ray.stages.benchmark.scorer import Scorer, ScorerSpec
from congrad_ray.stages.evaluate.statistics import bootstrap_interval


def rows_of(count: int, languages: str = "de fr") -> list[dict[str, Any]]:
    names = languages.split()
    return [
        {
            "prompt": f"Was ist {n}?",
            "chosen": f"Der Fuchs {n} springt" * (n % 3 + 1),
            "rejected": f"Le renard {n}",
            "language": names[n % len(names)],
        }
        for n in range(count)
    ]


def written(folder: Path, rows: list[dict[str, Any]]) -> Benchmark:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return Benchmark(preferences=str(path), preferences_per_language=5)


def drawn_prompts(drawn: Drawn) -> list[str]:
    return sorted(row["prompt"] for row in drawn.pairs)


def test_so_many_of_each_language_by_seed_whatever_their_order(tmp_path: Path) -> None:
    rows = rows_of(40)
    settings = written(tmp_path, rows)
    drawn = draw(settings, ["de", "fr"], 0.2)
    assert drawn.languages == {"de": 20, "fr": 20} and drawn.drawn == {"de": 5, "fr": 5}
    assert drawn_prompts(draw(written(tmp_path, rows[::-1]), ["de", "fr"], 0.2)) == drawn_prompts(drawn)
    other = draw(settings.model_copy(update={"seed": 1}), ["de", "fr"], 0.2)
    assert drawn_prompts(other) != drawn_prompts(drawn)
    everything = draw(written(tmp_path, rows).model_copy(update={"preferences_per_language": 100}), [], 0.2)
    assert [row["row"] for row in everything.pairs] == sorted(range(40), key=lambda n: (n % 2, n))


def test_bad_rows_are_set_apart_and_twins_counted(tmp_path: Path) -> None:
    rows = rows_of(8, "de")
    bad = [{**rows[0], "chosen": ""}, {**rows[0], "language": "Klingonisch"}, {**rows[0], "chosen": "Le renard 0"}]
    drawn = draw(written(tmp_path, [*rows, rows[3], *bad]), ["de"], 0.2)
    assert drawn.duplicates == 1
    reasons = Counter(row["reason"] for row in drawn.quarantine)
    assert reasons == {"chosen_empty": 1, "unknown_language": 1, "identical_responses": 1}
    assert drawn.languages == {"de": 8}


def test_a_language_is_the_recipes_group(tmp_path: Path) -> None:
    rows = rows_of(3, "zh-TW zh deu")
    assert draw(written(tmp_path, rows), ["zh-Hant", "zh", "de"], 0.2).languages == {
        "de": 1,
        "zh": 1,
        "zh-Hant": 1,
    }


def test_a_file_that_is_mostly_bad_is_an_error(tmp_path: Path) -> None:
    rows = [{**row, "rejected": ""} for row in rows_of(30)] + rows_of(2)
    with pytest.raises(InputError, match=r"30 of 32 rows cannot be used.*limits.failed_share.*rejected_empty 30"):
        draw(written(tmp_path, rows), ["de"], 0.2)
    with pytest.raises(InputError, match="no usable pair: rejected_empty 30"):
        draw(written(tmp_path, rows[:30]), ["de"], 0.2)


def plain_logps(folder: Path, prompt: str, completion: str) -> tuple[float, int]:
    """log p(completion) by transformers alone, one sequence at a time, in double precision."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logps[place - 1, ids[place]]) for place in range(start, len(ids))), len(ids) - start


def scored(source: ModelSource, rows: list[dict[str, Any]], model: str, **more: Any) -> list[dict[str, Any]]:
    table = table_of(rows, PREFERENCES)
    found: pa.Table = Scorer(ScorerSpec(source, model, **more))(table)
    return found.to_pylist()


@pytest.fixture
def pairs(tmp_path: Path) -> list[dict[str, Any]]:
    return draw(written(tmp_path, rows_of(9)), ["de", "fr"], 0.2).pairs


def test_log_probabilities_are_transformers_own(tiny_model: Path, pairs: list[dict[str, Any]]) -> None:
    source = named_model(str(tiny_model), Model(name=str(tiny_model), dtype="float32", max_length=256))
    for row, pair in zip(scored(source, pairs, "M_0", max_tokens=128), pairs, strict=True):
        for side in ("chosen", "rejected"):
            logps, tokens = plain_logps(tiny_model, pair["prompt"], pair[side])
            assert row[f"{side}_logps"] == pytest.approx(logps, rel=1e-5)
            assert row[f"{side}_tokens"] == tokens


def test_an_adapter_is_scored_as_what_it_makes_of_its_model(
    tiny_model: Path, pairs: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONGRAD_RAY_CACHE", str(tmp_path / "cache"))
    settings = Model(name=str(tiny_model), dtype="float32", max_length=256)
    base = named_model(str(tiny_model), settings)
    adapted: Any = with_adapter(base.load_model("cpu"), Lora(r=2), 0)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    folder = RunDirectory.open(tmp_path).stage("policy", 0)
    Path(folder.path).mkdir(parents=True)
    save_adapter(adapted, folder.path, str(tiny_model))
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder.path)
    whole = tmp_path / "whole"
    merge_into(adapted).save_pretrained(whole)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(whole)
    found = scored(ModelSource(folder.path, settings, folder, "adapter", base), pairs, "M_1")
    before = scored(base, pairs, "M_0")
    for row, was, pair in zip(found, before, pairs, strict=True):
        logps, _ = plain_logps(whole, pair["prompt"], pair["chosen"])
        assert row["chosen_logps"] == pytest.approx(logps, rel=1e-5)
        assert row["chosen_logps"] != pytest.approx(was["chosen_logps"], rel=1e-3)


def test_a_pair_that_is_too_long_goes_to_quarantine(tiny_model: Path, pairs: list[dict[str, Any]]) -> None:
    def score(max_length: int) -> list[dict[str, Any]]:
        settings = Model(name=str(tiny_model), dtype="float32", max_length=max_length)
        return scored(named_model(str(tiny_model), settings), pairs, "M_0")

    lengths = [row["prompt_tokens"] + max(row["chosen_tokens"], row["rejected_tokens"]) for row in score(256)]
    middle = sorted(lengths)[len(lengths) // 2]
    for row, length in zip(score(middle), lengths, strict=True):
        assert (row["failure"] and row["failure"]["reason"]) == ("pair_too_long" if length > middle else None)


def made(generator: np.random.Generator, model: str, count: int) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "pair_id": f"{number:03}",
            "language": ("de", "fr", "th")[number % 3],
            "chosen_logps": float(generator.normal(-20, 5)),
            "rejected_logps": float(generator.normal(-21, 5)),
            "chosen_tokens": number % 4 + 3,
            "rejected_tokens": number % 5 + 2,
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "sigmoid_norm", "ipo", "simpo"])
def test_scores_by_language(loss_type: LossType) -> None:
    generator = np.random.default_rng(0)
    before, after = made(generator, "M_0", 60), made(generator, "M_1", 59)
    loss = LossSettings(loss_type, beta=0.3)
    scores = preference_scores([*before, *after], "M_0", "M_1", loss, ["de", "fr"], seed=4)
    assert [(row.language, row.seen, row.model) for row in scores] == [
        (language, seen, model)
        for language, seen in (("*", True), ("*", False), ("de", True), ("fr", True), ("th", False))
        for model in ("M_0", "M_1")
    ]

    def column(rows: list[dict[str, Any]], name: str) -> np.ndarray[Any, Any]:
        return np.array([row[name] for row in rows if row["language"] == "de"])

    tokens = [column(after, f"{side}_tokens") for side in ("chosen", "rejected")]
    if loss_type not in ("sigmoid_norm", "ipo", "simpo"):
        tokens = [1, 1]
    ratios = [
        (column(after, f"{side}_logps") - column(before[:59], f"{side}_logps")) / of
        for side, of in zip(("chosen", "rejected"), tokens, strict=True)
    ]
    expected = 0.3 * (ratios[0] - ratios[1])
    row = next(row for row in scores if (row.language, row.model) == ("de", "M_1"))
    assert row.pairs == len(expected) == 20
    assert row.margin == pytest.approx(expected.mean())
    assert row.accuracy == pytest.approx((expected > 0).mean())
    assert (row.margin_low, row.margin_high) == pytest.approx(bootstrap_interval(expected.tolist(), 4))
    right = column(after, "chosen_logps") > column(after, "rejected_logps")
    assert row.logp_accuracy == pytest.approx(right.mean())
    reference = next(row for row in scores if (row.language, row.model) == ("de", "M_0"))
    assert (reference.accuracy, reference.margin, reference.margin_low) == (None, None, None)
    # The pair that M_1 could not do is left out of both.
    assert {row.pairs for row in scores if row.language == "th"} == {19}


def test_margins_are_those_of_training() -> None:
    """The implicit reward's margin is what `preference_loss` calls rewards/margins, for DPO."""
    from congrad_ray.modeling.loss import ChosenRejected, preference_loss

    generator = np.random.default_rng(2)
    before, after = made(generator, "M_0", 12), made(generator, "M_1", 12)

    def both(rows: list[dict[str, Any]], name: str) -> ChosenRejected:
        return ChosenRejected(
            *(torch.tensor([row[f"{side}_{name}"] for row in rows]) for side in ("chosen", "rejected"))
        )

    loss = LossSettings(beta=0.2)
    _, metrics = preference_loss(both(after, "logps"), both(before, "logps"), loss, both(after, "tokens"))
    assert margins(after, before, loss) == pytest.approx(metrics["rewards/margins"].tolist(), abs=1e-5)
