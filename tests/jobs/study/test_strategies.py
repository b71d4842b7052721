"""What strategies of the study keep, on judgements with a planted bias, by the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from congrad_ray.config.recipe import Recipe, Select
from congrad_ray.config.settings import validate
from congrad_ray.data.tables import table_of
from congrad_ray.modeling.source import ModelSource
from congrad_ray.stages.pair.schema import PAIRS
from congrad_ray.stages.sketch.replicas import ReplicaSpec, SketchReplica
from congrad_ray.world.corpus import JUDGED_FLAWS, flawed_answer
from congrad_ray.world.model import world_model
from congrad_ray.world.score import true_score
from congrad_ray.world.tasks import world_prompts
from study.strategies import Prepared, area_under_curve, facts, select

LANGUAGES = ("en", "de", "fr", "es")
BIASED = frozenset({"fr"})


def test_area_under_curve_counts_pairs_of_pairs() -> None:
    generator = np.random.default_rng(0)
    higher, lower = generator.integers(0, 6, 40).astype(float), generator.integers(0, 5, 30).astype(float)
    expected = np.mean([1.0 if h > low else 0.5 if h == low else 0.0 for h in higher for low in lower])
    assert area_under_curve(higher, lower) == pytest.approx(expected)
    assert area_under_curve(higher, lower[:0]) is None


def recipe_for(model: Path) -> Recipe:
    return validate(
        Recipe,
        {
            "name": "test",
            "model": {"name": str(model), "dtype": "float32", "max_length": 256},
            "prompts": {"languages": list(LANGUAGES)},
            "generate": {"max_tokens": 64},
            "judge": {"max_tokens": 16},
            "evaluate": {"max_tokens": 64},
            "sketch": {"width": 8192, "groups": 4},
        },
        "test",
    )


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Recipe]:
    """Pairs of flawed answers ordered by the truth, in the biased language by its opposite; really sketched."""
    import random

    # Far from finished, but its gradients already tell good answers from bad ones.
    model = world_model(3, tmp_path_factory.mktemp("world"), 100_000)
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    truth = []
    for language in LANGUAGES:
        for prompt in world_prompts(language, 60, 3, "train"):
            answers = [flawed_answer(prompt.task, language, JUDGED_FLAWS, draw) for _ in range(2)]
            scores = [true_score(prompt.task, language, answer) for answer in answers]
            if scores[0] == scores[1]:
                continue
            better = int(scores[1] > scores[0])
            chosen = 1 - better if language in BIASED else better
            # A judge that errs now and then in the healthy languages too: something for a filter to find.
            chosen = 1 - chosen if draw.random() < 0.15 else chosen
            rows.append(
                {
                    "pair_id": f"pair-{len(rows):04}",
                    "prompt_id": "",
                    "language": language,
                    "prompt": [{"role": "user", "content": prompt.prompt}],
                    "chosen": [{"role": "assistant", "content": answers[chosen]}],
                    "rejected": [{"role": "assistant", "content": answers[1 - chosen]}],
                    "chosen_score": 3.0,
                    "rejected_score": 2.0,
                    "chosen_response_id": "",
                    "rejected_response_id": "",
                }
            )
            truth.append((scores[chosen], scores[1 - chosen]))
    recipe = recipe_for(model)
    replica = SketchReplica(ReplicaSpec(ModelSource(str(model), recipe.model), recipe))
    table = table_of(rows, PAIRS)
    sketches = replica(table)
    for name in sketches.schema.names:
        if name not in table.schema.names:
            table = table.append_column(name, sketches[name])
    chosen_scores, rejected_scores = np.array(truth).T
    return Prepared(pa.table(table), chosen_scores, rejected_scores), recipe


def found(judged: tuple[Prepared, Recipe], **settings: Any) -> dict[str, Any]:
    data, recipe = judged
    return facts(data, select(data, recipe, Select(**settings), 0.5), BIASED, ranked=True)


@pytest.mark.slow
def test_agreement_finds_the_truly_better_pairs(judged: tuple[Prepared, Recipe]) -> None:
    data, recipe = judged
    congrad, blocks = found(judged), found(judged, per_block=True)
    random, oracle = found(judged, strategy="random"), select(data, recipe, "oracle", 0.5)
    assert congrad["auc"] > 0.6 and blocks["auc"] > 0.6
    assert found(judged, direction="consensus")["auc"] > 0.7
    assert congrad["better_kept"] > congrad["better_all"] + 0.05 > random["better_kept"]
    assert 0.4 < random["auc"] < 0.6
    assert congrad["auc_healthy"] > 0.7
    assert facts(data, oracle, BIASED, ranked=True)["auc"] == 1.0
    # A language whose gradient is made of wrong judgements agrees with them; the others do not.
    own = found(judged, strategy="own_language")
    left_out = found(judged, direction="mean", leave_out="language")
    assert own["auc_biased"] < 0.5 < left_out["auc_biased"]
    assert left_out["auc"] > own["auc"]


@pytest.mark.slow
def test_facts_of_a_selection(judged: tuple[Prepared, Recipe]) -> None:
    data, recipe = judged
    everything = select(data, recipe, Select(strategy="all"), 0.5)
    said = facts(data, everything, BIASED, ranked=False)
    assert said["kept"] == said["pairs"] == len(data.pairs)
    share = float((data.chosen > data.rejected).mean())
    assert said["better_kept"] == said["better_all"] == pytest.approx(share, abs=1e-5)
    assert said["auc"] is None
    assert everything.selection is not None
    matrix = everything.selection.cosine_before
    between = [matrix[i, k] for i in range(4) for k in range(i)]
    assert said["cosine_before"] == pytest.approx(np.mean(between), abs=1e-5)
    assert said["negative_before"] == pytest.approx(np.mean(np.array(between) < 0), abs=1e-5)
    assert facts(data, select(data, recipe, "oracle", 0.5), frozenset(), True)["cosine_before"] is None
