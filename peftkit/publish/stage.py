"""The folder that is uploaded: what a loader needs, with nothing in it of the rows or of this machine."""

from __future__ import annotations

import fnmatch
import json
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftkit.adapters import CONFIG, FACTS, MERGED, RENDERINGS
from peftkit.errors import RecipeError
from peftkit.publish.card import model_card, public
from peftkit.publish.subject import Published
from peftkit.run import write_json, write_text

# What models, adapters and tokenizers are loaded from; anything else that lies in the folder stays where it is.
TRAVELS = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "experts/*",
    "additional_chat_templates/*",
)
STAYS = (RENDERINGS, MERGED, ".*", "*/.*")  # training rows; paths of this machine
_WITH_PATHS = (CONFIG, FACTS, "config.json", "tokenizer_config.json", "generation_config.json")
_WEIGHTS_SUFFIX = ".safetensors"


def stage(found: Published, repo_id: str, folder: Path, renderings: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Copy what travels into an empty folder, with the model card; returns the names, sorted.

    Args:
        found: what is published.
        repo_id: its name on the hub.
        folder: empty.
        renderings: of rows that are nobody's, in place of those of training rows.

    Raises:
        RecipeError: something of this machine would go with it all the same.
    """
    for path in travelling(found.folder):
        target = folder / path.relative_to(found.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name in _WITH_PATHS:
            write_json(target, _without_paths(path.name, json.loads(path.read_text(encoding="utf-8")), found))
        else:
            shutil.copyfile(path, target)
    if renderings:
        write_json(folder / RENDERINGS, {"renderings": list(renderings)})
    write_text(folder / "README.md", model_card(found, repo_id))
    _refuse_secrets(found, folder)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def travelling(folder: Path) -> Iterator[Path]:
    """The files of a folder that are uploaded."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and _is_one(name, TRAVELS) and not _is_one(name, STAYS):
            yield path


def _is_one(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _without_paths(name: str, data: Any, found: Published) -> Any:
    """The content of a config file as others need it: the base by its hub id, no path of this machine."""
    data = public(data)
    key = {CONFIG: "base_model_name_or_path", FACTS: "base"}.get(name)
    if key and data.get(key):
        data[key] = found.base or data[key]
    data.pop("_name_or_path", None)
    return data


def _refuse_secrets(found: Published, folder: Path) -> None:
    """Look for what must not travel in every file that we have written or that may hold settings."""
    from huggingface_hub import get_token

    secrets = {"the token": get_token(), "the home folder": f"{Path.home()}/", "this machine's name": platform.node()}
    secrets["the folder of the run"] = str(found.folder.absolute())
    known = {what: text for what, text in secrets.items() if text and len(text) > 6}
    for path in [folder / "README.md", *folder.rglob("*.json"), *folder.rglob("*.jinja")]:
        text = path.read_text(encoding="utf-8", errors="replace")
        for what, secret in known.items():
            if secret in text:
                place = path.relative_to(folder)
                raise RecipeError(f"{place} would hold {what}, so nothing is published: take it out of the recipe or {place}")
