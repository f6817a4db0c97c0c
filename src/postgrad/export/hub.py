"""A saved folder to a repository of the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from postgrad.errors import ConfigError, PostgradError
from postgrad.redaction import redact

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


def check_repository(repository: str) -> None:
    """Refuse what cannot be the name of a repository, and pushing while offline.

    Raises:
        ConfigError: with the cure.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        raise ConfigError("HF_HUB_OFFLINE is set, and pushing needs the hub", "unset HF_HUB_OFFLINE")
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise ConfigError(f"'{repository}' is no repository name", "write -o OWNER/NAME") from None
    if "/" not in repository:
        raise ConfigError(f"'{repository}' names no owner", "write -o OWNER/NAME")


def push(folder: Path, repository: str, *, private: bool, replace: bool) -> str:
    """Create the repository and upload a folder in one commit.

    Args:
        folder: what to upload.
        repository: OWNER/NAME.
        private: of a new repository.
        replace: also commit to a repository that exists.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: when it exists and ``replace`` is off, or the token may not write.
        PostgradError: when the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=replace)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model exported by postgrad")
    except HfHubHTTPError as error:
        raise _refused(repository, error) from None
    except Exception as error:  # httpx's, for each of the ways in which a network fails
        first = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise PostgradError(
            f"{repository}: the hub cannot be reached: {redact(first)}", "check the network and HF_ENDPOINT, then again"
        ) from None
    return str(address)


def _refused(repository: str, error: HfHubHTTPError) -> PostgradError:
    status = error.response.status_code if error.response is not None else 0
    if status == 401:
        return ConfigError(f"{repository}: the hub knows no user (401)", "log in with 'hf auth login', or set HF_TOKEN")
    if status == 403:
        return ConfigError(
            f"{repository}: the token may not write there (403)", "use a token with write access, or another owner"
        )
    if status == 409:
        return ConfigError(f"{repository} exists already (409)", "choose another -o, or add a commit with --force")
    first = (str(error).splitlines() or [""])[0]
    return PostgradError(f"{repository}: the hub refused ({status}): {redact(first)}", "try again later")
