"""u, its sketches and log-probabilities of real models and real pairs in five languages, against autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from congrad_ray.config.recipe import Model
from congrad_ray.modeling.batching import collate_pairs
from congrad_ray.modeling.source import named_model
from congrad_ray.modeling.tokenization import TokenizedPair, tokenize_pair
from congrad_ray.stages.sketch.capture import GradientCapture, pair_segments
from congrad_ray.stages.sketch.countsketch import CountSketch
from congrad_ray.stages.sketch.exact import pair_gradient
from congrad_ray.stages.sketch.sketcher import audited_sketches

pytestmark = pytest.mark.real

LANGUAGES = ("en", "es", "de", "fr", "ru")
MAX_TOKENS = 150
TOLERANCE = 1e-4


def messages(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


class Differences:
    """A visitor that compares each layer's part of each pair's u with autograd's gradient."""

    def __init__(self, exact: Sequence[dict[str, Tensor]]) -> None:
        self._exact = exact
        self.largest: dict[str, float] = {}

    def keep(self, name: str, inputs: Tensor) -> Tensor:
        return inputs

    def visit(self, name: str, kept: Tensor, gradients: Tensor, starts: Sequence[int]) -> None:
        self.largest[name] = max(
            float(
                (gradients[part].T @ kept[part] - self._exact[pair][name]).norm() / self._exact[pair][name].norm()
            )
            for pair, part in pair_segments(starts)
        )


@torch.no_grad()
def logps_of_logits(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> Tensor:
    """The summed log-probability of a completion by the model's own logits."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name, chat", [("smollm2", True), ("gemma3-270m", False), ("gemma3-270m", True)], ids=str)
def test_real_pairs_against_autograd(
    name: str, chat: bool, real_model: Callable[[str], Path], short_rows: Any, request: pytest.FixtureRequest
) -> None:
    template = request.getfixturevalue("gemma_template") if chat and name.startswith("gemma") else None
    settings = Model(name=name, dtype="float32", chat_template=str(template) if template else None)
    source = named_model(str(real_model(name)), settings)
    tokenizer, model = source.load_tokenizer(), source.load_model("cpu")
    pairs: list[TokenizedPair] = []
    for language in LANGUAGES:
        row = short_rows("preferences.jsonl", language, 8)[-1]
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        if chat:
            prompt, chosen, rejected = (
                messages("user", prompt),
                messages("assistant", chosen),
                messages("assistant", rejected),
            )
        pairs.append(tokenize_pair(tokenizer, prompt, chosen, rejected, MAX_TOKENS))

    exact = [pair_gradient(model, collate_pairs([pair], pad_token_id=0)) for pair in pairs]
    sketch, differences = CountSketch(32768, seed=0), Differences(exact)
    with GradientCapture(model) as capture:
        assert capture.why_not_shared is None
        batch = capture.layout(pairs)
        capture.run(batch, differences)
        found, gram = audited_sketches(capture, sketch, batch)

    assert differences.largest.keys() == exact[0].keys()
    assert max(differences.largest.values()) < TOLERANCE, differences.largest
    expected = torch.stack(
        [
            torch.stack([sum((a[layer] * b[layer]).sum(dtype=torch.float64) for layer in a) for b in exact])
            for a in exact
        ]
    )
    norms = expected.diagonal().sqrt()
    assert ((gram - expected).abs() / (norms[:, None] * norms)).max() < TOLERANCE
    for row, (pair, layers) in enumerate(zip(pairs, exact, strict=True)):
        same_map = sketch.sketch_vector(layers)
        assert (found.sketches[row] - same_map).norm() / same_map.norm() < TOLERANCE
        for logp, ids in (
            (found.chosen_logps[row], pair.chosen_ids),
            (found.rejected_logps[row], pair.rejected_ids),
        ):
            by_logits = logps_of_logits(model, pair.prompt_ids, ids)
            torch.testing.assert_close(logp, by_logits, rtol=1e-5, atol=1e-3)
    sketched = found.sketches.double()
    cosines = torch.nn.functional.normalize(sketched) @ torch.nn.functional.normalize(sketched).T
    # A count-sketch's error in a cosine is about 1 / sqrt(width) = 0.006; folding adds to it.
    assert (cosines - expected / (norms[:, None] * norms)).abs().max() < 0.05
