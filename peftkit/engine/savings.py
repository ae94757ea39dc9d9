"""What makes a step need less memory without changing its loss: recomputed layers, and activations kept off the GPU."""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from peftkit.plan import Plan

Checkpointing = bool | Literal["selective"] | int

MIN_OFFLOADED_BYTES = 2**20  # smaller tensors cost more by the start of a copy than they free
_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1, _aten.bmm.default: 0, _aten.baddbmm.default: 1}
_DEAR = ("attention", "flash_attn", "varlen_attn", "grouped_mm", "int8_scaled_mm")  # parts of names, of other libraries too
# A product this much wider than what it sums over costs little to make again for the memory that it takes: lora_B's.
_CHEAP_RATIO = 8


def save_memory(model: PreTrainedModel, plan: Plan) -> None:
    """Do what the recipe asks for: once, after the adapter is attached and before the first step.

    Args:
        model: the base model inside the adapted one.
        plan: says what is asked for.
    """
    training = plan.recipe.training
    if training.gradient_checkpointing:
        checkpoint_layers(model, training.gradient_checkpointing)
    if training.activation_offloading:
        offload_activations(model, Offload(model.parameters()))


def recomputable(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that can be recomputed one by one, in the order of the model; the encoder's come first."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_problem(model: PreTrainedModel, setting: Checkpointing) -> str:
    """Why a model cannot follow `training.gradient_checkpointing`; empty where it can."""
    name = type(model).__name__
    if not setting:
        return ""
    if not model.supports_gradient_checkpointing:
        return f"{name} does not support it; leave it out, or lower training.micro_batch_size"
    # Code of a model's own repository may keep transformers' old form, which ignores what is asked for beyond yes or no.
    if setting is not True and "value" in inspect.signature(model._set_gradient_checkpointing).parameters:
        return f"is {setting}; {name} can do it for all layers alone: use true"
    layers = len(recomputable(model))
    if isinstance(setting, int) and not isinstance(setting, bool) and setting > layers:
        return f"is {setting}; {name} has {layers} layers that can be recomputed" + ("" if layers else " alone: use true")
    return ""


def checkpoint_layers(model: PreTrainedModel, setting: Checkpointing) -> None:
    """Let a model's layers be recomputed in the backward pass.

    Args:
        model: the base model.
        setting: True: all layers; a number: so many, the first ones, whose activations would be kept the longest;
            `selective`: all, but for their products of matrices and attention, which are kept.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if setting == "selective":
        options["context_fn"] = keep_dear
    model.activation_checkpointing_enable(options)
    if isinstance(setting, int) and not isinstance(setting, bool):
        for layer in recomputable(model)[setting:]:
            layer.gradient_checkpointing = False  # type: ignore[assignment]


def is_dear(op: Any, args: tuple[Any, ...]) -> bool:
    """Whether a result is dear to compute for its size: products of matrices and attention, unlike norms and activations."""
    if op in _PRODUCTS:
        left, right = args[_PRODUCTS[op] :][:2]
        return bool(right.shape[-1] <= _CHEAP_RATIO * left.shape[-1])
    name = str(op)
    return any(part in name for part in _DEAR) and "backward" not in name


def keep_dear() -> tuple[_Keep, _Reuse]:
    """What a layer's forward pass runs in, and what its repetition in the backward pass runs in.

    torch's own pair (`create_selective_checkpoint_contexts`, 2.13) reuses a result that was changed in place after it was kept,
    in silence where a view was changed: PEFT's layers add to the base layer's output so.
    """
    kept: dict[Any, list[Any]] = defaultdict(list)
    return _Keep(kept), _Reuse(kept)


class _Mode(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, kept: dict[Any, list[Any]]) -> None:
        super().__init__()
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Kernels that are compiled, such as flex attention's, stay so."""
        return True


class _Keep(_Mode):
    """Keeps dear results, in order for each operation; forgets those that are changed in place."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for tensor in _changed(op, args, kwargs or {}):
            self._forget(tensor)
        if is_dear(op, args):
            self.kept[op].append(tree_map_only(torch.Tensor, torch.Tensor.detach, result))
        return result

    def _forget(self, changed: torch.Tensor) -> None:
        place = _storage(changed)
        for results in self.kept.values():
            for number, result in enumerate(results):
                tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
                if any(_storage(tensor) == place for tensor in tensors):
                    results[number] = None


class _Reuse(_Mode):
    """Hands out what was kept, each once; what was forgotten is computed."""

    def __init__(self, kept: dict[Any, list[Any]]) -> None:
        super().__init__(kept)
        self.num_used: Counter[Any] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_dear(op, args):
            place, results = self.num_used[op], self.kept[op]
            self.num_used[op] += 1
            if place < len(results) and results[place] is not None:
                result, results[place] = results[place], None
                return result
        return op(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> StorageWeakRef:
    """The memory of a tensor and of its views, as something to compare; it is no other's for as long as this is held."""
    return StorageWeakRef(tensor.untyped_storage())


def _changed(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors among the arguments that an operation writes to."""
    schema = getattr(op, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    named = dict(zip([stated.name for stated in schema.arguments], args, strict=False)) | kwargs
    written = [named.get(stated.name) for stated in schema.arguments if stated.alias_info and stated.alias_info.is_write]
    return [leaf for leaf in tree_leaves(written) if isinstance(leaf, torch.Tensor)]


class Offload:
    """Moves what a forward pass saves for the backward pass to pinned memory of the CPU, and back when it is needed.

    Copies out run on a stream of their own, beside the computation. Parameters, which are on the GPU anyway, and small
    tensors stay; what several operations save is copied once.

    Args:
        parameters: what stays.
        min_bytes: the smallest tensor to move.
    """

    def __init__(self, parameters: Iterator[nn.Parameter], min_bytes: int = MIN_OFFLOADED_BYTES) -> None:
        self._parameters, self._min_bytes = list(parameters), min_bytes
        self._resident: set[StorageWeakRef] = set()
        self._moved: WeakValueDictionary[Any, Callable[[], torch.Tensor]] = WeakValueDictionary()
        self._stream: torch.cuda.Stream | None = None

    def context(self) -> saved_tensors_hooks:
        """What a forward pass runs in."""
        # Read at every pass: where parameters lie changes when the model moves to its device.
        self._resident = {_storage(parameter) for parameter in self._parameters}
        self._moved.clear()
        return saved_tensors_hooks(self._pack, lambda packed: packed() if callable(packed) else packed)

    def _pack(self, tensor: torch.Tensor) -> Any:
        is_small = tensor.numel() * tensor.element_size() < self._min_bytes
        if is_small or tensor.layout != torch.strided or (storage := _storage(tensor)) in self._resident:
            return tensor
        key = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version)
        move_back = self._moved.get(key)
        if move_back is None:
            move_back = self._moved[key] = self.move_out(tensor)
        return move_back

    def move_out(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start the copy to the CPU; returns what brings it back."""
        device = tensor.device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            held.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is not used again before the copy is done
        done = self._stream.record_event()

        def move_back() -> torch.Tensor:
            torch.cuda.current_stream(device).wait_event(done)
            return held.to(device, non_blocking=True)

        return move_back


def offload_activations(model: nn.Module, offload: Offload) -> None:
    """Let every forward pass of a model run in an `Offload`; what its caller computes from the outputs does not."""
    open_contexts: list[saved_tensors_hooks] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        open_contexts.append(offload.context())
        open_contexts[-1].__enter__()

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        open_contexts.pop().__exit__(None, None, None)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)
