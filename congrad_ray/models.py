"""Which checkpoint is the policy of an iteration, and how it is loaded on whatever node needs it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs
from filelock import FileLock

from congrad_ray.printable import brief, printable
from congrad_ray.recipe import BUILTIN_WORLD, Model, Recipe
from congrad_ray.rundir import Folder, RunDirectory
from congrad_ray.settings import SettingsError, local_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelError(ValueError):
    """A model cannot be loaded; the text names it and the way out."""


def cache_directory() -> Path:
    """Where this node keeps models it built or fetched: $CONGRAD_RAY_CACHE or ~/.cache/congrad_ray."""
    return Path(os.environ.get("CONGRAD_RAY_CACHE", "~/.cache/congrad_ray")).expanduser()


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint: a local path or hub name (`name`), or a folder of the run directory (`folder`)."""

    name: str
    settings: Model
    folder: Folder | None = None
    fingerprint: str = ""

    def local_path(self) -> str:
        """A path (or hub name) that transformers and vLLM can load on this node; fetched once per node."""
        if self.folder is None:
            return self.name
        if self.folder.is_local:
            return self.folder.path
        target = cache_directory() / "checkpoints" / (self.fingerprint or self.folder.path.replace("/", "_"))
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not (target / "config.json").exists():
                partial = target.with_suffix(".partial")
                partial.mkdir(exist_ok=True)
                pafs.copy_files(
                    self.folder.path,
                    str(partial),
                    source_filesystem=self.folder.filesystem,
                    destination_filesystem=pafs.LocalFileSystem(),
                )
                partial.rename(target)
        return str(target)

    def pretrained_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained`, for the model and the tokenizer alike."""
        arguments: dict[str, Any] = {"trust_remote_code": self.settings.trust_remote_code}
        if self.folder is None and self.settings.revision:
            arguments["revision"] = self.settings.revision
        return arguments

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the recipe's chat template where it names one. Raises ModelError."""
        from congrad_ray.preference.tokenization import load_tokenizer

        path = self.local_path()
        try:
            return load_tokenizer(path, self.settings.chat_template, **self.pretrained_arguments())
        except Exception as error:  # broken files end in whatever the library's many readers raise
            raise _cannot_load("tokenizer", path, error) from error

    def load_model(self, device: str, devices: int = 1) -> PreTrainedModel:
        """The causal language model in the recipe's dtype on `device`, in evaluation mode.

        With several `devices` its layers are spread over those of this process. Raises ModelError, also where
        weights are missing, which would be random numbers without more than a warning. Pickled weights are never
        loaded: a pickle runs code.
        """
        import torch
        from transformers import AutoModelForCausalLM

        path = self.local_path()
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=getattr(torch, self.settings.dtype),
                use_safetensors=True,
                output_loading_info=True,
                device_map="balanced" if devices > 1 else None,
                **self.pretrained_arguments(),
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # as for the tokenizer
            raise _cannot_load("model", path, error) from error
        model: PreTrainedModel = loaded[0]
        if missing := sorted(loaded[1]["missing_keys"]):
            raise ModelError(
                f"cannot load the model of {brief(path)}: {len(missing)} of its weights are in no file, the first "
                f"is {printable(missing[0])}; copy all its files again, and see that config.json belongs to them"
            )
        if devices == 1:
            model = model.to(device)  # type: ignore[arg-type]
        return model.eval()


def _cannot_load(what: str, path: str, error: Exception) -> ModelError:
    folder = Path(path)
    hint = (
        "a model's folder holds config.json, *.safetensors, tokenizer.json and tokenizer_config.json, as "
        "save_pretrained of transformers writes them"
        if folder.is_dir()
        else "give a folder, or the name of a model on the hub that this machine can reach or has in its cache"
    )
    if what == "model" and folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for suffix in ("bin", "pt", "pth") for file in folder.glob(f"*.{suffix}"))
        if pickled:
            hint = (
                f"{printable(pickled[0])} is pickled and not loaded, because a pickle runs code; where you "
                "trust it, load it with transformers and write it again with save_pretrained"
            )
    said = " ".join(str(error).split())
    return ModelError(
        f"cannot load the {what} of {brief(path)}: {type(error).__name__}: {printable(said)}; {hint}"
    )


def named_model(name: str, settings: Model, seed: int = 0, log: Callable[[str], None] = print) -> ModelSource:
    """The model with this name: a folder, a hub name, or the built-in world's (trained here on first use)."""
    if name == BUILTIN_WORLD:
        from congrad_ray.world.model import world_model

        return ModelSource(str(world_model(seed, progress=log)), settings)
    try:
        path = local_path(name)
    except SettingsError as error:
        raise ModelError(f"model {error}") from error
    if path.is_dir():
        return ModelSource(str(path.resolve()), settings)
    if name.startswith((".", "/", "~")):
        raise ModelError(f"model {brief(name)} looks like a path, but there is no such folder")
    return ModelSource(name, settings)


def policy(recipe: Recipe, run: RunDirectory, iteration: int) -> ModelSource:
    """M_iteration: the recipe's model for 0, else the checkpoint that the iteration before trained."""
    if iteration == 0:
        return named_model(recipe.model.name, recipe.model, recipe.seed)
    folder = run.stage("policy", iteration - 1)
    manifest = folder.manifest()
    # Its settings' fingerprint alone is that of another run's policy as well, and of this one before a --redo.
    told = f"{folder.path} {manifest.fingerprint} {manifest.finished_at}" if manifest else ""
    identity = hashlib.sha256(told.encode()).hexdigest()[:16] if told else ""
    return ModelSource(folder.path, recipe.model, folder, identity)


def policy_input(iteration: int) -> list[tuple[str, int | None]]:
    """The stage input that M_iteration is: none for the recipe's own model."""
    return [("policy", iteration - 1)] if iteration > 0 else []
