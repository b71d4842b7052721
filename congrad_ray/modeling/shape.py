"""The shape of a model, from its configuration alone: no weights are read and nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from congrad_ray.config.printable import brief, printable
from congrad_ray.config.recipe import BUILTIN_WORLD, Model
from congrad_ray.config.settings import SettingsError, local_path
from congrad_ray.modeling.source import ModelError


@dataclass(frozen=True)
class ModelShape:
    """What a plan needs to know of a causal language model."""

    name: str
    config: PretrainedConfig
    parameters: int  # tied weights counted once
    embedding: int  # parameters of the input embedding
    head: int  # entries of the output embedding, which tied models share with the input embedding
    tied: bool
    linear: tuple[tuple[int, int], ...]  # (out, in) of every nn.Linear and Conv1D but the output embedding
    layers: int
    attention_heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    hidden: int
    vocabulary: int

    @property
    def body(self) -> int:
        """Parameters that multiply every token: all but the embeddings. Includes norms, a few in ten thousand."""
        return self.parameters - self.embedding - (0 if self.tied else self.head)


def read_shape(name: str, settings: Model) -> ModelShape:
    """The shape of a model by folder, hub name (from the hub's cache on this machine) or builtin-world.

    Raises ModelError where its configuration cannot be had, with the way to give it.
    """
    return shape_of(name, _configuration(name, settings), settings)


def shape_of(name: str, config: PretrainedConfig, settings: Model) -> ModelShape:
    """The shape of the model that `config` describes. Raises ModelError for one that is no language model."""
    model = meta_model(config, settings.dtype)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise ModelError(
            f"{type(model).__name__} of {brief(name)} has no output embedding, so it is not a language model"
        )
    text = config.get_text_config()
    heads = text.num_attention_heads
    key_value_heads: int = getattr(text, "num_key_value_heads", None) or heads
    linear = tuple(_out_in(module) for module in model.modules() if _is_linear(module) and module is not head)
    table = embedding.get_parameter("weight")
    return ModelShape(
        name=name,
        config=config,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        embedding=table.numel(),
        head=head.get_parameter("weight").numel(),
        tied=head.get_parameter("weight") is table,
        linear=linear,
        layers=text.num_hidden_layers,
        attention_heads=heads,
        key_value_heads=key_value_heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
    )


def meta_model(config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    """The model on torch's meta device: every shape and no numbers. Raises ModelError."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    except (ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        raise ModelError(
            f"no causal language model can be made from a configuration of type {config.model_type!r}: "
            f"{printable(str(error)[:300])}"
        ) from error
    model.tie_weights()
    return model


def _configuration(name: str, settings: Model) -> PretrainedConfig:
    if name == BUILTIN_WORLD:
        # Its own function, called here so that the world's source, whose hash names every model in the cache,
        # stays as it is; the ids of special tokens, which this tokenizer lacks, do not change the shape.
        from congrad_ray.world.model import world_config

        return world_config(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"": 0}, ""))))
    try:
        path = local_path(name)
    except SettingsError as error:
        raise ModelError(f"model {error}") from error
    arguments: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if not path.exists():
        arguments |= {"revision": settings.revision, "local_files_only": True}
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(path) if path.exists() else name, **arguments)
    except Exception as error:  # whatever transformers and the hub's client raise
        if path.exists():
            why = f"a config.json that can be read is not in this folder: {brief(name)}"
        else:
            why = f"no folder {brief(name)}, and no model of this name in the hub's cache on this machine"
        raise ModelError(
            f"{why}; a plan needs its configuration and downloads nothing. Fetch that one small file, "
            "`hf download NAME config.json`, or write its config.json into a folder and plan with "
            "--set model.name=FOLDER; no weights are needed"
        ) from error
    return config


def _is_linear(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


def _out_in(module: torch.nn.Module) -> tuple[int, int]:
    weight = module.get_parameter("weight")
    rows, columns = weight.shape
    return (rows, columns) if isinstance(module, torch.nn.Linear) else (columns, rows)
