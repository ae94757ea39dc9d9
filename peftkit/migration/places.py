"""Their relative paths, found from where they may start and written so that they lead there from the recipe."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from peftkit.recipe.paths import FILE_SUFFIXES, data_suffix, is_url, local_name

_NUM_PARENTS = 4  # examples/train_lora/llama3.yaml names data/ beside examples/
_HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+")


def find_place(name: str, config_dir: Path) -> Path | None:
    """What a path of theirs leads to, from the current folder, the configuration's, or one around it; None for nothing."""
    if is_url(name):
        return None
    folders = [Path(), config_dir.absolute(), *config_dir.absolute().parents[:_NUM_PARENTS]]
    if _HUB_ID.fullmatch(name) and data_suffix(name) not in FILE_SUFFIXES:
        folders = folders[:1]  # theirs look for a folder of this name here, and on the hub next
    for folder in folders:
        path = (folder / os.path.expanduser(local_name(name))).absolute()
        if os.path.exists(path) or glob.glob(str(path), recursive=True):
            return Path(os.path.normpath(path))
    return None


def written_place(name: str, config_dir: Path, recipe_dir: Path) -> str:
    """A path of theirs as the recipe has to say it: relative to the recipe's folder, where there is something."""
    path = find_place(name, config_dir)
    if path is None or os.path.isabs(os.path.expanduser(name)):
        return name
    return from_recipe(path, recipe_dir)


def from_recipe(path: Path, recipe_dir: Path) -> str:
    """A path relative to the recipe's folder; that of a folder cannot be taken for a name on the hub."""
    relative = os.path.relpath(path, recipe_dir.absolute())
    return f"./{relative}" if path.is_dir() and not relative.startswith(".") else relative
