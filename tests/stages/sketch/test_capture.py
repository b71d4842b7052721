from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from congrad_ray.config.training import Lora
from congrad_ray.modeling.adapters import with_adapter
from congrad_ray.modeling.batching import collate_pairs
from congrad_ray.modeling.logprobs import completion_logprobs
from congrad_ray.modeling.loss import DPO, ChosenRejected, LossSettings, preference_loss
from congrad_ray.modeling.packing import PairTokens, two_sequence_tokens
from congrad_ray.modeling.tokenization import TokenizedPair
from congrad_ray.stages.sketch.capture import GradientCapture
from congrad_ray.stages.sketch.countsketch import CountSketch, FoldRule
from congrad_ray.stages.sketch.exact import pair_gradient
from congrad_ray.stages.sketch.layers import UnsupportedLayers
from congrad_ray.stages.sketch.sketcher import SketchResult, sketch_pairs

BuildModel = Callable[[str], PreTrainedModel]
WIDTH = 512
# All that can share prompts, which is what pairs are computed with unless a test says otherwise.
SHARING = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "olmo2", "gpt2"]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative distance between rows."""
    return ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def assert_close(actual: SketchResult, expected: SketchResult, tolerance: float = 1e-5) -> None:
    assert relative(actual.sketches, expected.sketches) < tolerance
    for name in ("norms", "chosen_logps", "rejected_logps", "coefficients"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=tolerance, atol=tolerance)


def joined(results: list[SketchResult]) -> SketchResult:
    return SketchResult(*(torch.cat([getattr(one, name) for one in results]) for name in vars(results[0])))


def sketch(capture: GradientCapture, pairs: Sequence[TokenizedPair], fold: int = 1) -> SketchResult:
    return sketch_pairs(capture, CountSketch(WIDTH, 3, FoldRule(fold)), capture.layout(pairs))


class Whole:
    """A visitor that stores the whole u of every pair, which the engine itself never does."""

    def __init__(self) -> None:
        self.gradients: dict[str, list[torch.Tensor]] = {}

    def keep(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        return inputs

    def visit(self, name: str, kept: torch.Tensor, gradients: torch.Tensor, starts: Sequence[int]) -> None:
        self.gradients[name] = [gradients[start:end].T @ kept[start:end] for start, end in pairwise(starts)]


def assert_is_autograds(
    model: PreTrainedModel,
    pairs: Sequence[TokenizedPair],
    layers: str | None = None,
    loss: LossSettings = DPO,
    gradient_checkpointing: bool = False,
) -> GradientCapture:
    """u of every pair and its sketches against autograd's gradient of that pair alone."""
    folds = (1, 2)
    with GradientCapture(model, layers, loss, gradient_checkpointing) as capture:
        whole = Whole()
        capture.run(capture.layout(pairs), whole)
        found = {fold: sketch(capture, pairs, fold) for fold in folds}
    model.eval()
    for row, pair in enumerate(pairs):
        batch = collate_pairs([pair], pad_token_id=0)
        exact = pair_gradient(model, batch, layers, loss)
        assert exact.keys() == capture.layers.keys() == whole.gradients.keys()
        u = torch.cat([whole.gradients[name][row].flatten() for name in exact])
        expected = torch.cat([values.flatten() for values in exact.values()])
        assert expected.norm() > 1e-2
        assert relative(u, expected) < 1e-5
        torch.testing.assert_close(found[1].norms[row], expected.norm(), rtol=1e-5, atol=0.0)
        for fold in folds:
            same_map = CountSketch(WIDTH, 3, FoldRule(fold)).sketch_vector(exact)
            assert relative(found[fold].sketches[row], same_map) < 1e-5
        chosen, rejected = completion_logprobs(model, batch).detach()
        torch.testing.assert_close(found[1].chosen_logps[row], chosen, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1].rejected_logps[row], rejected, rtol=1e-5, atol=1e-5)
    return capture


@pytest.mark.parametrize("family", SHARING)
def test_gradients_and_sketches_are_autograds(
    build_model: BuildModel, pairs: list[TokenizedPair], family: str
) -> None:
    assert assert_is_autograds(build_model(family), pairs).why_not_shared is None


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2"])
def test_gradient_checkpointing_changes_nothing(
    build_model: BuildModel, pairs: list[TokenizedPair], family: str
) -> None:
    capture = assert_is_autograds(build_model(family), pairs, gradient_checkpointing=True)
    assert capture.why_not_shared is None


