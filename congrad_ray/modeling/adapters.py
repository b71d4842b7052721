"""LoRA adapters: new ones, saved ones, and weights that they are merged into. peft does the work.

An adapter has the dtype of its model. peft's own default, float32 beside bfloat16, would cost two casts of every
layer's inputs, and DeepSpeed casts all it is given to bfloat16 anyway. The small steps of training are not lost:
DeepSpeed's optimiser keeps float32 copies of what it trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from congrad_ray.config.printable import brief, printable
from congrad_ray.config.training import Lora, Train
from congrad_ray.modeling.source import ADAPTER_CONFIG, ModelError, ModelSource

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"


def with_adapter(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """The model with a new adapter, which is all of it that is trained.

    B is zero, so the model computes what it did. A is drawn by `seed` alone: the same on every worker, device and
    replica, whatever was drawn before, and what is drawn after is as it would have been. Modes and dropouts are
    peft's: `lora_dropout` where the model is in train mode. Raises ModelError for `target_modules` that the model
    has not, and for its embeddings.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
    )
    training = model.training
    with _drawn_by(seed):
        try:
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise ModelError(f"train.lora does not fit the model: {printable(error)}") from error
    _refuse_embeddings(adapted)
    _match_dtype(adapted)
    adapted.train(training)
    return adapted


def load_adapter(model: PreTrainedModel, folder: str | Path, trainable: bool = False) -> PeftModel:
    """The model with the adapter that `save_adapter`, or peft, wrote to a folder.

    Raises ModelError where it does not belong to the model, or some of its weights are missing. Weights in pickles
    are never loaded.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    path, training = Path(folder), model.training
    try:
        with safe_open(path / WEIGHTS, "pt") as file:
            saved = set(file.keys())
        with _drawn_by(0):  # peft draws an adapter first, and then reads the saved one over it
            adapted = PeftModel.from_pretrained(
                model, str(path), is_trainable=trainable, autocast_adapter_dtype=False
            )
    except Exception as error:  # broken files end in whatever the library's many readers raise
        raise ModelError(
            f"cannot load the adapter of {brief(str(path))}: {type(error).__name__}: "
            f"{printable(' '.join(str(error).split()))}; its folder holds {ADAPTER_CONFIG} and {WEIGHTS}"
        ) from error
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if different := sorted(wanted ^ saved):
        raise ModelError(
            f"the adapter of {brief(str(path))} does not fit its model: {len(different)} weights are in one of "
            f"the two only, the first is {printable(different[0])}"
        )
    _match_dtype(adapted)
    adapted.train(training)
    return adapted


def save_adapter(
    model: PeftModel, folder: str | Path, base: str, weights: dict[str, Tensor] | None = None
) -> None:
    """Writes the adapter alone, in safetensors; `base` is the model that it says it is for.

    `weights` are the model's where they are spread over workers (ZeRO 3), by the names of its state_dict.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    # With save_embedding_layers "auto" peft would ask the hub about the base model's vocabulary.
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)


def merge_into(model: PeftModel) -> PreTrainedModel:
    """The model itself, with the adapter merged into its weights; `model` is used up.

    Sums are rounded to the weights' dtype, so that in bfloat16 the merged model is not exactly base and adapter.
    Raises ModelError for sums that are not finite.
    """
    try:
        merged: Any = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"cannot merge the adapter into the model: {printable(error)}") from error
    inner: PreTrainedModel = merged
    # What peft leaves on the model would make save_pretrained write an adapter.
    inner._hf_peft_config_loaded = False
    return inner


def model_to_train(
    source: ModelSource, train: Train, device: str, devices: int = 1
) -> PreTrainedModel | PeftModel:
    """The policy as training starts from it, in evaluation mode; sketching takes it from here as well.

    Without `train.lora` the whole model. With it, the policy's own adapter where the policy is one, else a new one
    drawn by `train.seed`; the frozen weights are quantized where the recipe says so. Raises ModelError.
    """
    lora = train.lora
    if lora is None:
        return source.load_model(device, devices)
    check_quantization(lora, device)
    if source.base is None:
        return with_adapter(source.load_model(device, devices, lora.quantization), lora, train.seed)
    base = source.base.load_model(device, devices, lora.quantization)
    return load_adapter(base, source.files(), trainable=True)


def merged_policy(source: ModelSource, adapter: str | Path, device: str = "cpu") -> PreTrainedModel:
    """The whole model that `adapter`, a folder, makes of the source's weights as they are, not quantized.

    What training writes with `train.lora.merge`: an adapter trained on quantized weights goes into the real ones.
    `source` is what training started from. Raises ModelError.
    """
    return merge_into(load_adapter((source.base or source).load_model(device), adapter))


def check_quantization(lora: Lora | None, device: str) -> None:
    """Raises ModelError for quantized weights where they cannot be had."""
    if lora is None or lora.quantization is None:
        return
    setting = f"train.lora.quantization: {lora.quantization}"
    if device != "cuda" and not device.startswith("cuda:"):
        raise ModelError(
            f"{setting} needs GPUs, and the profile's device is {device}: set train.lora.quantization to null, or "
            "use a profile with device: cuda"
        )
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"{setting} needs bitsandbytes, which is not installed: install congrad_ray[qlora] on every node, or "
            "set train.lora.quantization to null"
        )


@contextmanager
def _drawn_by(seed: int) -> Iterator[None]:
    """Within, the CPU's generator, by which peft draws adapters for every device, starts from `seed`."""
    import torch

    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


def _refuse_embeddings(model: PeftModel) -> None:
    # Log-probabilities are worked out in chunks from the output embedding's weights, past an adapter on it, and
    # merging into a tied embedding would change both.
    base = model.get_base_model()
    for which, module in (
        ("input", base.get_input_embeddings()),  # type: ignore[operator]
        ("output", base.get_output_embeddings()),  # type: ignore[operator]
    ):
        if any(hasattr(module, name) for name in ("lora_A", "lora_embedding_A")):
            raise ModelError(
                f"train.lora.target_modules takes in the {which} embedding, which cannot have an adapter here: "
                "name the layers without it, or use all-linear"
            )


def _match_dtype(model: PeftModel) -> None:
    """The adapter in the model's dtype also where the layers' own is that of quantized weights."""
    base: Any = model.get_base_model()
    dtype = base.get_input_embeddings().weight.dtype
    for name, parameter in model.named_parameters():
        if ".lora_" in name and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
