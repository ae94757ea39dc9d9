"""The Hugging Face hub: whether it can be asked, what its refusals mean, and adapters that lie there; free of torch."""

from __future__ import annotations

import functools
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import LoadError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

TIMEOUT_SECONDS = 10.0
# What an adapter is loaded from: no checkpoints, no weights in other formats, no logs that lie beside it.
ADAPTER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors", "experts/*", "README.md")
_MARKS = ("peftkit.json", "adapter_config.json")  # one of them says that a repository holds an adapter
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repo:
    """A repository on the hub, or what is taken for one.

    Attributes:
        name: `owner/name`, or a name alone for a few old ones.
        revision: branch, tag or commit; None: `main`.
        kind: what is in it.
    """

    name: str
    revision: str | None = None
    kind: str = "model"

    def __str__(self) -> str:
        return f"the {self.kind} `{self.name}`"

    @property
    def page(self) -> str:
        """Where a person looks at it."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    @property
    def download(self) -> str:
        """The command that puts it into the cache."""
        options = " --repo-type dataset" if self.kind == "dataset" else ""
        return f"hf download {self.name}{options}{f' --revision {self.revision}' if self.revision else ''}"


@functools.cache  # one answer is enough for a command
def require(repo: Repo, file: str = "") -> None:
    """Ask the hub once for a repository (and a file in it): libraries ask often and, where nobody answers, for half a minute.

    A hub that cannot be reached is left alone from then on: what is in the cache is used, as with HF_HUB_OFFLINE=1.

    Raises:
        LoadError: it refuses; see `why_refused`.
    """
    from httpx2 import HTTPError
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    if constants.is_offline_mode():
        return
    try:
        url = hf_hub_url(repo.name, file or "config.json", repo_type=repo.kind, revision=repo.revision)
        get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS)
    except EntryNotFoundError as error:
        if file:
            raise LoadError(f"{repo} has no file `{file}`; {repo.page}/tree/main shows what it has") from error
    except (HTTPError, HFValidationError, OSError) as error:
        if outage := _outage(error):
            _leave_alone(outage)
            return
        raise LoadError(why_refused(error, repo) or str(error)) from error


def require_model(path: str, revision: str | None, file: str = "") -> None:
    """Ask the hub for a model, and a file of it, that is no folder here.

    Raises:
        LoadError: it refuses.
    """
    if not Path(path).is_dir():
        require(Repo(path, revision), file)


def reason(error: Exception, path: str, revision: str | None, kind: str = "model") -> str:
    """Why something cannot be loaded, in one line: what the hub says of what is no folder here, or else the error's first."""
    on_hub = None if Path(path).is_dir() else why_refused(error, Repo(path, revision, kind))
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return on_hub or (" ".join([first, *rest])[:300] if first.rstrip().endswith(":") else first)


def cached_file(path: str, revision: str | None, name: str) -> Path | None:
    """A file of a model, in its folder or in the hub's cache; None where it is not on this machine."""
    if Path(path).is_dir():
        return Path(path) / name if (Path(path) / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, name, revision=revision)
    except HFValidationError:  # a path that leads nowhere: loading will say so
        return None
    return Path(found) if isinstance(found, str) else None


def cached_commit(path: str, revision: str | None) -> str | None:
    """The commit of a hub model that is in the cache; None for folders."""
    config = None if Path(path).is_dir() else cached_file(path, revision, "config.json")
    return config.parent.name if config is not None else None


def _outage(error: BaseException) -> str | None:
    """Why nobody answers, in a few words; None where the hub has answered."""
    from httpx2 import TransportError
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        busy = "gets too many requests from here" if status == 429 else f"is out of order (it answers {status})"
        return f"{constants.ENDPOINT} {busy}" if status == 429 or status >= 500 else None
    if isinstance(error, TransportError):
        return f"{constants.ENDPOINT} cannot be reached ({error or type(error).__name__})"
    return None


_outages: list[str] = []  # why the hub is left alone, once it is


def _leave_alone(outage: str) -> None:
    from huggingface_hub import constants

    _outages.append(outage)
    _log.warning("note: %s; going on with what is in the cache", outage)
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # it has copied the value
        sys.modules["datasets.config"].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def why_refused(error: BaseException, repo: Repo) -> str | None:
    """What an error of the hub's clients means, with what mends it, as one line; None where it has another reason.

    transformers and datasets wrap the errors of `huggingface_hub` in their own: what those were raised from counts too.
    """
    found = [text for part in _chain(error) if (text := _meaning(part, repo))]
    return found[0] if found else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _meaning(error: BaseException, repo: Repo) -> str | None:
    from huggingface_hub import errors

    meanings: tuple[tuple[type[BaseException], Callable[[Any, Repo], str]], ...] = (  # the special ones first
        (errors.GatedRepoError, _gated),
        (errors.RepositoryNotFoundError, _not_there),
        (errors.RevisionNotFoundError, _no_revision),
        (errors.OfflineModeIsEnabled, _not_cached),
        (errors.LocalEntryNotFoundError, _not_cached),
        (errors.EntryNotFoundError, _no_file),
        (errors.HFValidationError, _no_name),
    )
    for kind, meaning in meanings:
        if isinstance(error, kind):
            return meaning(error, repo)
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        return f"{repo}: the hub does not accept the token: it is wrong or has expired; `hf auth login --force` takes a new one"
    return _outage(error)


def _gated(error: HfHubHTTPError, repo: Repo) -> str:
    ask = f"{repo} is gated: ask for access at {repo.page}"
    if error.response.status_code == 401:
        return f"{ask}, then `hf auth login` (or set HF_TOKEN)"
    return f"{ask}: the account of this token has none yet, or the token may not read gated repositories"


def _not_there(error: BaseException, repo: Repo) -> str:
    from huggingface_hub import get_token

    needed = "need `hf auth login` (or HF_TOKEN)"
    if get_token() is not None:
        needed = "cannot be seen with this token: `hf auth whoami` says whose it is, `hf auth login` takes another"
    return f"{repo} is not on the hub, or is private: check the name; private ones {needed}"


def _no_revision(error: BaseException, repo: Repo) -> str:
    return f"{repo} has no revision `{repo.revision}`; {repo.page}/tree/main lists its branches and tags"


def _not_cached(error: BaseException, repo: Repo) -> str:
    why, remedy = (_outages[-1], "try again later") if _outages else ("HF_HUB_OFFLINE is set", "unset it")
    return f"{why}, and {repo} is not (or not whole) in the cache: {remedy}, or where there is a network: `{repo.download}`"


def _no_file(error: BaseException, repo: Repo) -> str:
    match = re.search(r"/resolve/[^/\s]+/(\S+?)\.?\s", f"{error} ")
    return f"{repo} lacks a file that is needed{f': {match[1]}' if match else ''}; {repo.page}/tree/main shows what it has"


def _no_name(error: BaseException, repo: Repo) -> str:
    return f"`{repo.name}` is no folder here, and no name on the hub, which has the form owner/name"


def adapter_on_hub(path: Path) -> Repo | None:
    """The repository that `--adapter owner/name` or `owner/name@revision` means; None for what can only be a path here."""
    match = _HUB_ID.fullmatch(str(path))
    # `runs/typo` is a path: there is a folder `runs`.
    if match is None or Path(match["name"]).parent.exists() or match["name"].startswith("."):
        return None
    return Repo(match["name"], match["revision"], "model")


@functools.cache
def download_adapter(repo: Repo) -> Path:
    """The folder of an adapter on the hub, in the cache.

    Raises:
        LoadError: it cannot be had, or it asks for code of its base model to be run.
    """
    from httpx2 import HTTPError
    from huggingface_hub import constants, file_exists, snapshot_download

    require(repo)
    try:
        if not constants.is_offline_mode() and not any(file_exists(repo.name, name, revision=repo.revision) for name in _MARKS):
            raise LoadError(f"{repo} is no adapter: it has neither {' nor '.join(_MARKS)}")
        folder = Path(snapshot_download(repo.name, revision=repo.revision, allow_patterns=list(ADAPTER_FILES)))
    except (HTTPError, OSError, ValueError) as error:
        raise LoadError(why_refused(error, repo) or f"{repo} cannot be downloaded: {error}") from error
    facts = folder / "peftkit.json"
    if facts.is_file() and json.loads(facts.read_text(encoding="utf-8")).get("trust_remote_code"):
        raise LoadError(
            f"{repo} wants code from the repository of its base model to be run here (trust_remote_code). Read that code; "
            f"then `hf download {repo.name} --local-dir FOLDER` and name the folder"
        )
    return folder
