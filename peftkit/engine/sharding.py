"""Weights that processes share out among them (FSDP2, DeepSpeed ZeRO): gathered to be saved, dealt again when they are loaded.

What is saved is whole and the same for every way to train, so that a run can go on with another number of processes, or
another way. All processes must come here together: gathering is work for all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


def mark_root(model: nn.Module, wrapped: nn.Module) -> None:
    """Let a model know the module around it by which its processes share its weights out, if they do."""
    if isinstance(wrapped, FSDPModule):
        model.sharded_by = (wrapped,)  # type: ignore[assignment]  # in a tuple: it is no part of the model


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share out the weights of a model."""
    return getattr(model, "sharded_by", None) is not None


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all its parts, which the processes hold; as it is where it is whole."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def dealt(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, of which every process has a copy, divided as another one is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def return_parts(model: nn.Module) -> None:
    """Let go of weights that were gathered for a forward pass: reading and writing them means their parts again."""
    if not is_sharded(model):
        return
    (root,) = model.sharded_by  # type: ignore[misc]
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def whole(model: nn.Module, names: list[str], *, holds: bool) -> Iterator[None]:
    """A model whose named parameters are whole and on the CPU for as long as the context lasts.

    Args:
        model: the model.
        names: the parameters.
        holds: whether this process wants them; the others only take part.
    """
    return_parts(model)
    parts: list[tuple[nn.Module, str, nn.Parameter]] = []
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        parameter = owner.get_parameter(leaf)
        if isinstance(parameter, DTensor):
            tensor = gathered(parameter.detach())
            if holds:
                parts.append((owner, leaf, parameter))
                owner._parameters[leaf] = nn.Parameter(tensor.cpu(), requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for owner, leaf, parameter in parts:
            owner._parameters[leaf] = parameter


@dataclass(frozen=True)
class WholeState:
    """The state of an optimizer in the form that a lone process has it in."""

    optimizer: Any

    def state_dict(self) -> dict[str, Any]:
        """State by the place of each parameter, every tensor whole and on the CPU."""
        state: dict[str, Any] = tree_map(_on_cpu, self.optimizer.state_dict())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put `state_dict` back."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        parts = {
            place: {name: _part(value, parameters[place]) for name, value in values.items()}
            for place, values in state["state"].items()
        }
        self.optimizer.load_state_dict(state | {"state": parts})


def _on_cpu(value: Any) -> Any:
    return gathered(value).cpu() if isinstance(value, torch.Tensor) else value


def _part(value: Any, parameter: torch.Tensor) -> Any:
    """A number of the optimizer's, or its part of a tensor that is divided like the parameter."""
    is_like_it = isinstance(value, torch.Tensor) and value.shape == parameter.shape
    return dealt(value, parameter) if is_like_it else value


def place_whole(model: nn.Module, accelerator: Accelerator) -> None:
    """Put a model on its device before it is divided, unless it is to be divided because it does not fit there.

    Where it does not, it is tried out on the CPU, and every layer goes to the device as it is divided.
    """
    device = accelerator.device
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED) and not fits(model, device):
        return
    model.to(device)


def fits(model: nn.Module, device: torch.device) -> bool:
    """Whether a model takes at most half of what is free on a device."""
    if device.type != "cuda":
        return True
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return size <= torch.cuda.mem_get_info(device)[0] // 2
