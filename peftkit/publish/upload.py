"""One commit on the hub with everything that a folder holds."""

from __future__ import annotations

import re
from pathlib import Path

from peftkit.errors import LoadError, RecipeError
from peftkit.hub import Repo, why_refused


def check_repo_id(repo_id: str) -> None:
    """Refuse a name that the hub would not take, before anything is read.

    Raises:
        RecipeError: it is not of the form owner/name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RecipeError(f"REPO_ID: `{repo_id}` is no name on the hub: {str(error).partition(': ')[0]}") from error
    if not re.fullmatch(r"[^/]+/[^/]+", repo_id):
        raise RecipeError(f"REPO_ID: `{repo_id}` names no owner; write it as owner/{repo_id.strip('/')}")


def require_token() -> None:
    """Refuse to begin without a token.

    Raises:
        LoadError: there is none.
    """
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise LoadError("HF_HUB_OFFLINE is set: nothing can be uploaded; unset it, or look at the upload with --dry-run FOLDER")
    if get_token() is None:
        raise LoadError("the hub wants a token to write: `hf auth login` (or set HF_TOKEN); --dry-run FOLDER needs none")


def upload(folder: Path, repo_id: str, *, private: bool) -> str:
    """Create the repository where there is none, and commit the folder; returns the address of the commit.

    Raises:
        LoadError: the hub refuses, or cannot be reached.
    """
    from httpx2 import HTTPError
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="peftkit")
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise LoadError(f"{repo_id} is there already, and public: leave --private out, or make it private in its settings")
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        adds = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
        return str(api.create_commit(repo_id, adds, commit_message="Upload by peftkit push").commit_url)
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise LoadError(_why(error, repo_id)) from error


def _why(error: Exception, repo_id: str) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if status == 403:
        return f"this token may not write to {repo_id}: `hf auth whoami` says whose it is; it needs the role `write`"
    if status == 401:
        return "the hub does not accept the token: it is wrong or has expired; `hf auth login --force` takes a new one"
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{repo_id}: nothing was uploaded: {why_refused(error, Repo(repo_id)) or first}; then push again"
