"""An export to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from congrad_ray.config.printable import brief

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class PushError(ValueError):
    """The export cannot be pushed; the text says why and what to do."""


def check_push(name: str, endpoint: str | None = None) -> None:
    """Raises PushError where `push` could not work: call it before the work begins.

    `name`: USER/DATASET or ORGANISATION/DATASET. `endpoint`: the hub's address if not the usual one (HF_ENDPOINT).
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise PushError(f"--push {brief(name)}: no name of a dataset: {brief(error)}; give USER/DATASET") from None
    if "/" not in name:
        raise PushError(f"--push {brief(name)}: give the name as USER/DATASET or ORGANISATION/DATASET")
    if get_token() is None:
        raise PushError(
            f"--push {name}: there is no Hugging Face token; run `hf auth login` or set HF_TOKEN, with a token "
            "that may write, or leave out --push"
        )
    try:
        user = _api(endpoint).whoami()
    except Exception as error:  # the hub's client lets out what its HTTP library raises
        raise PushError(
            f"--push {name}: the hub does not accept us: {_first_line(error)}; check the token (`hf auth whoami`) "
            "and the network, or leave out --push"
        ) from None
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PushError(f"--push {name}: the Hugging Face token may only read; make one that may write")


def push(folder: Path, name: str, public: bool = False, endpoint: str | None = None) -> str:
    """Uploads an export's folder as the dataset `name`, private unless `public`; returns its address.

    Files of the same name are replaced, others stay. Raises PushError; then the folder is as it was, and the push
    can be done again. A public dataset that is there already is refused unless `public`.
    """
    api = _api(endpoint)
    try:
        address = api.create_repo(name, repo_type="dataset", private=not public, exist_ok=True)
        shown_to_all = not api.dataset_info(name).private
        if public or not shown_to_all:
            api.upload_folder(
                repo_id=name,
                repo_type="dataset",
                folder_path=folder,
                commit_message="Pairs kept by congrad filter",
            )
    except Exception as error:
        raise PushError(
            f"--push {name}: {_first_line(error)}; the export is complete in {folder}: "
            f"`hf upload {name} {folder} --repo-type dataset` tries again"
        ) from None
    if shown_to_all and not public:
        raise PushError(f"--push {name}: this dataset is there and public; give another name, or --public")
    return str(address)


def _api(endpoint: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint, library_name="congrad_ray")


def _first_line(error: Exception) -> str:
    return brief(str(error).strip().partition("\n")[0] or type(error).__name__)
