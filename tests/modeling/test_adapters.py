"""LoRA adapters: new, saved, merged; a policy that is one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pyarrow.fs import LocalFileSystem
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from congrad_ray.config.recipe import Model
from congrad_ray.config.training import Lora, Train
from congrad_ray.modeling.adapters import (
    check_quantization,
    load_adapter,
    merge_into,
    merged_policy,
    model_to_train,
    save_adapter,
    with_adapter,
)
from congrad_ray.modeling.source import ModelError, ModelSource, named_model
from congrad_ray.rundir.directory import Folder

IDS = torch.tensor([[5, 9, 3, 7, 11, 2]])
KINDS = pytest.mark.parametrize("lora", [Lora(r=4), Lora(r=4, use_dora=True)], ids=["lora", "dora"])


def model(dtype: torch.dtype = torch.float32, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()  # type: ignore[return-value,arg-type]


def adapter_of(adapted: PeftModel) -> dict[str, torch.Tensor]:
    return {name: values for name, values in adapted.named_parameters() if ".lora_" in name}


def trained(adapted: PeftModel, seed: int = 1) -> PeftModel:
    """As after some training: B is no longer zero, and DoRA's magnitudes have moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, values in adapter_of(adapted).items():
            if ".lora_A." not in name:
                values += 0.05 * torch.randn(values.shape, generator=generator)
    return adapted


def logits(adapted: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = adapted(input_ids=IDS).logits
    return found


@KINDS
def test_a_new_adapter_is_decided_by_its_seed_and_changes_nothing_yet(lora: Lora) -> None:
    first = with_adapter(model(), lora, seed=5)
    base = model()
    torch.manual_seed(17)  # whatever was drawn before does not matter, and what comes after is as without
    second = with_adapter(base, lora, seed=5)
    drawn = torch.rand(3)
    torch.manual_seed(17)
    assert torch.equal(drawn, torch.rand(3))
    for (name, one), two in zip(adapter_of(first).items(), adapter_of(second).values(), strict=True):
        assert torch.equal(one, two), name
    other = adapter_of(with_adapter(model(), lora, seed=6))
    differ = [name for name, one in adapter_of(first).items() if not torch.equal(one, other[name])]
    assert differ == [name for name in other if ".lora_A." in name]
    torch.testing.assert_close(logits(first), logits(model()))
    assert {name for name, values in first.named_parameters() if values.requires_grad} == set(adapter_of(first))


@KINDS
def test_an_adapter_has_the_dtype_of_its_model_and_the_same_numbers(lora: Lora) -> None:
    exact = adapter_of(with_adapter(model(), lora, seed=5))
    rounded = adapter_of(with_adapter(model(torch.bfloat16), lora, seed=5))
    assert {values.dtype for values in rounded.values()} == {torch.bfloat16}
    for name, values in rounded.items():
        if "lora_magnitude" not in name:  # the lengths of rows that were rounded before
            assert torch.equal(values, exact[name].bfloat16()), name


def test_dropout_is_the_recipes_in_train_mode_only() -> None:
    adapted = trained(with_adapter(model(), Lora(r=4, lora_dropout=0.5), seed=0))
    assert not adapted.training and torch.equal(logits(adapted), logits(adapted))
    adapted.train()
    assert not torch.equal(logits(adapted), logits(adapted))


@KINDS
def test_a_saved_adapter_comes_back_equal(lora: Lora, tmp_path: Path) -> None:
    adapted = trained(with_adapter(model(), lora, seed=5))
    save_adapter(adapted, tmp_path, "some/base")
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base" and config["r"] == 4
    back = load_adapter(model(), tmp_path, trainable=True)
    for (name, one), two in zip(adapter_of(adapted).items(), adapter_of(back).values(), strict=True):
        assert torch.equal(one, two) and two.requires_grad, name
    assert torch.equal(logits(adapted), logits(back))
    assert not any(values.requires_grad for values in load_adapter(model(), tmp_path).parameters())
    # From weights that were gathered elsewhere.
    weights = {name: values.clone() for name, values in adapted.state_dict().items()}
    save_adapter(with_adapter(model(), lora, seed=9), tmp_path / "gathered", "some/base", weights)
    files = [folder / "adapter_model.safetensors" for folder in (tmp_path, tmp_path / "gathered")]
    assert files[0].read_bytes() == files[1].read_bytes()


@KINDS
@pytest.mark.parametrize("tied", [False, True])
def test_the_merged_model_is_base_and_adapter(lora: Lora, tied: bool, tmp_path: Path) -> None:
    adapted = trained(with_adapter(model(tied=tied), lora, seed=5))
    expected = logits(adapted)
    assert (expected - logits(model(tied=tied))).abs().max() > 0.01
    merged = merge_into(adapted)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == set(model(tied=tied).state_dict()) - ({"lm_head.weight"} if tied else set())
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens"], ["no_such_layer"]])
def test_layers_that_cannot_have_an_adapter_are_refused(targets: list[str]) -> None:
    with pytest.raises(ModelError, match=r"train\.lora"):
        with_adapter(model(), Lora(target_modules=targets), seed=0)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    adapted = with_adapter(model(), Lora(r=4, target_modules=["q_proj"]), seed=0)
    save_adapter(adapted, tmp_path, "some/base")
    weights = tmp_path / "adapter_model.safetensors"
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "k_proj"]}))
    with pytest.raises(ModelError, match="4 weights are in one of the two only"):
        load_adapter(model(), tmp_path)
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(ModelError, match="cannot load the adapter"):
        load_adapter(model(), tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match=r"holds adapter_config\.json and adapter_model\.safetensors"):
        load_adapter(model(), tmp_path)


