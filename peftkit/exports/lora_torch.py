"""A LoRA's tensors with one rank and one scale for all layers, which is what every engine reads alike."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from peftkit.adapters import TENSORS
from peftkit.exports.subject import Subject

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Layer:
    """The LoRA of one layer: W + scale B A.

    Attributes:
        name: of the layer in the base model.
        a: (r, in_features); of an embedding (r, num_embeddings).
        b: (out_features, r).
        scale: what PEFT multiplies the product by.
        is_embedding: whether the layer is an embedding.
    """

    name: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    is_embedding: bool = False


def read_layers(subject: Subject) -> list[Layer]:
    """The layers of a LoRA adapter, in the order of its file."""
    state = load_file(subject.folder / TENSORS)
    layers = []
    for name, tensor in state.items():
        if ".lora_A." in name or name.endswith(".lora_embedding_A"):
            other = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
            layer = name.removeprefix(_PREFIX).partition(".lora_")[0]
            scale = _scale(subject.adapter, layer)
            layers.append(Layer(layer, tensor, state[other], scale, "lora_embedding" in name))
    return layers


def other_tensors(subject: Subject) -> Iterator[tuple[str, torch.Tensor]]:
    """What a LoRA's file has besides: heads that were trained whole."""
    yield from ((name, tensor) for name, tensor in load_file(subject.folder / TENSORS).items() if ".lora_" not in name)


def uniform(layers: list[Layer]) -> tuple[list[Layer], int, float]:
    """The same updates with one rank and one scale, and lora_alpha for it: lower ranks are filled up with zeros.

    Layers that have one rank and one scale keep their tensors.
    """
    rank = max(layer.a.shape[0] for layer in layers)
    scales = {layer.scale for layer in layers}
    scale = scales.pop() if len(scales) == 1 else 1.0
    changed = []
    for layer in layers:
        missing = rank - layer.a.shape[0]
        a = torch.nn.functional.pad(layer.a, (0, 0, 0, missing))
        b = torch.nn.functional.pad(layer.b if layer.scale == scale else layer.b * layer.scale, (0, missing))
        changed.append(Layer(layer.name, a, b, scale, layer.is_embedding))
    return changed, rank, scale * rank


def _scale(config: Mapping[str, Any], layer: str) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA, with PEFT's patterns of names."""
    rank = _of_pattern(config.get("rank_pattern") or {}, layer, config["r"])
    alpha = _of_pattern(config.get("alpha_pattern") or {}, layer, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of_pattern(pattern: Mapping[str, Any], layer: str, default: Any) -> Any:
    """PEFT's rule (peft.utils.other.get_pattern_key): the first pattern that the end of the name matches."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", layer)), default)


def write_tensors(path: Path, layers: list[Layer], others: Mapping[str, torch.Tensor]) -> None:
    """Write layers as PEFT names them."""
    from safetensors.torch import save_file

    state = dict(others)
    for layer in layers:
        ends = ("lora_embedding_A", "lora_embedding_B") if layer.is_embedding else ("lora_A.weight", "lora_B.weight")
        state |= {f"{_PREFIX}{layer.name}.{ends[0]}": layer.a, f"{_PREFIX}{layer.name}.{ends[1]}": layer.b}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})
