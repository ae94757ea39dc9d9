"""Bottleneck adapters on tensors: small networks behind (or beside) linear layers of the base model, by forward hooks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftkit.errors import Problem, RecipeError

_INPUTS = re.compile(r"(^|[._])(q|k|v|key|query|value|in_proj|c_attn|qkv|wqkv|query_key_value)(_|$|\.|proj|lin)", re.IGNORECASE)
_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
_LAYER = re.compile(r"\.(\d+)\.")
_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "swish": nn.SiLU, "silu": nn.SiLU, "tanh": nn.Tanh}
_DEVIATION = {"bert": 0.02, "houlsby": 0.01}


class Bottleneck(nn.Module):
    """scaling * U f(D x): (..., hidden) -> (..., hidden)."""

    def __init__(self, hidden: int, width: int, section: Any, like: torch.Tensor) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": like.device, "dtype": like.dtype if like.is_floating_point() else torch.float32}
        self.down, self.up = nn.Linear(hidden, width, **options), nn.Linear(width, hidden, **options)
        self.activation, self.dropout = _ACTIVATIONS[section.non_linearity](), nn.Dropout(section.dropout)
        self.scaling = section.scaling
        for layer in (self.down, self.up):
            nn.init.zeros_(layer.bias)
            if section.init_weights == "bert":
                nn.init.normal_(layer.weight, std=_DEVIATION["bert"])
            elif section.init_weights == "houlsby":
                nn.init.trunc_normal_(layer.weight, std=_DEVIATION["houlsby"], a=-0.02, b=0.02)
        if section.init_weights == "mam_adapter":
            nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the layer's output."""
        result: torch.Tensor = self.dropout(self.up(self.activation(self.down(x.to(self.down.weight.dtype))))) * self.scaling
        return result.to(x.dtype)


def attach(model: Any, section: Any, whole: list[str], find_adapter: Callable[[str], Path]) -> Any:
    """The model with its adapters, everything else but `whole` frozen.

    Raises:
        RecipeError: no place for an adapter is found.
    """
    model.requires_grad_(False)
    found = list(places(model, section))
    if not found:
        what = f"{type(model).__name__} has no attention and feed-forward layers that could be found; name their last ones"
        raise RecipeError([Problem("", "adapter.target_modules", what)])
    for name in found:
        add(model, name, "bottleneck", new_bottleneck(model, name, section), section.style)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".bottleneck." in name or any(f".{part}." in f".{name}" for part in whole))
    model.adapter_settings = section.model_dump(mode="json")
    return model


def places(model: Any, section: Any) -> Iterator[str]:
    """Full names of the layers that get an adapter."""
    wanted, layers = section.target_modules, section.layers_to_transform
    layers = [layers] if isinstance(layers, int) else layers
    for name, module in list(model.named_modules()):
        found = _LAYER.search(name)
        if not isinstance(module, nn.Linear | Conv1D) or found is None or (layers and int(found[1]) not in layers):
            continue
        if wanted is None:
            kind = _kind(name, module)
            if kind == "feed-forward" or (kind == "attention" and section.style == "houlsby"):
                yield name
        elif _matches(name, wanted):
            yield name


def _matches(name: str, wanted: list[str] | str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in wanted)


def _kind(name: str, module: nn.Module) -> str:
    """Whether a linear layer is the last one of an attention or a feed-forward block."""
    parent, _, leaf = name.rpartition(".")
    inputs, outputs = _sizes(module)
    if _ATTENTION.search(parent):
        return "" if _INPUTS.search(leaf) else "attention"
    return "feed-forward" if outputs < inputs else ""


def _sizes(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features


def new_bottleneck(model: Any, name: str, section: Any) -> Bottleneck:
    """An adapter of the size that the layer of this name wants."""
    layer = model.get_submodule(name)
    hidden = _sizes(layer)[1]
    width = section.bottleneck_dim or max(1, round(hidden / section.reduction_factor))
    return Bottleneck(hidden, width, section, layer.weight)


def add(model: Any, name: str, attribute: str, network: nn.Module, style: str) -> None:
    """Put a network into a layer, under this attribute, so that its output is added to the layer's.

    Args:
        model: the model.
        name: of the layer.
        attribute: where the layer keeps the network.
        network: reads the layer's output or, for `parallel`, the input of the feed-forward block.
        style: see `BottleneckSection`.
    """
    layer = model.get_submodule(name)
    layer.add_module(attribute, network)
    if style != "parallel":
        layer.register_forward_hook(lambda module, args, output: output + getattr(module, attribute)(output))
        return
    entry = _entry_of(model, name)
    seen: list[torch.Tensor] = []
    entry.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer.register_forward_hook(lambda module, args, output: output + getattr(module, attribute)(seen.pop()))


def _entry_of(model: Any, name: str) -> nn.Module:
    """The first layer of the feed-forward block that `name` is the last one of: it widens, in the same transformer layer."""
    found = _LAYER.search(name)
    assert found is not None
    prefix, hidden = name[: found.end()], _sizes(model.get_submodule(name))[1]
    for other, module in model.named_modules():
        if other.startswith(prefix) and isinstance(module, nn.Linear | Conv1D) and not _ATTENTION.search(other):
            inputs, outputs = _sizes(module)
            if inputs == hidden and outputs > inputs:
                return module
    raise RecipeError([Problem("", "adapter.style", f"`parallel` finds no first layer of the feed-forward block of `{name}`")])