def test_quantized_weights_need_a_gpu_and_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = Lora(quantization="nf4")
    check_quantization(Lora(), "cpu")
    with pytest.raises(ModelError, match=r"train\.lora\.quantization: nf4 needs GPUs"):
        check_quantization(lora, "cpu")
    monkeypatch.setattr("congrad_ray.modeling.adapters.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="bitsandbytes, which is not installed"):
        check_quantization(lora, "cuda:1")


# --- policies -----------------------------------------------------------------------------------------------


@KINDS
def test_a_policy_that_is_an_adapter_is_used_by_all(
    lora: Lora, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONGRAD_RAY_CACHE", str(tmp_path / "cache"))
    train = Train(lora=lora, seed=4)
    start = named_model(str(tiny_model), Model(dtype="float32"))
    fresh = model_to_train(start, train, "cpu")
    assert isinstance(fresh, PeftModel)
    again = model_to_train(start, train, "cpu")
    assert all(
        torch.equal(one, two)
        for one, two in zip(adapter_of(fresh).values(), adapter_of(again).values(), strict=True)  # type: ignore
    )
    adapted = trained(fresh)
    folder = tmp_path / "policy"
    save_adapter(adapted, folder, start.name)
    start.load_tokenizer().save_pretrained(folder)
    source = ModelSource(str(folder), start.settings, Folder(LocalFileSystem(), str(folder)), "f00", start)

    # The next training goes on with the same adapter.
    following = model_to_train(source, train, "cpu")
    assert isinstance(following, PeftModel) and not following.training
    assert torch.equal(logits(following), logits(adapted))
    assert {name for name, values in following.named_parameters() if values.requires_grad} == set(
        adapter_of(adapted)
    )
    assert len(source.load_tokenizer()) == len(start.load_tokenizer())
    # Without train.lora all weights of the merged model are trained.
    assert isinstance(model_to_train(source, Train(), "cpu"), LlamaForCausalLM)

    # Engines get it merged, once per node.
    path = Path(source.local_path())
    torch.testing.assert_close(
        logits(LlamaForCausalLM.from_pretrained(path)), logits(adapted), rtol=1e-4, atol=1e-5
    )
    assert len(named_model(str(path), start.settings).load_tokenizer()) == len(start.load_tokenizer())
    written = (path / "model.safetensors").stat().st_mtime_ns
    assert source.local_path() == str(path) and (path / "model.safetensors").stat().st_mtime_ns == written
    # And a policy that is written merged is the same.
    torch.testing.assert_close(logits(merged_policy(start, folder)), logits(adapted), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(merged_policy(source, folder)), logits(adapted), rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="is a LoRA adapter for"):
        replace(source, base=None).load_tokenizer()


def test_weights_that_cannot_be_quantized_are_refused_before_any_work(
    congrad: Callable[..., Any], tmp_path: Path
) -> None:
    demo = Path(__file__).resolve().parents[2] / "jobs" / "recipes" / "demo.yaml"
    run = tmp_path / "run"
    ended = congrad("run", demo, "--run", run, "--set", "train.lora.quantization=nf4")
    assert ended.code == 2 and "train.lora.quantization: nf4 needs GPUs" in " ".join(ended.err.split())
    assert not (run / "prompts").exists()
