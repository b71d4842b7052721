from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from congrad_ray.gradient.capture import PairGradientSketcher, SketchResult
from congrad_ray.gradient.exact import pair_gradient
from congrad_ray.gradient.layers import UnsupportedLayers
from congrad_ray.preference.batching import PairBatch, collate_pairs
from congrad_ray.preference.logprobs import completion_logprobs
from congrad_ray.preference.tokenization import TokenizedPair

BuildModel = Callable[[str], PreTrainedModel]
WIDTH = 512


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative distance between rows."""
    return ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def assert_close(actual: SketchResult, expected: SketchResult, tolerance: float = 1e-5) -> None:
    assert relative(actual.sketches, expected.sketches) < tolerance
    for name in ("norms", "chosen_logps", "rejected_logps"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=tolerance, atol=tolerance)


def padded_by(batch: PairBatch, columns: int, token: int) -> PairBatch:
    return PairBatch(
        torch.nn.functional.pad(batch.input_ids, (0, columns), value=token),
        torch.nn.functional.pad(batch.attention_mask, (0, columns)),
        torch.nn.functional.pad(batch.completion_mask, (0, columns)),
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_sketches_and_norms_are_those_of_autograds_gradient(
    build_model: BuildModel, pairs: list[TokenizedPair], family: str
) -> None:
    model = build_model(family)
    with PairGradientSketcher(model, WIDTH, seed=3) as sketcher:
        result = sketcher.sketch(collate_pairs(pairs, pad_token_id=0))
    assert result.sketches.shape == (len(pairs), WIDTH)
    for tensor in vars(result).values():
        assert tensor.dtype == torch.float32 and not tensor.requires_grad and tensor.isfinite().all()
    model.eval()
    for row, pair in enumerate(pairs):
        batch = collate_pairs([pair], pad_token_id=0)
        exact = pair_gradient(model, batch)
        assert exact.keys() == sketcher.layers.keys()
        norm = torch.stack([values.square().sum() for values in exact.values()]).sum().sqrt()
        assert norm > 0.1
        assert relative(result.sketches[row], sketcher.count_sketch.sketch_vector(exact)) < 1e-5
        torch.testing.assert_close(result.norms[row], norm, rtol=1e-5, atol=0.0)
        chosen, rejected = completion_logprobs(model, batch).detach()
        torch.testing.assert_close(result.chosen_logps[row], chosen, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result.rejected_logps[row], rejected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_oracle_moves_the_margin_by_its_own_squared_norm(
    build_model: BuildModel, pairs: list[TokenizedPair], family: str
) -> None:
    """Against finite differences, so that the oracle is not judged by autograd alone."""
    model = build_model(family).double().eval()
    batch = collate_pairs(pairs[:1], pad_token_id=0)
    exact = pair_gradient(model, batch)

    def margin(step: float) -> float:
        with torch.no_grad():
            for name, values in exact.items():
                weight = model.get_submodule(name).weight
                moved = values.T if family == "gpt2" else values  # Conv1D keeps (in, out)
                weight += step * moved.double()
            # Not through completion_logprobs, whose log-softmax is float32 and too coarse for small steps.
            logprobs = model(batch.input_ids).logits.log_softmax(-1)[:, :-1]
            token_logprobs = logprobs.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
            chosen, rejected = (token_logprobs * batch.completion_mask[:, 1:]).sum(dim=1).tolist()
        return chosen - rejected

    step = 1e-6
    ahead = margin(step)
    behind = margin(-2 * step)
    squared_norm = sum(values.double().square().sum().item() for values in exact.values())
    assert (ahead - behind) / (2 * step) == pytest.approx(squared_norm, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_pair_does_not_depend_on_its_batch(
    build_model: BuildModel, pairs: list[TokenizedPair], family: str
) -> None:
    with PairGradientSketcher(build_model(family), WIDTH, seed=3) as sketcher:
        together = sketcher.sketch(collate_pairs(pairs, pad_token_id=0))
        alone = [sketcher.sketch(collate_pairs([pair], pad_token_id=0)) for pair in pairs]
    assert_close(
        together,
        SketchResult(*(torch.cat([getattr(one, name) for one in alone]) for name in vars(together))),
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_padding_makes_no_difference(build_model: BuildModel, pairs: list[TokenizedPair], family: str) -> None:
    batch = collate_pairs(pairs, pad_token_id=0)
    with PairGradientSketcher(build_model(family), WIDTH, seed=3) as sketcher:
        expected = sketcher.sketch(batch)
        assert_close(sketcher.sketch(padded_by(batch, 9, token=0)), expected)
        assert_close(sketcher.sketch(padded_by(batch, 9, token=42)), expected)


def test_output_gradients_at_padding_are_zero(build_model: BuildModel, pairs: list[TokenizedPair]) -> None:
    batch = collate_pairs(pairs, pad_token_id=0)
    padding = batch.attention_mask == 0
    seen = []
    with PairGradientSketcher(build_model("llama"), WIDTH, seed=3) as sketcher:
        consume = sketcher._consume

        def spy(name: str, activations: torch.Tensor, output_gradients: torch.Tensor) -> None:
            seen.append((name, output_gradients[padding].abs().max().item()))
            consume(name, activations, output_gradients)

        sketcher._consume = spy  # type: ignore[method-assign]
        sketcher.sketch(batch)
    assert padding.any()
    assert sorted(name for name, _ in seen) == sorted(sketcher.layers)
    assert {largest for _, largest in seen} == {0.0}


def test_chunks_of_tokens_and_of_pairs_change_nothing(
    build_model: BuildModel, pairs: list[TokenizedPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate_pairs(pairs, pad_token_id=0)
    with PairGradientSketcher(build_model("llama"), WIDTH, seed=3) as sketcher:
        expected = sketcher.sketch(batch)
    monkeypatch.setattr("congrad_ray.gradient.capture._GRADIENT_ENTRIES", 2 * 32 * 48)
    with PairGradientSketcher(build_model("llama"), WIDTH, seed=3, chunk_tokens=3, cache_bytes=0) as sketcher:
        assert_close(sketcher.sketch(batch), expected)


def test_exchanging_chosen_and_rejected_turns_the_sign(
    build_model: BuildModel, pairs: list[TokenizedPair]
) -> None:
    turned = [TokenizedPair(pair.prompt_ids, pair.rejected_ids, pair.chosen_ids) for pair in pairs]
    with PairGradientSketcher(build_model("llama"), WIDTH, seed=3) as sketcher:
        one = sketcher.sketch(collate_pairs(pairs, pad_token_id=0))
        other = sketcher.sketch(collate_pairs(turned, pad_token_id=0))
    assert relative(other.sketches, -one.sketches) < 1e-5
    torch.testing.assert_close(other.norms, one.norms)


def test_layers_narrow_the_gradient_down(build_model: BuildModel, pairs: list[TokenizedPair]) -> None:
    model = build_model("llama")
    batch = collate_pairs(pairs[:1], pad_token_id=0)
    with PairGradientSketcher(model, WIDTH, seed=3, layers=r"layers\.1\.self_attn") as sketcher:
        assert list(sketcher.layers) == [f"model.layers.1.self_attn.{part}_proj" for part in "qkvo"]
        result = sketcher.sketch(batch)
        uncovered = sketcher.uncovered_parameters()
    model.eval()
    exact = pair_gradient(model, batch, layers=r"layers\.1\.self_attn")
    assert relative(result.sketches[0], sketcher.count_sketch.sketch_vector(exact)) < 1e-5
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"} <= set(
        uncovered
    )
    assert "model.layers.1.self_attn.q_proj.weight" not in uncovered
    assert len(uncovered) + 4 == len(list(model.named_parameters()))


def test_bfloat16_model_gives_float32_near_the_exact(build_model: BuildModel, pairs: list[TokenizedPair]) -> None:
    batch = collate_pairs(pairs, pad_token_id=0)
    with PairGradientSketcher(build_model("llama"), WIDTH, seed=3) as sketcher:
        expected = sketcher.sketch(batch)
    with PairGradientSketcher(build_model("llama").to(torch.bfloat16), WIDTH, seed=3) as sketcher:
        result = sketcher.sketch(batch)
    assert result.sketches.dtype == result.norms.dtype == torch.float32
    assert_close(result, expected, tolerance=0.05)


def test_close_gives_the_model_back(build_model: BuildModel, pairs: list[TokenizedPair]) -> None:
    model = build_model("llama")
    model.train()
    model.model.norm.eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    batch = collate_pairs(pairs, pad_token_id=0)
    with PairGradientSketcher(model, WIDTH, seed=3) as sketcher:
        assert not model.training  # attention dropout would make two sketches differ
        one, other = sketcher.sketch(batch), sketcher.sketch(batch)
        assert_close(one, other)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks
    with pytest.raises(ValueError, match="closed"):
        sketcher.sketch(batch)


def test_layers_that_cannot_be_covered_are_refused(build_model: BuildModel, pairs: list[TokenizedPair]) -> None:
    with pytest.raises(UnsupportedLayers, match=r"several experts in one tensor \(model\.layers\.0\.mlp\.experts"):
        PairGradientSketcher(build_model("mixtral"), WIDTH, seed=3)
    with pytest.raises(UnsupportedLayers, match=r"no layer of LlamaForCausalLM matches 'nowhere'.*q_proj"):
        PairGradientSketcher(build_model("llama"), WIDTH, seed=3, layers="nowhere")
    with pytest.raises(UnsupportedLayers, match="matches 'lm_head'"):
        PairGradientSketcher(build_model("llama"), WIDTH, seed=3, layers="lm_head")
    # The experts can be left out knowingly.
    batch = collate_pairs(pairs, pad_token_id=0)
    with PairGradientSketcher(build_model("mixtral"), WIDTH, seed=3, layers="self_attn") as sketcher:
        assert (sketcher.sketch(batch).norms > 0).all()
        assert "model.layers.0.mlp.experts.gate_up_proj" in sketcher.uncovered_parameters()


def test_a_layer_used_twice_is_refused_and_the_model_survives(
    build_model: BuildModel, pairs: list[TokenizedPair]
) -> None:
    model = build_model("llama")
    model.model.layers[1] = model.model.layers[0]
    batch = collate_pairs(pairs, pad_token_id=0)
    with PairGradientSketcher(model, WIDTH, seed=3) as sketcher:
        with pytest.raises(
            UnsupportedLayers, match=r"'model\.layers\.0\.self_attn\.q_proj' is used more than once"
        ):
            sketcher.sketch(batch)
        model(batch.input_ids)  # a forward outside of sketch is not captured
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_inputs_without_rows_are_refused(build_model: BuildModel, pairs: list[TokenizedPair]) -> None:
    model = build_model("llama")

    class Flattening(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.inner(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

    model.model.layers[0].mlp = Flattening(model.model.layers[0].mlp)
    with (
        PairGradientSketcher(model, WIDTH, seed=3) as sketcher,
        pytest.raises(UnsupportedLayers, match=r"mlp\.inner\.gate_proj' sees inputs of shape \(126, 32\)"),
    ):
        sketcher.sketch(collate_pairs(pairs, pad_token_id=0))


def test_oracle_takes_one_pair_and_leaves_the_model_alone(
    build_model: BuildModel, pairs: list[TokenizedPair]
) -> None:
    model = build_model("llama").requires_grad_(False)
    exact = pair_gradient(model, collate_pairs(pairs[:1], pad_token_id=0))
    assert exact["model.layers.0.mlp.up_proj"].shape == (48, 32)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match="has 3 pairs"):
        pair_gradient(model, collate_pairs(pairs, pad_token_id=0))