def test_gradient_checkpointing_keeps_no_layer_inputs(build_model: BuildModel, pairs: list[TokenizedPair]) -> None:
    counts = []
    for checkpointing in (False, True):
        with GradientCapture(build_model("llama"), gradient_checkpointing=checkpointing) as capture:
            whole = Whole()
            kept = []
            whole.keep = lambda name, inputs, kept=kept: kept.append(name) or inputs  # type: ignore[method-assign]
            capture.run(capture.layout(pairs), whole)
        counts.append(len(kept))
    # Once in the forward, whose copy is dropped, and once more in the backward.
    assert counts == [14, 28]


def test_lora_adapters_are_the_only_targets(build_model: BuildModel, pairs: list[TokenizedPair]) -> None:
    model = get_peft_model(build_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then so is the gradient of A
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    capture = assert_is_autograds(model.get_base_model(), pairs)
    assert len(capture.layers) == 8
    assert all("lora_" in name for name in capture.layers)
    with GradientCapture(model) as wrapped:
        assert wrapped.layers.keys() == capture.layers.keys()
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "loss",
    [
        LossSettings("sigmoid", length_penalty=0.05),
        LossSettings("sigmoid", sft_weight=0.5),
        LossSettings("sigmoid_norm", beta=5.0),
        LossSettings("ipo"),
        LossSettings("simpo", beta=2.0),
        LossSettings("orpo"),
    ],
    ids=lambda loss: f"{loss.loss_type}-{loss.sft_weight}",
)
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_c_times_u_is_minus_the_gradient_of_the_loss(
    build_model: BuildModel, pairs: list[TokenizedPair], loss: LossSettings, family: str
) -> None:
    model = build_model(family)
    assert_is_autograds(model, pairs, loss=loss)
    with GradientCapture(model, loss=loss) as capture:
        coefficients = sketch(capture, pairs).coefficients
        scaled = Whole()
        capture.run(capture.layout(pairs), scaled, times_coefficient=True)
    for row, pair in enumerate(pairs):
        batch = collate_pairs([pair], pad_token_id=0)
        policy = ChosenRejected(*completion_logprobs(model.eval(), batch).chunk(2))
        reference = ChosenRejected(*(logps.detach() for logps in policy))
        tokens = ChosenRejected(batch.chosen_tokens, batch.rejected_tokens)
        losses, _ = preference_loss(policy, reference, loss, tokens)
        weights = [layer.get_parameter("weight") for layer in capture.layers.values()]
        exact = pair_gradient(model, batch, loss=loss)
        for name, slope in zip(capture.layers, torch.autograd.grad(losses.sum(), weights), strict=True):
            for found in (coefficients[row] * exact[name], scaled.gradients[name][row]):
                torch.testing.assert_close(found, -slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max()))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_an_adapter_in_training_is_sketched_with_shared_prompts(
    build_model: BuildModel,
    pairs: list[TokenizedPair],
    family: str,
    use_dora: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapted = with_adapter(build_model(family), Lora(r=4, use_dora=use_dora, lora_dropout=0.5), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_magnitude" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    model = adapted.get_base_model()
    capture = assert_is_autograds(model, pairs)
    assert capture.why_not_shared is None
    linear = {name for name, module in model.named_modules() if name.endswith("base_layer")}
    assert {name.split(".lora_")[0] for name in capture.layers} == {
        name.removesuffix(".base_layer") for name in linear
    }
    assert len(capture.layers) == 2 * len(linear)
    assert_is_autograds(model, pairs, gradient_checkpointing=True)
    with GradientCapture(adapted) as capture:
        shared = sketch(capture, pairs)
        monkeypatch.setattr(capture, "why_not_shared", "the test says so")
        assert_close(shared, sketch(capture, pairs))


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_gradient_of_a_new_adapter_is_the_full_one_through_a(
    build_model: BuildModel, pairs: list[TokenizedPair], use_dora: bool
) -> None:
    full = Whole()
    with GradientCapture(build_model("llama")) as capture:
        capture.run(capture.layout(pairs), full)
    lora = Lora(r=4, lora_alpha=12, use_dora=use_dora)
    adapted = with_adapter(build_model("llama"), lora, seed=0)
    of_b = Whole()
    with GradientCapture(adapted) as capture:
        capture.run(capture.layout(pairs), of_b)
    # That of A is zero, so A is left out.
    assert set(of_b.gradients) == {f"{name}.lora_B.default" for name in full.gradients}
    for name, gradients in full.gradients.items():
        a = adapted.get_base_model().get_submodule(f"{name}.lora_A.default").weight
        for whole, found in zip(gradients, of_b.gradients[f"{name}.lora_B.default"], strict=True):
            assert relative(found.flatten(), 3 * (whole @ a.T).flatten()) < 1e-5
    for pair in pairs:
        exact = pair_gradient(adapted.get_base_model(), collate_pairs([pair], pad_token_id=0))
        assert exact.keys() == of_b.gradients.keys()


def test_layers_narrow_an_adapter_down(build_model: BuildModel, pairs: list[TokenizedPair]) -> None:
    adapted = with_adapter(build_model("llama"), Lora(r=4), seed=0)
    with GradientCapture(adapted, layers=r"layers\.1\.self_attn") as capture:
        assert list(capture.layers) == [f"model.layers.1.self_attn.{part}_proj.lora_B.default" for part in "qkvo"]
    with pytest.raises(UnsupportedLayers, match="no layer of LlamaForCausalLM matches 'nowhere'"):
        GradientCapture(adapted, layers="nowhere")


def test_a_model_that_cannot_share_prompts_computes_two_sequences(
    build_model: BuildModel, pairs: list[TokenizedPair]
) -> None:
    capture = assert_is_autograds(build_model("bloom"), pairs)
    assert capture.why_not_shared is not None
    assert capture.layout(pairs).input_ids.shape == (6, 21)


def test_layers_of_other_kinds_are_not_shared(build_model: BuildModel) -> None:
    model = build_model("qwen3")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with GradientCapture(model) as capture:
        assert capture.why_not_shared == "it has layers of type linear_attention"


@pytest.mark.parametrize("family", SHARING)
def test_shared_prompts_give_what_two_sequences_give(
    build_model: BuildModel, pairs: list[TokenizedPair], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(family)
    with GradientCapture(model) as capture:
        batch = capture.layout(pairs)
        assert batch.attention_mask is None and batch.positions == 45
        shared = sketch(capture, pairs)
        monkeypatch.setattr(capture, "why_not_shared", "the test says so")
        assert capture.layout(pairs).positions == 6 * 21
        assert_close(shared, sketch(capture, pairs))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom"])
def test_a_pair_does_not_depend_on_its_batch(
    build_model: BuildModel, pairs: list[TokenizedPair], family: str
) -> None:
    with GradientCapture(build_model(family)) as capture:
        for fold in (1, 4):
            together = sketch(capture, pairs, fold)
            assert_close(together, joined([sketch(capture, [pair], fold) for pair in pairs]))
            again = sketch(capture, pairs, fold)
            assert all(torch.equal(one, vars(together)[name]) for name, one in vars(again).items())


def padded_by(batch: PairTokens, columns: int, token: int) -> PairTokens:
    """Two-sequence tokens with more padding at the right."""
    rows, width = batch.input_ids.shape
    indexes = torch.arange(rows * width).view(rows, width)
    moved = indexes + indexes // width * columns

    assert batch.attention_mask is not None
    return PairTokens(
        input_ids=torch.nn.functional.pad(batch.input_ids, (0, columns), value=token),
        position_ids=torch.arange(width + columns).expand(rows, -1),
        attention_mask=torch.nn.functional.pad(batch.attention_mask, (0, columns)),
        starts=tuple(start // width * (width + columns) for start in batch.starts),
        states=moved.flatten()[batch.states],
        targets=batch.targets,
        completions=batch.completions,
        chosen_tokens=batch.chosen_tokens,
        rejected_tokens=batch.rejected_tokens,
        attention=None,
        attention_padding=tuple(2 * columns + number for number in batch.attention_padding),
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_padding_makes_no_difference(build_model: BuildModel, pairs: list[TokenizedPair], family: str) -> None:
    batch = two_sequence_tokens(pairs, pad_token_id=0)
    count_sketch = CountSketch(WIDTH, 3)
    with GradientCapture(build_model(family)) as capture:
        expected = sketch_pairs(capture, count_sketch, batch)
        assert_close(sketch_pairs(capture, count_sketch, padded_by(batch, 9, token=0)), expected)
        assert_close(sketch_pairs(capture, count_sketch, padded_by(batch, 9, token=42)), expected)


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


def test_exchanging_chosen_and_rejected_turns_the_sign(
    build_model: BuildModel, pairs: list[TokenizedPair]
) -> None:
    turned = [TokenizedPair(pair.prompt_ids, pair.rejected_ids, pair.chosen_ids) for pair in pairs]
    with GradientCapture(build_model("llama")) as capture:
        one, other = sketch(capture, pairs), sketch(capture, turned)
    assert relative(other.sketches, -one.sketches) < 1e-5
    torch.testing.assert_close(other.norms, one.norms)


def test_layers_narrow_the_gradient_down(build_model: BuildModel, pairs: list[TokenizedPair]) -> None:
    capture = assert_is_autograds(build_model("llama"), pairs, layers=r"layers\.1\.self_attn")
    assert list(capture.layers) == [f"model.layers.1.self_attn.{part}_proj" for part in "qkvo"]
    uncovered = capture.uncovered_parameters()
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"} <= set(
        uncovered
    )
    assert "model.layers.1.self_attn.q_proj.weight" not in uncovered
    assert len(uncovered) + 4 == len(list(capture.model.named_parameters()))


def test_bfloat16_is_near_the_exact(build_model: BuildModel, pairs: list[TokenizedPair]) -> None:
    count_sketch = CountSketch(WIDTH, 3)
    with GradientCapture(build_model("llama")) as capture:
        expected = sketch(capture, pairs)
        products = sketch_pairs(capture, count_sketch, capture.layout(pairs), torch.bfloat16)
    with GradientCapture(build_model("llama").to(torch.bfloat16)) as capture:
        assert capture.why_not_shared is None
        result = sketch(capture, pairs)
    assert result.sketches.dtype == result.norms.dtype == torch.float32
    assert_close(products, expected, tolerance=0.02)
    assert_close(result, expected, tolerance=0.05)


def test_close_gives_the_model_back(build_model: BuildModel, pairs: list[TokenizedPair]) -> None:
    model = build_model("llama")
    model.train()
    model.model.norm.eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    attention = model.config._attn_implementation
    before = [dict(vars(module)) for module in model.model.layers]
    with GradientCapture(model, gradient_checkpointing=True) as capture:
        one, other = sketch(capture, pairs), sketch(capture, pairs)
        assert_close(one, other)  # attention dropout would make them differ
        assert model.config._attn_implementation == attention
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [dict(vars(module)) for module in model.model.layers] == before
    for module in model.modules():
        assert not module._forward_hooks
    with pytest.raises(ValueError, match=r"this GradientCapture is closed"):
        sketch(capture, pairs)


def test_layers_that_cannot_be_covered_are_refused(build_model: BuildModel, pairs: list[TokenizedPair]) -> None:
    with pytest.raises(UnsupportedLayers, match=r"several experts in one tensor \(model\.layers\.0\.mlp\.experts"):
        GradientCapture(build_model("mixtral"))
    with pytest.raises(UnsupportedLayers, match=r"no layer of LlamaForCausalLM matches 'nowhere'.*q_proj"):
        GradientCapture(build_model("llama"), layers="nowhere")
    with pytest.raises(UnsupportedLayers, match="matches 'lm_head'"):
        GradientCapture(build_model("llama"), layers="lm_head")
    # The experts can be left out knowingly.
    with GradientCapture(build_model("mixtral"), layers="self_attn") as capture:
        assert (sketch(capture, pairs).norms > 0).all()
        assert "model.layers.0.mlp.experts.gate_up_proj" in capture.uncovered_parameters()


def test_a_layer_used_twice_is_refused_and_the_model_survives(
    build_model: BuildModel, pairs: list[TokenizedPair]
) -> None:
    model = build_model("llama")
    model.model.layers[1] = model.model.layers[0]
    with GradientCapture(model) as capture:
        with pytest.raises(UnsupportedLayers, match=r"'model\.layers\.0\.mlp\.down_proj' is used more than once"):
            sketch(capture, pairs)
        model(torch.tensor([[1, 2, 3]]))  # a forward outside of a pass is not captured
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
        GradientCapture(model) as capture,
        pytest.raises(UnsupportedLayers, match=r"mlp\.inner\.gate_proj' sees inputs of shape \(45, 32\)"),
    ):
        sketch(capture, pairs)


def test_the_engine_needs_neither_ray_nor_vllm_nor_deepspeed() -> None:
    code = (
        "import sys; sys.modules.update(ray=None, vllm=None, deepspeed=None)\n"
        "from congrad_ray.stages.sketch import audit, capture, exact, memory, sketcher, storage\n"
        "from congrad_ray.stages.select import directions, keep, scores"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_oracle_takes_one_pair_and_leaves_the_model_alone(
    build_model: BuildModel, pairs: list[TokenizedPair]
) -> None:
    model = build_model("llama").requires_grad_(False)
    exact = pair_gradient(model, collate_pairs(pairs[:1], pad_token_id=0))
    assert exact["model.layers.0.mlp.up_proj"].shape == (48, 32)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match="has 3 pairs"):
        pair_gradient(model, collate_pairs(pairs, pad_token_id=0))
