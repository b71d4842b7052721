"""The loss that a recipe trains with decides what is sketched: from rows of pairs to rows of the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from congrad_ray.config.recipe import Recipe
from congrad_ray.config.settings import SettingsError, validate
from congrad_ray.config.training import Train
from congrad_ray.data.preferences import PREFERENCES
from congrad_ray.data.tables import table_of
from congrad_ray.modeling.batching import collate_pairs
from congrad_ray.modeling.logprobs import completion_logprobs
from congrad_ray.modeling.loss import ChosenRejected, loss_settings, margin_weights, preference_loss
from congrad_ray.modeling.source import ModelSource
from congrad_ray.modeling.tokenization import tokenize_pair
from congrad_ray.pipeline.runner import by_name
from congrad_ray.rundir.directory import RunDirectory
from congrad_ray.stages.pair.schema import PAIRS
from congrad_ray.stages.sketch.countsketch import CountSketch
from congrad_ray.stages.sketch.layers import target_layers, weight_as_out_in
from congrad_ray.stages.sketch.replicas import LANGUAGE_GRADIENTS, ReplicaSpec, SketchReplica, SummingReplica
from congrad_ray.stages.sketch.schema import sketch_numbers, sketches_schema
from congrad_ray.stages.sketch.stage import STAGE, check_judged

WIDTH = 256
TEXTS = [
    ("How are you?", "Fine, the fox is quick.", "The dog", 4.0, 1.0),
    ("2 + 2", "4", "5 6 7 8 9 0 1 2 3", 3.0, 2.5),
    ("Wie geht es dir?", "Der Fuchs ist schnell.", "Faul", 5.0, 4.0),
]
LOSSES: list[dict[str, Any]] = [
    {"loss_type": "sigmoid_norm", "beta": 5.0},
    {"loss_type": "orpo"},
    {"loss_type": "simpo", "beta": 2.0, "margin_weighting": True},
    {"margin_weighting": True, "length_penalty": 0.02, "sft_weight": 0.5},
]
every_loss = pytest.mark.parametrize("train", LOSSES, ids=lambda train: train.get("loss_type", "sigmoid"))


def recipe_for(model: Path, train: dict[str, Any], **sketch: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "test",
        "model": {"name": str(model), "dtype": "float32", "max_length": 64},
        "prompts": {"languages": ["en", "de"]},
        "generate": {"max_tokens": 16},
        "judge": {"max_tokens": 16},
        "evaluate": {"max_tokens": 16},
        "sketch": {"width": WIDTH, "dtype": "float32", "max_tokens_per_batch": 256, **sketch},
        "train": train,
    }
    return validate(Recipe, values, "test")


def message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def rows() -> pa.Table:
    return table_of(
        [
            {
                "pair_id": f"pair-{number}",
                "prompt_id": f"prompt-{number}",
                "language": "de" if prompt.startswith("Wie") else "en",
                "prompt": message("user", prompt),
                "chosen": message("assistant", chosen),
                "rejected": message("assistant", rejected),
                "chosen_score": chosen_score,
                "rejected_score": rejected_score,
                "chosen_response_id": "a",
                "rejected_response_id": "b",
            }
            for number, (prompt, chosen, rejected, chosen_score, rejected_score) in enumerate(TEXTS)
        ],
        PAIRS,
    )


def slopes(source: ModelSource, train: Train) -> list[dict[str, torch.Tensor]]:
    """Minus autograd's gradients of the pairs' weighted losses, by layer, the policy being the reference."""
    tokenizer, model = source.load_tokenizer(), source.load_model("cpu").eval()
    layers = target_layers(model, None)
    weights = [layer.get_parameter("weight").requires_grad_(True) for layer in layers.values()]
    found = []
    for prompt, chosen, rejected, *scores in TEXTS:
        texts = message("user", prompt), message("assistant", chosen), message("assistant", rejected)
        batch = collate_pairs([tokenize_pair(tokenizer, *texts, 64)], 2, "cpu")
        policy = ChosenRejected(*completion_logprobs(model, batch).chunk(2))
        reference = ChosenRejected(*(logps.detach() for logps in policy))
        tokens = ChosenRejected(batch.chosen_tokens, batch.rejected_tokens)
        factor = margin_weights(*torch.tensor(scores)[:, None]) if train.margin_weighting else None
        losses, _ = preference_loss(policy, reference, loss_settings(train), tokens, factor)
        gradients = torch.autograd.grad(losses.sum(), weights)
        pairs = zip(layers.items(), gradients, strict=True)
        found.append({name: -weight_as_out_in(layer, gradient) for (name, layer), gradient in pairs})
    return found


@every_loss
def test_coefficient_times_sketch_is_that_of_the_losss_gradient(tiny_model: Path, train: dict[str, Any]) -> None:
    recipe = recipe_for(tiny_model, train)
    source = ModelSource(str(tiny_model), recipe.model)
    found = SketchReplica(ReplicaSpec(source, recipe))(rows()).to_pylist()
    numbers = sketch_numbers(table_of(found, sketches_schema(WIDTH, "float32")), "float32")
    for row, sketch, slope in zip(found, numbers, slopes(source, recipe.train), strict=True):
        expected = CountSketch(WIDTH, recipe.sketch.seed).sketch_vector(slope)
        scaled = row["coefficient"] * torch.from_numpy(sketch.copy())
        assert row["coefficient"] > 0
        assert (scaled - expected).norm() < 1e-4 * expected.norm()


@every_loss
def test_the_exact_method_adds_up_the_losss_gradients(
    tiny_model: Path, train: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import save

    recipe = recipe_for(tiny_model, train, method="exact")
    source = ModelSource(str(tiny_model), recipe.model)
    summing = SummingReplica(ReplicaSpec(source, recipe), ["de", "en"])
    assert summing.add(rows()) == 3
    sums, counts = summing.sums()
    assert counts == [1, 2]
    of_pairs = slopes(source, recipe.train)
    for name, found in sums.items():
        expected = torch.stack([of_pairs[2][name], of_pairs[0][name] + of_pairs[1][name]])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    folder = RunDirectory.open(tmp_path).stage("sketches", 0)
    folder.write_bytes(LANGUAGE_GRADIENTS, save(sums))
    projected = SketchReplica(ReplicaSpec(source, recipe), exact=folder)(rows()).to_pylist()
    for row, slope in zip(projected, of_pairs, strict=True):
        norm = sum(float(values.double().square().sum()) for values in slope.values()) ** 0.5
        assert row["coefficient"] * row["norm"] == pytest.approx(norm, rel=1e-4)


def test_pairs_without_scores_cannot_be_weighted_by_them(tiny_model: Path) -> None:
    recipe = recipe_for(tiny_model, {"margin_weighting": True})
    check_judged(recipe, PAIRS.names)
    with pytest.raises(SettingsError, match=r"train\.margin_weighting .* no chosen_score, rejected_score"):
        check_judged(recipe, PREFERENCES.names)
    check_judged(recipe_for(tiny_model, {}), PREFERENCES.names)


def test_what_sketches_are_known_by(tiny_model: Path) -> None:
    """Of training only the loss matters, and what earlier versions recorded is recorded still."""

    def settings(train: dict[str, Any]) -> Any:
        return STAGE.settings(recipe_for(tiny_model, train), 0)

    plain = settings({})
    assert plain[1]["average_log_prob"] is False and plain[2:] == [0.1, 0.0]
    assert settings({"learning_rate": 1e-3}) == plain
    found = [settings(train) for train in [*LOSSES, {"beta": 0.2}]]
    assert all(one != other for number, one in enumerate(found) for other in [plain, *found[:number]])
    assert by_name(settings({"loss_type": "orpo"}))["train"] == {"loss_type": "orpo"}
    assert by_name(plain)["sketch"]["width"] == WIDTH
