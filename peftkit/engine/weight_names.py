"""Which weights a checkpoint has, from its headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from peftkit.errors import LoadError

if TYPE_CHECKING:
    from peftkit.engine.model import Base


def weight_names(base: Base) -> set[str] | None:
    """Names of the tensors in the checkpoint, from the headers alone; None where there is none at hand to look at."""
    if base.init == "random":
        return None
    path = Path(base.path)
    if not path.is_dir():
        return _on_hub(base)
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        return set(json.loads(index.read_text())["weight_map"])
    if not single.is_file():
        return None
    try:
        with safe_open(single, "pt") as handle:
            return set(handle.keys())
    except SafetensorError as error:
        raise LoadError(f"{single} is damaged: {error}") from error


def _on_hub(base: Base) -> set[str] | None:
    try:
        return set(get_safetensors_metadata(base.path, revision=base.revision).weight_map)
    except NotASafetensorsRepoError as error:
        if not base.use_safetensors:
            return None
        raise LoadError(
            f"`{base.path}` has no weights in safetensors on the hub; `model.use_safetensors: false` takes pickled ones, "
            "which can run code"
        ) from error
    except Exception:  # offline, or gone in the meantime: loading will say which
        return None


def missing_weights(base: Base, model: PreTrainedModel) -> set[str]:
    """What `load_base_model` will find missing, foretold from the checkpoint's header; empty where it cannot be told."""
    names = weight_names(base)
    if names is None:
        return set()
    prefix = f"{model.base_model_prefix}."
    wanted = {name for name, _ in model.named_parameters()}
    missing = {name for name in wanted if name not in names and name.removeprefix(prefix) not in names}
    # Checkpoints whose names are converted while loading cannot be compared this way.
    return missing if len(missing) < len(wanted) // 4 else set()
