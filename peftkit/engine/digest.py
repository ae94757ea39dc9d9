"""Short digests that tell whether two runs have read the same rows and begun with the same weights, and of which model."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import PretrainedConfig
from xxhash import xxh3_64, xxh3_128

from peftkit.engine.model import Base
from peftkit.hub import cached_commit
from peftkit.tasks.example import Example


def rows_digest(rows: Iterable[Example], before: str = "") -> str:
    """Of the token ids of rows in their order, and of what came before them."""
    digest = xxh3_64(before.encode())
    for row in rows:
        for sequence in row.sequences:
            digest.update(array("q", [len(sequence), *sequence]).tobytes())
    return digest.hexdigest()


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of tensors on the CPU: names, types, shapes and bytes."""
    digest = xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_fingerprint(base: Base, config: PretrainedConfig) -> str:
    """The commit of a hub model, or the sha256 of a local folder's config and weights: equal ones are the same model."""
    # transformers 5.23 leaves `_commit_hash` empty where a revision has been resolved before the file is asked for.
    commit = getattr(config, "_commit_hash", None) or cached_commit(base.path, base.revision)
    if commit is not None:
        return f"commit {commit}"
    digest = hashlib.sha256()
    patterns = ("config.json",) if base.init == "random" else ("config.json", "*.safetensors", "*.bin")
    for path in sorted(file for pattern in patterns for file in Path(base.path).glob(pattern)):
        with path.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return f"sha256 {digest.hexdigest()}"
