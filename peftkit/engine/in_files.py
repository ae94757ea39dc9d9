"""Weights that lie in files: mapped, read where they are used, and let go by the system when others need the room.

safetensors maps a checkpoint, and transformers keeps what it need not convert as it is (transformers 5.23): such weights take
no memory. What is converted while loading, and what is computed later, goes into files of ours.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import core_model_loading

from peftkit.engine.guard import give_back_heap

SMALLEST_BYTES = 2**18  # what is smaller stays in memory
Keep = Callable[[torch.Tensor], torch.Tensor]  # the same tensor, in a file or not


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself."""
    return tensor


@contextlib.contextmanager
def weights_in_files(folder: Path) -> Iterator[Keep]:
    """While it lasts, base models are loaded without their weights in memory; gives what puts other tensors into files.

    The files have no names and go with their tensors, so that nothing is left behind, however the process ends.

    Args:
        folder: a folder on the disk that has the room; it is made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mapped: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.nbytes < SMALLEST_BYTES else _in_file(tensor, folder)

    def materialize(source: Any, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        whole = source[...]
        tensor: torch.Tensor = whole.to(device=device, dtype=dtype)
        tensor = tensor if tensor is whole else keep(tensor)
        mapped.add(tensor.data_ptr())
        return tensor

    set_param = core_model_loading.set_param_for_module

    def set_kept(model: nn.Module, name: str, value: torch.Tensor, *rest: Any) -> None:
        plain = type(value) is torch.Tensor and value.data_ptr() not in mapped  # made of several: the experts of a layer
        set_param(model, name, keep(value) if plain else value, *rest)

    with (
        patch.object(core_model_loading, "_materialize_copy", materialize),
        patch.object(core_model_loading, "set_param_for_module", set_kept),
    ):
        yield keep


def _in_file(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    give_back_heap()  # of the tensors before this one: their holes add up to the size of the model
    number, path = tempfile.mkstemp(prefix=".weights-", dir=folder)
    os.close(number)
    try:
        save_file({"weight": tensor.detach().contiguous()}, path)
        with safe_open(path, "pt") as handle:
            return handle.get_tensor("weight")
    finally:
        os.unlink(path)  # the mapping stays


def cast(model: nn.Module, dtype: torch.dtype, keep: Keep = in_memory, but: Collection[int] = ()) -> Any:
    """The model with every floating-point parameter and buffer in a dtype, one after the other, in place.

    Args:
        model: the model.
        dtype: the dtype.
        keep: where what is converted goes.
        but: ids of parameters to leave as they are.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.dtype != dtype and id(tensor) not in but:
            tensor.data = keep(tensor.detach().to(dtype))
    return model
