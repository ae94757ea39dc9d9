"""Where an adapter is and what its files are called; free of torch."""

from __future__ import annotations

from pathlib import Path

from peftkit.errors import LoadError

FACTS, CONFIG, TENSORS = "peftkit.json", "adapter_config.json", "adapter_model.safetensors"


def adapter_folder(path: Path) -> Path:
    """The adapter folder of a run directory, or the path itself.

    Raises:
        LoadError: there is neither.
    """
    if not path.is_dir():
        raise LoadError(f"there is no run directory or adapter folder `{path}`")
    if (path / "adapter").is_dir():
        return path / "adapter"
    if (path / "resolved.yaml").is_file():
        raise LoadError(
            f"the run {path} has no adapter yet: its training did not end; `peftkit train --resume --output {path}`"
        )
    return path
