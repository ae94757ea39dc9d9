"""Deep stacks of layers that repeat, cut short for a while: what a few of them hold tells of all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

_LONGEST_PERIOD = 6
_WORTH_IT = 8  # layers from which two short traces take less time than a whole one


@dataclass(frozen=True)
class Depth:
    """The stacks of a model.

    Attributes:
        layers: how many layers each has.
        period: after how many of them they repeat.
    """

    layers: int
    period: int


def common_depth(model: nn.Module) -> Depth | None:
    """The depth of a model all of whose stacks are as deep and repeat alike; None where cutting short would tell too little."""
    stacks = list(_stacks(model))
    depths = {Depth(len(stack), _period([_signature(layer) for layer in stack])) for _, _, stack in stacks}
    if len(depths) != 1:
        return None
    depth = depths.pop()
    short, longer = shallow_depths(depth)
    fits = depth.period > 0 and (depth.layers - short) % (longer - short) == 0
    return depth if fits and short + longer < depth.layers else None


def shallow_depths(depth: Depth) -> tuple[int, int]:
    """Two numbers of layers whose difference is one period."""
    period = max(1, depth.period)
    short = period * -(-2 // period)
    return short, short + period


@contextlib.contextmanager
def shortened(model: nn.Module, layers: int) -> Iterator[None]:
    """The model with so many layers in each stack, the first ones."""
    stacks = list(_stacks(model))
    for parent, name, stack in stacks:
        setattr(parent, name, nn.ModuleList(list(stack)[:layers]))
    try:
        yield
    finally:
        for parent, name, stack in stacks:
            setattr(parent, name, stack)


def _stacks(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.ModuleList]]:
    """The lists of layers that are in no other list, each with the module that holds it."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            if len(child) >= _WORTH_IT:
                yield model, name, child
        else:
            yield from _stacks(child)


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    """What two layers that hold alike have in common."""
    parameters = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()]
    modules = [(type(module), getattr(module, "gradient_checkpointing", None)) for module in layer.modules()]
    return (*parameters, *modules)


def _period(signatures: Sequence[tuple[Any, ...]]) -> int:
    """After how many the signatures repeat; 0 where they do not."""
    for period in range(1, _LONGEST_PERIOD + 1):
        if signatures[period:] == signatures[:-period]:
            return period
    return 0
