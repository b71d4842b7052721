"""Which checkpoint is the policy of an iteration, and how it is loaded on whatever node needs it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import pyarrow.fs as pafs
from filelock import FileLock

from congrad_ray.config.printable import brief, printable, shown
from congrad_ray.config.recipe import BUILTIN_WORLD, Model, Recipe
from congrad_ray.config.settings import SettingsError, local_path
from congrad_ray.rundir.directory import Folder, RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


ADAPTER_CONFIG = "adapter_config.json"
# The input embedding in checkpoints of the families that transformers has.
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|embeddings)\.weight$")


class ModelError(ValueError):
    """A model cannot be loaded; the text names it and the way out."""


def cache_directory() -> Path:
    """Where this node keeps models it built or fetched: $CONGRAD_RAY_CACHE or ~/.cache/congrad_ray."""
    return Path(os.environ.get("CONGRAD_RAY_CACHE", "~/.cache/congrad_ray")).expanduser()


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint: a local path or hub name (`name`), or a folder of the run directory (`folder`).

    With a `base` the folder holds an adapter for it. `longest`: tokens of the longest sequence that any stage of
    the recipe asks of it, where that is known; `settings.max_length` is what the stage at hand asks.
    """

    name: str
    settings: Model
    folder: Folder | None = None
    fingerprint: str = ""
    base: ModelSource | None = None
    longest: int = 0

    @property
    def is_made_here(self) -> bool:
        """Whether each node makes its own `local_path`: a copy of remote files, or an adapter merged."""
        return self.base is not None or (self.folder is not None and not self.folder.is_local)

    @property
    def whole(self) -> ModelSource:
        """Where configuration and shapes are read: the model itself, or the one that an adapter is for."""
        return self.base or self

    def local_path(self) -> str:
        """A path (or hub name) that transformers and vLLM can load on this node, fetched once per node.

        An adapter is merged into its base, once per node: every engine takes that, DoRA too, and all of them
        compute what evaluation of a merged policy would.
        """
        if self.base is None:
            return self.files()
        target = self._cached("merged")
        with FileLock(f"{target}.lock"):
            if not (target / "config.json").exists():
                partial = target.with_suffix(".partial")
                partial.mkdir(exist_ok=True)
                self.load_model("cpu").save_pretrained(partial)
                self.load_tokenizer().save_pretrained(partial)
                partial.rename(target)
        return str(target)

    def _cached(self, kind: str) -> Path:
        """This checkpoint's place in the node's cache; makes the folder above it."""
        assert self.folder is not None
        target = cache_directory() / kind / (self.fingerprint or self.folder.path.replace("/", "_"))
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def files(self) -> str:
        """The checkpoint's own files on this node (or the hub name): of an adapter they are the adapter alone."""
        if self.folder is None:
            return self.name
        if self.folder.is_local:
            return self.folder.path
        target = self._cached("checkpoints")
        with FileLock(f"{target}.lock"):
            if not any((target / name).exists() for name in ("config.json", ADAPTER_CONFIG)):
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

    def check_files(self) -> None:
        """Raises ModelError for a model whose folder has no configuration or weights that could be loaded."""
        from transformers import AutoConfig

        if self.base is not None:
            self.base.check_files()
            return
        path = self.files()
        try:
            AutoConfig.from_pretrained(path, **self.pretrained_arguments())
            if Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
                raise FileNotFoundError(f"no *.safetensors in {path}")
        except Exception as error:  # as for the tokenizer
            raise _cannot_load("model", path, error) from error

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the recipe's chat template where it names one.

        Raises ModelError, also for tokens that the embedding has no rows for, and MissingChatTemplate where the
        recipe names a template that is not there.
        """
        from transformers.utils.peft_utils import find_adapter_config_file

        from congrad_ray.modeling.tokenization import MissingChatTemplate, load_tokenizer

        path, settings, arguments = self.files(), self.settings, self.pretrained_arguments()
        try:
            tokenizer = load_tokenizer(
                path,
                settings.chat_template,
                chat_template_date=settings.chat_template_date,
                chat_template_kwargs=settings.chat_template_kwargs,
                **arguments,
            )
            adapter = find_adapter_config_file(path, revision=arguments.get("revision"))
        except MissingChatTemplate:
            raise
        except Exception as error:  # broken files end in whatever the library's many readers raise
            raise _cannot_load("tokenizer", path, error) from error
        if adapter and self.base is None:
            _refuse_adapter(path, Path(adapter))
        whole = self.whole
        _check_rows(path, tokenizer, _embedding_rows(whole.files(), whole.pretrained_arguments()))
        return tokenizer

    def load_model(
        self, device: str, devices: int = 1, quantization: Literal["nf4"] | None = None
    ) -> PreTrainedModel:
        """The causal language model in the recipe's dtype on `device`, in evaluation mode.

        An adapter is merged into its base; `adapters.model_to_train` leaves it in place. With several `devices`
        the layers are spread over those of this process. With `quantization` the linear layers' weights are
        bitsandbytes' 4-bit ones, whose products are in the recipe's dtype (GPUs only). Raises ModelError, also
        where weights are missing, which would be random numbers without more than a warning. Pickled weights are
        never loaded: a pickle runs code.
        """
        import torch
        from transformers import AutoModelForCausalLM

        if self.base is not None:
            from congrad_ray.modeling.adapters import load_adapter, merge_into

            return merge_into(load_adapter(self.base.load_model(device, devices), self.files())).eval()
        path, dtype = self.files(), getattr(torch, self.settings.dtype)
        placed: Any = "balanced" if devices > 1 else None
        arguments = self.pretrained_arguments()
        if quantization is not None:
            from transformers import BitsAndBytesConfig

            arguments["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quantization,
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
            placed = placed or {"": device}  # weights are quantized where they are loaded to
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                device_map=placed,
                attn_implementation=self.settings.attn_implementation,
                **arguments,
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # as for the tokenizer
            attention = self.settings.attn_implementation
            if attention is not None and "attention" in str(error).lower():
                raise ModelError(
                    f"model.attn_implementation: {attention} cannot be used with {brief(path)}: "
                    f"{printable(' '.join(str(error).split()))}; leave it out for transformers' own choice"
                ) from error
            raise _cannot_load("model", path, error) from error
        model: PreTrainedModel = loaded[0]
        if missing := sorted(loaded[1]["missing_keys"]):
            raise ModelError(
                f"cannot load the model of {brief(path)}: {len(missing)} of its weights are in no file, the first "
                f"is {printable(missing[0])}; copy all its files again, and check that config.json belongs to them"
            )
        if placed is None:
            model = model.to(device)  # type: ignore[arg-type]
        return model.eval()


def _refuse_adapter(model: str, config: Path) -> NoReturn:
    try:
        base = json.loads(config.read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    beside = (
        ". If the weights beside it are merged already, remove adapter_config.json from the folder"
        if config.with_name("config.json").exists()
        else ""
    )
    raise ModelError(
        f"{brief(model)} is a LoRA adapter for {shown(base) if base else 'a model that it does not name'} "
        "(adapter_config.json), but a whole model is needed: merge the two with peft, "
        "`PeftModel.from_pretrained(base_model, adapter_folder).merge_and_unload().save_pretrained(folder)`, save "
        f"the tokenizer to the same folder and give that as the model{beside}"
    )


def _embedding_rows(path: str, arguments: dict[str, Any]) -> int | None:
    """Rows of the input embedding, by the headers of a folder's weights or else its configuration, if known."""
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig

    found: list[int] = []
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, "np") as weights:
                names = [name for name in weights.keys() if _EMBEDDING.search(name)]  # noqa: SIM118
                found += [weights.get_slice(name).get_shape()[0] for name in names]
        except (SafetensorError, OSError):  # reported where the weights are loaded
            return None
    if found:
        return max(found)
    try:
        rows: int | None = AutoConfig.from_pretrained(path, **arguments).get_text_config().vocab_size
    except Exception:  # as well
        return None
    return rows


