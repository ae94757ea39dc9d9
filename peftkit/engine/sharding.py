"""Weights that processes share out among them (FSDP2, DeepSpeed ZeRO): gathered to be saved, dealt again when they are loaded.

What is saved is whole and the same for every way to train, so that a run can go on with another number of processes, or
another way. All processes must come here together: gathering is work for all of them.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from peftkit.engine import tensor_parallel, zero
from peftkit.engine.hooks import hook
from peftkit.plan import Plan
from peftkit.recipe.sharded import ELEMENTWISE

if TYPE_CHECKING:
    from peftkit.engine.step import Step


# What launched runs have wrapped: freeing DDP's reducer while holding the GIL can wait for ever for gloo's thread, which waits
# for the GIL (seen with torch 2.13). The command line ends such a process without freeing.
_KEPT: list[Any] = []


@dataclass(frozen=True)
class Prepared:
    """A step and its optimizer as accelerate has wrapped them.

    Attributes:
        step: what to call.
        optimizer: what takes steps.
        state: the optimizer's state, to be saved and loaded.
        inner: the optimizer of torch whose learning rate a schedule sets.
    """

    step: nn.Module
    optimizer: Any
    state: Any
    inner: torch.optim.Optimizer


def prepare(accelerator: Accelerator, plan: Plan, step: Step, optimizer: torch.optim.Optimizer) -> Prepared:
    """Wrap a step for the processes of a run, and let its model know by what its weights are shared out, if they are."""
    by_zero = accelerator.distributed_type == DistributedType.DEEPSPEED
    if by_zero:  # which puts parts in the place of the optimizer's parameters
        parameters = [part for group in optimizer.param_groups for part in group["params"]]
        groups = optimizer.state_dict()["param_groups"]
        zero.settle(accelerator, plan, step)
    elif accelerator.distributed_type == DistributedType.FSDP:
        kept = kept_whole(plan, step.model, step._no_split_modules)
        for parameter in kept:
            parameter.data = parameter.data.to(accelerator.device)
        step.kept_whole = kept
        accelerator.state.fsdp_plugin.ignored_modules = [nn.ParameterList(kept)] if kept else None
    divided = tensor_parallel.divides_layers(step.model)
    # Where layers are divided nothing is wrapped; accelerate (1.15) would look for the model inside of the step in vain.
    wrapped, prepared = (step, accelerator.prepare_optimizer(optimizer)) if divided else accelerator.prepare(step, optimizer)
    if torch.distributed.is_initialized():
        _KEPT.extend([accelerator, wrapped])
    if by_zero or divided or isinstance(wrapped, FSDPModule):
        step.model.sharded_by = (wrapped,)  # type: ignore[assignment]  # in a tuple: it is no part of the model
    if by_zero:
        state = zero.ZeroState(prepared.optimizer, parameters, groups)
        return Prepared(wrapped, prepared, state, prepared.optimizer.optimizer)
    return Prepared(wrapped, prepared, WholeState(prepared), prepared.optimizer)


def kept_whole(plan: Plan, model: nn.Module, layers: Sequence[str]) -> list[nn.Parameter]:
    """What FSDP2 must leave alone, and every process has whole, as under DDP.

    That is all that is trained (optimizers take no mixture), where layers share some of it, where some has hooks of its own,
    or where the method or the optimizer computes with whole tensors between passes.

    Args:
        plan: says which method.
        model: the model with its adapter.
        layers: class names of the layers that FSDP2 gathers one after the other.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    penalty = hook(plan.method, "penalty")
    has_terms = penalty is not None and torch.is_tensor(penalty(model))
    found = Counter(
        id(parameter) for module in model.modules() if type(module).__name__ in layers for parameter in set(module.parameters())
    )
    special = any(found[id(parameter)] > 1 or parameter._backward_hooks for parameter in trained)
    special = special or plan.recipe.training.optim not in ELEMENTWISE
    return trained if has_terms or special or hook(plan.method, "after_step") or hook(plan.method, "batch_penalty") else []


def backward(accelerator: Accelerator, wrapped: Any, loss: torch.Tensor, *, last: bool) -> None:
    """Add a loss's gradients; after the `last` pass of a step they are those of all processes.

    accelerate would let DeepSpeed take its step here, before anything was checked.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        wrapped.set_gradient_accumulation_boundary(is_boundary=last)
        wrapped.backward(loss)
        return
    accelerator.backward(loss)
    for parameter in getattr(wrapped, "kept_whole", ()) if last else ():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= accelerator.num_processes


def clipped_norm(accelerator: Accelerator, wrapped: Any, trained: list[nn.Parameter], limit: float | None) -> float:
    """The norm of all gradients before they are clipped to a limit. DeepSpeed tells it of the step that it takes here."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        wrapped.step()
        return float(wrapped.get_global_grad_norm())
    if tensor_parallel.divides_layers(getattr(wrapped, "model", wrapped)):
        return tensor_parallel.clipped_norm(trained, limit)
    return float(gathered(accelerator.clip_grad_norm_(trained, limit if limit is not None else math.inf)))


def data_share(model: nn.Module, cp_size: int = 1) -> tuple[int, int]:
    """Among how many processes rows are shared out, and which of them this is.

    Those that divide layers all have every row; so many that share tokens, neighbours by rank, have the same rows.
    """
    if not torch.distributed.is_initialized() or tensor_parallel.divides_layers(model):
        return 1, 0
    return torch.distributed.get_world_size() // cp_size, torch.distributed.get_rank() // cp_size


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share out the weights of a model."""
    return getattr(model, "sharded_by", None) is not None


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter."""
    if zero.is_divided(parameter):
        return parameter.ds_tensor  # type: ignore[attr-defined]
    return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor or parameter with all its parts, which the processes hold; as it is where it is whole."""
    if zero.is_divided(tensor):
        return zero.gathered(tensor)
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def assign(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """Give a parameter other values, of which every process has a copy."""
    if hasattr(parameter, "_hp_mapping") or zero.is_divided(parameter):
        zero.assign(parameter, tensor)
    else:
        with torch.no_grad():
            parameter.copy_(dealt(tensor, parameter))


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
        if isinstance(parameter, DTensor) or zero.is_divided(parameter):
            tensor = gathered(parameter)
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
