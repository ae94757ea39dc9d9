"""What a pass through a model holds in memory: the model's own code, run on tensors that have shapes and no numbers.

Parameters are on the meta device, and so is everything computed with them. The batch is real, and so are masks, positions and
whatever else follows from it alone: code that branches on values, or picks rows by them, does here what it does in training.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from peftkit.engine.depth import common_depth, shallow_depths, shortened
from peftkit.engine.heap import heap_peak
from peftkit.engine.kernels import Autocast, Kernels, attention, quantised_linear

_CPU, _META = torch.device("cpu"), torch.device("meta")
_MOST_REAL = 2**26  # numbers of a result that are really computed; what is larger gets a shape only
_WHOLE_ON_CPU = 48  # layers
_aten = torch.ops.aten


@dataclass(frozen=True)
class Held:
    """Bytes beside the weights at one moment.

    Attributes:
        activations: of everything but gradients.
        gradients: of the trained parameters.
        fragmentation: holes between them, in the heap of a process on the CPU.
    """

    activations: int = 0
    gradients: int = 0
    fragmentation: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.activations + self.gradients + self.fragmentation

    def grown(self, other: Held, factor: float) -> Held:
        """What it becomes on a line through another one, `factor` times the way to that."""
        parts = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Held(*(max(0, round(own + factor * (at - own))) for own, at in parts))


Moments = tuple[Held, Held]  # the fullest ones before and after half of the gradients are there


def trace_training(
    model: nn.Module, loss: Callable[[], torch.Tensor], kernels: Kernels, *, gradients_exist: bool = False
) -> Held:
    """The fullest moment of a forward and backward pass.

    Of a deep stack of equal layers two short ones are traced: each layer more holds as much more.

    Args:
        model: on the meta device, in the mode that it trains in; it is left without gradients.
        loss: runs the forward pass.
        kernels: of the device that is planned for.
        gradients_exist: whether an earlier pass of the same step has left gradients, which this one adds to.
    """
    _strip(model)

    def trace() -> Moments:
        return _trace_whole(model, loss, kernels, gradients_exist=gradients_exist)

    return _at_full_depth(model, trace, kernels)


def _trace_whole(model: nn.Module, loss: Callable[[], torch.Tensor], kernels: Kernels, *, gradients_exist: bool) -> Moments:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter) if gradients_exist else None
    ledger = Ledger(kernels.block_bytes, shapes_only=True)
    there = [parameter.grad for parameter in trained if parameter.grad is not None]
    try:
        with ledger, _Stage(kernels) as stage:
            ledger.leave_out([*model.parameters(), *model.buffers(), *there])
            total = loss()
            stage.autocast.copies.clear()
            # `total.backward()` would go through the stage, which is off inside, where layers are recomputed (torch 2.13).
            one = torch.empty_like(total)
            _engine_run_backward((total,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)
            gradients = ledger.numbers_of(parameter.grad for parameter in trained if parameter.grad is not None)
        moments, before = ledger.fullest(gradients), sum(map(kernels.block, there))
        holes = ledger.holes(gradients) if kernels.device == "cpu" else 0
        first, second = (Held(held.activations, held.gradients + before, holes) for held in moments)
        return first, second
    finally:
        for parameter in trained:
            parameter.grad = None


def trace_inference(model: nn.Module, run: Callable[[], Any], kernels: Kernels) -> Held:
    """The fullest moment of a pass without gradients.

    Args:
        model: on the meta device, in evaluation mode.
        run: runs the pass.
        kernels: of the device that is planned for.
    """
    _strip(model)

    def trace() -> Moments:
        ledger = Ledger(kernels.block_bytes, shapes_only=True)
        with torch.no_grad(), ledger, _Stage(kernels):
            ledger.leave_out([*model.parameters(), *model.buffers()])
            run()
        holes = ledger.holes(set()) if kernels.device == "cpu" else 0
        first, second = (dataclasses.replace(held, fragmentation=holes) for held in ledger.fullest(set()))
        return first, second

    return _at_full_depth(model, trace, kernels)


def _at_full_depth(model: nn.Module, trace: Callable[[], Moments], kernels: Kernels) -> Held:
    depth = common_depth(model)
    # The holes of a heap grow with depth, but not by the same for each layer.
    if depth is None or (kernels.device == "cpu" and depth.layers <= _WHOLE_ON_CPU):
        return max(trace(), key=lambda held: held.total)
    short, longer = shallow_depths(depth)
    with shortened(model, short):
        low = trace()
    with shortened(model, longer):
        high = trace()
    factor = (depth.layers - short) / (longer - short)
    return max((a.grown(b, factor) for a, b in zip(low, high, strict=True)), key=lambda held: held.total)


def _strip(model: nn.Module) -> None:
    """Put parameters on the meta device that were made elsewhere (XLNet's, by `torch.FloatTensor`)."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                module.register_parameter(name, nn.Parameter(parameter.to(_META), requires_grad=parameter.requires_grad))


class Ledger(TorchDispatchMode):
    """Books every storage that operations make and let go of; real tensors are booked like those on the meta device.

    Args:
        block_bytes: what the allocator rounds sizes up to.
        shapes_only: whether new tensors of floating point get no numbers.
    """

    def __init__(self, block_bytes: int = 1, *, shapes_only: bool = False) -> None:
        super().__init__()
        self.block_bytes, self.shapes_only = block_bytes, shapes_only
        self.sizes: list[int] = []
        self.events: list[int] = []  # n: storage n was made; ~n: it is gone
        self.numbers: dict[int, int] = {}  # address of a living storage -> its number

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Book these as nothing."""
        for tensor in tensors:
            self._book(tensor, 0)

    def numbers_of(self, tensors: Iterable[torch.Tensor]) -> set[int]:
        """The numbers of living storages."""
        found = (self.numbers.get(tensor.untyped_storage()._cdata) for tensor in tensors)
        return {number for number in found if number is not None}

    def fullest(self, gradients: set[int]) -> Moments:
        """The moments at which most bytes were held; `gradients` are numbers of storages."""
        all_gradients = sum(self.sizes[number] for number in gradients)
        now, of_gradients, best = 0, 0, [Held(), Held()]
        for event in self.events:
            number = event if event >= 0 else ~event
            size = self.sizes[number] if event >= 0 else -self.sizes[number]
            now += size
            of_gradients += size if number in gradients else 0
            late = 0 < all_gradients <= 2 * of_gradients
            if now > best[late].total:
                best[late] = Held(now - of_gradients, of_gradients)
        return best[0], best[1]

    def holes(self, gradients: set[int]) -> int:
        """Bytes that the heap takes at most beyond what is in use at most."""
        used = max(held.total for held in self.fullest(gradients))
        return max(0, heap_peak(self.events, self.sizes, gradients) - used)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = _run(func, args, kwargs or {})
        if self.shapes_only and isinstance(result, torch.Tensor) and _is_new(result, args):
            result = _shapes(result)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                self._book(tensor, None)
        return result

    def _book(self, tensor: torch.Tensor, size: int | None) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self.numbers:
            return
        number = len(self.sizes)
        self.sizes.append(-(-storage.nbytes() // self.block_bytes) * self.block_bytes if size is None else size)
        self.events.append(number)
        self.numbers[address] = number
        weakref.finalize(storage, self._let_go, address)

    def _let_go(self, address: int) -> None:
        number = self.numbers.pop(address, None)
        if number is not None:
            self.events.append(~number)


class _Stage(TorchFunctionMode):
    """Lets model code believe that it runs on one device, and has attention and autocast work as on the one planned for."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.autocast = Autocast(kernels.device)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__" and func.__self__ is torch.Tensor.device:
            return _CPU
        if name in ("to", "cpu", "cuda") and isinstance(args[0], torch.Tensor):
            return _moved(args, kwargs)
        if name == "linear" and any(id(value) in self.kernels.quantised for value in (*args, *kwargs.values())):
            return quantised_linear(self.kernels, *args, **kwargs)
        if name == "addmm" and id(args[2]) in self.kernels.quantised:  # GPT-2's layers, which are turned into linear ones
            return quantised_linear(self.kernels, args[1], args[2].t())
        args, kwargs = self.autocast.cast(name, args, kwargs)
        if name == "scaled_dot_product_attention":
            return attention(self.kernels, *args, **kwargs)
        return func(*args, **kwargs)


def _moved(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """`tensor.to(...)` without the device, of which there is but one."""
    tensor, *rest = args
    kept: dict[str, Any] = {name: value for name, value in kwargs.items() if name in ("dtype", "copy", "memory_format")}
    for value in [*rest, kwargs.get("other")]:
        if isinstance(value, torch.dtype):
            kept["dtype"] = value
        elif isinstance(value, torch.Tensor):
            kept["dtype"] = value.dtype
    if kept.get("dtype") is None:
        kept.pop("dtype", None)
    moved: torch.Tensor = tensor.to(**kept) if kept else tensor
    return moved


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation: with numbers where it has only real arguments, by shapes otherwise."""
    tensors = list(_tensors(args)) + list(_tensors(kwargs.values()))
    if not any(tensor.is_meta for tensor in tensors):
        return _run_real(func, args, kwargs, tensors)
    if func in _ANSWERS:
        return _ANSWERS[func](func, args, kwargs)
    kwargs = {name: value for name, value in kwargs.items() if not (name == "device" and value is not None)}
    if any(not tensor.is_meta and tensor.dim() for tensor in tensors):
        if func._schema.is_mutable and not args[0].is_meta:
            return args[0]  # a real tensor cannot take what has no numbers
        args, kwargs = _shapes(args), {name: _shapes(value) for name, value in kwargs.items()}
    return func(*args, **kwargs)


def _run_real(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
    """With numbers, unless the result would be too large to compute."""
    if len(tensors) > 1 and not func._schema.is_mutable and _broadcast_size(tensors) > _MOST_REAL:
        return func(*_shapes(args), **{name: _shapes(value) for name, value in kwargs.items() if name != "device"})
    return func(*args, **kwargs)


def _is_new(result: torch.Tensor, args: tuple[Any, ...]) -> bool:
    """Whether this is a tensor made of nothing (`torch.zeros`), in which gradients may be wanted."""
    return not result.is_meta and result.is_floating_point() and result.dim() > 0 and not any(True for _ in _tensors(args))


def _broadcast_size(tensors: list[torch.Tensor]) -> int:
    """Numbers in what an elementwise operation makes of these: a mask (T, T) of rows of positions, say."""
    by_dim = list(zip_longest(*(reversed(tensor.shape) for tensor in tensors), fillvalue=1))
    fits = all(size in (1, max(sizes)) for sizes in by_dim for size in sizes)
    return math.prod(map(max, by_dim)) if fits else 0


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _shapes(value: Any) -> Any:
    """The same on the meta device."""
    if isinstance(value, torch.Tensor):
        return value if value.is_meta else torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
    if isinstance(value, list | tuple):
        return type(value)(_shapes(part) for part in value)
    return value


# What operations whose result depends on numbers answer for tensors that have none.


def _number(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return True if args[0].dtype is torch.bool else 1.0 if args[0].is_floating_point() else 1


def _none_of_them(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """`any`, which asks for what should not be there: infinity, NaN."""
    return torch.zeros(func(*args, **kwargs).shape, dtype=torch.bool)


def _all_places(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """`nonzero`, as if nothing were zero."""
    return torch.ones(args[0].shape).nonzero()


def _spread(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`topk` and the like whose places are spread evenly: every expert of a mixture gets its share of the tokens."""
    values, places = func(*args, **kwargs)
    dim = args[2] if len(args) > 2 and func is _aten.topk.default else -1
    size = args[0].shape[dim] if args[0].dim() else 1
    return values, (torch.arange(places.numel()) % size).reshape(places.shape)


def _picked(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """`x[mask]` and `x[mask] = y` with the places for the mask, which kernels work with too."""
    target, indices, *rest = args
    places: list[Any] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            chosen = torch.ones(index.shape) if index.is_meta else index
            places += [_shapes(part) for part in chosen.nonzero().unbind(1)]
        else:
            places.append(None if index is None else _shapes(index))
    result: torch.Tensor = func(_shapes(target), places, *(_shapes(part) for part in rest), **kwargs)
    return target if func._schema.is_mutable else result


def _grouped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Products of groups of rows with a matrix each; in shapes torch takes bfloat16 alone (2.13), unlike its kernels."""
    left, right, offsets = args[0], args[1], args[2] if len(args) > 2 else kwargs["offs"]
    first = left.shape[0] if left.dim() == 2 else left.shape[1]
    shape = [first, right.shape[-1]]
    if left.dim() == right.dim():
        shape = [offsets.numel() if left.dim() == 2 else left.shape[0], *shape]
    return torch.empty(shape, dtype=kwargs.get("out_dtype") or left.dtype, device=_META)


_ANSWERS: dict[Any, Callable[..., Any]] = {
    _aten._grouped_mm.default: _grouped,
    _aten.any.default: _none_of_them,
    _aten.any.dim: _none_of_them,
    _aten.any.dims: _none_of_them,
    _aten._local_scalar_dense.default: _number,
    _aten.nonzero.default: _all_places,
    _aten.topk.default: _spread,
    _aten.index.Tensor: _picked,
    _aten.index_put.default: _picked,
    _aten.index_put_.default: _picked,
    _aten._index_put_impl_.default: _picked,
}