def _check_rows(path: str, tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    """Refuses tokens beyond the embedding: any text may hit them. More rows than tokens are common, and fine.

    So are placeholders for images in the tokenizer of a text model, as Gemma 3's has: rows with them are
    quarantined.
    """
    from congrad_ray.modeling.tokenization import refuse_ids_from

    if rows is None:
        return
    beyond = {token: place for token, place in tokenizer.get_vocab().items() if place >= rows}
    if beyond:
        refuse_ids_from(tokenizer, rows)
    named = tokenizer.special_tokens_map.items()
    placeholders = [token for name, token in named if name.startswith(("image", "audio", "video"))]
    beyond = {token: place for token, place in beyond.items() if token not in placeholders}
    if not beyond:
        return
    size = max(beyond.values()) + 1
    first = sorted(beyond, key=lambda token: beyond[token])[:5]
    raise ModelError(
        f"the tokenizer of {brief(path)} has token ids up to {size - 1}, but the embedding has {rows} rows: "
        f"{', '.join(shown(token) for token in first)}{', ...' if len(beyond) > len(first) else ''} "
        f"({len(beyond)} in all) have no row; load both with transformers, call "
        f"model.resize_token_embeddings({size}) and write both to a folder with save_pretrained (the new rows are "
        "not trained), or use a tokenizer without these tokens"
    )


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
                f"{printable(pickled[0])} is a pickle, which could run code, so it is not loaded; if you "
                "trust it, load it with transformers and save it again with save_pretrained"
            )
    said = " ".join(str(error).split())
    return ModelError(
        f"cannot load the {what} of {brief(path)}: {type(error).__name__}: {printable(said)}; {hint}"
    )


