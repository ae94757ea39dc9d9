"""Where an adapter is and what its files are called; free of torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftkit.errors import LoadError
from peftkit.hub import adapter_on_hub, download_adapter

FACTS, CONFIG, TENSORS = "peftkit.json", "adapter_config.json", "adapter_model.safetensors"
RENDERINGS = "renderings.json"  # rows and their tokens, see `peftkit.engine.parity`
MERGED = "merge.json"  # beside a merged model: what it was merged from, and how near it is


def adapter_folder(path: Path) -> Path:
    """The adapter folder of a run directory, the path itself, or what the hub has under this name (`owner/name@revision`).

    Raises:
        LoadError: there is none of them.
    """
    if not path.is_dir():
        repo = adapter_on_hub(path)
        if repo is None:
            raise LoadError(f"there is no run directory or adapter folder `{path}`")
        try:
            return download_adapter(repo)
        except LoadError as error:
            raise LoadError(f"there is no run directory or adapter folder `{path}`, and on the hub: {error}") from error
    if (path / "adapter").is_dir():
        return path / "adapter"
    if (path / "resolved.yaml").is_file():
        raise LoadError(
            f"the run {path} has no adapter yet: its training did not end; `peftkit train --resume --output {path}`"
        )
    return path


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        LoadError: the file cannot be read, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise LoadError(f"{path} holds no mapping")
    return data
