"""Short digests that tell whether two runs have read the same rows and begun with the same weights."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping

import torch
from xxhash import xxh3_64, xxh3_128

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