def named_model(name: str, settings: Model, seed: int = 0) -> ModelSource:
    """The model with this name: a folder, a hub name, or the built-in world's (trained here on first use)."""
    if name == BUILTIN_WORLD:
        from congrad_ray.world.model import world_model

        return ModelSource(str(world_model(seed)), settings)
    try:
        path = local_path(name)
    except SettingsError as error:
        raise ModelError(f"model {error}") from error
    if path.is_dir():
        if (path / ADAPTER_CONFIG).is_file():
            _refuse_adapter(name, path / ADAPTER_CONFIG)
        return ModelSource(str(path.resolve()), settings)
    if name.startswith((".", "/", "~")):
        raise ModelError(f"model {brief(name)} looks like a path, but there is no such folder")
    return ModelSource(name, settings)


def settings_of(name: str, recipe: Recipe) -> Model:
    """How a model of the recipe is loaded: a judge of its own has its own chat template and revision."""
    if name == recipe.model.name:
        return recipe.model
    return recipe.model.model_copy(update={"chat_template": None, "revision": None})


def check_models(recipe: Recipe, chats: bool = False, present: bool = False) -> None:
    """Before any work: refuses folders of the recipe's models that some stage could not use.

    Raises ModelError, or MissingChatTemplate where `chats` says that they must have a template. Reads tokenizers
    and the headers of weights. A model on the hub, or in a folder that only another machine has, is looked at when
    a stage loads its tokenizer, before its actors start; with `present` one that this machine cannot find at all
    is refused here.
    """
    judges = (judge.model for judge in recipe.judge.judges.values())
    for name in dict.fromkeys((recipe.model.name, *judges, recipe.evaluate.judge)):
        if name not in (BUILTIN_WORLD, "policy", "start"):
            _check_folder(name, settings_of(name, recipe), chats)
            if present:
                _check_present(name, settings_of(name, recipe).revision)


@cache
def _check_present(name: str, revision: str | None) -> None:
    """Raises ModelError for a name that is neither a folder's nor that of a model on the hub or in its cache."""
    try:
        if local_path(name).exists():
            return
    except SettingsError as error:
        raise ModelError(f"model {error}") from error
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    where = (
        "there is no such folder" if name.startswith(("/", "~")) else f"there is no such folder in {Path.cwd()}"
    )
    try:
        hf_hub_download(name, "config.json", revision=revision)
        return
    except HFValidationError:
        why = "it cannot be the name of a model on the Hugging Face hub"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        offline = "switched off by HF_HUB_OFFLINE=1" if os.environ.get("HF_HUB_OFFLINE") == "1" else "out of reach"
        why = f"no model of this name is in the cache of the Hugging Face hub, which is {offline}"
    except Exception as error:  # no such repository or revision, no access to it: whatever the client raises
        said = str(error).strip().splitlines() or [type(error).__name__]
        why = f"the Hugging Face hub does not give it: {printable(said[0])}"
    raise ModelError(f"no model {brief(name)}: {where}, and {why}")


@cache  # a run's stages ask one after the other
def _check_folder(name: str, settings: Model, chats: bool) -> None:
    from congrad_ray.modeling.tokenization import chat_prompt_ids

    try:
        folder = local_path(name)
    except SettingsError:
        return
    if not folder.is_dir():
        return
    source = named_model(name, settings)
    # A plan needs no more than a config.json.
    if any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = source.load_tokenizer()
        if chats:
            chat_prompt_ids(tokenizer, [{"role": "user", "content": "?"}])


def policy(recipe: Recipe, run: RunDirectory, iteration: int) -> ModelSource:
    """M_iteration: the recipe's model for 0, else the checkpoint that the iteration before trained.

    That may be an adapter (`train.lora.merge: false`), always one for the recipe's own model.
    """
    longest = recipe.longest_asked("policy")

    def start() -> ModelSource:
        return replace(named_model(recipe.model.name, recipe.model, recipe.seed), longest=longest)

    if iteration == 0:
        return start()
    folder = run.stage("policy", iteration - 1)
    manifest = folder.manifest()
    # Its settings' fingerprint alone is that of another run's policy as well, and of this one before a --redo.
    made = f"{folder.path} {manifest.fingerprint} {manifest.finished_at}" if manifest else ""
    identity = hashlib.sha256(made.encode()).hexdigest()[:16] if made else ""
    base = start() if folder.exists(ADAPTER_CONFIG) else None
    return ModelSource(folder.path, recipe.model, folder, identity, base, longest)


def policy_input(iteration: int) -> list[tuple[str, int | None]]:
    """The stage input that M_iteration is: none for the recipe's own model."""
    return [("policy", iteration - 1)] if iteration > 0 else []
