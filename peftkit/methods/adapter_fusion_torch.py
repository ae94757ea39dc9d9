"""AdapterFusion on tensors: frozen bottleneck adapters in one place, and attention over what each of them says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from peftkit.errors import LoadError, Problem, RecipeError
from peftkit.methods.bottleneck import BottleneckSection
from peftkit.methods.bottleneck_torch import Bottleneck, add, new_bottleneck, places

_EXPERTS, _FILES = "experts", ("adapter_config.json", "adapter_model.safetensors")
_HERE = ".adapter_fusion."
_DEVIATION = 0.02  # of the queries and keys at the start, as in BERT


class Fusion(nn.Module):
    """sum_n softmax_n(Q h . K z_n / temperature) V z_n, where z_n is adapter n's output for h; shapes (..., hidden)."""

    def __init__(self, experts: Sequence[Bottleneck], section: Any) -> None:
        super().__init__()
        like = experts[0].up.weight
        options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        hidden = like.shape[0]
        self.experts, self.temperature = nn.ModuleList(experts), section.temperature
        self.query, self.key = nn.Linear(hidden, hidden, **options), nn.Linear(hidden, hidden, **options)
        self.value = nn.Linear(hidden, hidden, bias=False, **options)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=_DEVIATION)
            nn.init.zeros_(layer.bias)
        nn.init.eye_(self.value.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the layer's output."""
        h = x.to(self.query.weight.dtype)
        outputs = torch.stack([expert(h) for expert in self.experts], dim=-2)  # (..., adapters, hidden)
        scores = (self.query(h).unsqueeze(-2) * self.key(outputs)).sum(-1)  # (..., adapters)
        shares = (scores / self.temperature).softmax(-1)
        mixed: torch.Tensor = (shares.unsqueeze(-1) * self.value(outputs)).sum(-2)
        return mixed.to(x.dtype)


def attach(model: Any, section: Any, whole: list[str], find_adapter: Callable[[str], Path]) -> Any:
    """The model with its adapters and the attention over them; everything but that and `whole` frozen.

    Raises:
        RecipeError: the adapters are not in the same places.
        LoadError: an adapter does not fit the model.
    """
    model.requires_grad_(False)
    folders = [find_adapter(name) for name in section.adapters]
    sections = [_section_of(folder) for folder in folders]
    found = [list(places(model, each)) for each in sections]
    for name, here, each in zip(section.adapters, found, sections, strict=True):
        if here != found[0] or each.style != sections[0].style:
            what = f"`{name}` and `{section.adapters[0]}` are in different places of the layers: train both with one `style`"
            raise RecipeError([Problem("", "adapter.adapters", what)])
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    for place in found[0]:
        layers = [_expert(model, place, *pair) for pair in zip(sections, tensors, strict=True)]
        add(model, place, _HERE.strip("."), Fusion(layers, section), sections[0].style)
    for name, parameter in model.named_parameters():
        trained = _HERE in name and ".experts." not in name
        parameter.requires_grad_(trained or any(f".{part}." in f".{name}" for part in whole))
    kept = [f"{_EXPERTS}/{number}" for number in range(len(folders))]
    model.adapter_settings = section.model_dump(mode="json") | {"adapters": kept}
    model.expert_paths = folders
    return model


def _section_of(folder: Path) -> Any:
    """The settings that an adapter was made from; what it drops in training it does not drop here."""
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["settings"]
    return BottleneckSection.model_validate(settings).model_copy(update={"dropout": 0.0})


def _expert(model: Any, place: str, section: Any, tensors: dict[str, torch.Tensor]) -> Bottleneck:
    """One adapter's network for one layer, with its tensors; on the meta device with their shapes.

    Tasks name the backbone's layers with a prefix or without (`bert.encoder...`, `encoder...`).
    """
    network, prefix = new_bottleneck(model, place, section), f"{model.base_model_prefix}."
    names = [place, place.removeprefix(prefix), prefix + place]
    start = next((name for name in names if f"{name}.bottleneck.up.weight" in tensors), place) + ".bottleneck."
    state = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    own = network.state_dict()
    if {name: tensor.shape for name, tensor in state.items()} != {name: tensor.shape for name, tensor in own.items()}:
        raise LoadError(f"adapter.adapters: an adapter does not fit {type(model).__name__}: it has no network for {place}")
    if not network.up.weight.is_meta:
        network.to(state["up.weight"].dtype).load_state_dict(state)
    return network


def penalty(adapted: Any) -> torch.Tensor | float:
    """regularization * sum over layers of ||V - I||^2, as the authors' `adapters` library has it."""
    weight: float = adapted.adapter_settings["regularization"]
    values = [module.value.weight for module in adapted.modules() if isinstance(module, Fusion)] if weight else []
    return weight * sum(
        ((value - torch.eye(len(value), device=value.device)).pow(2).sum() for value in values), torch.zeros(())
    )


def save(adapted: Any, folder: Path) -> None:
    """Copy the adapters into the folder, which is then whole."""
    for number, source in enumerate(adapted.expert_paths):
        target = folder / _EXPERTS / str(number)
        target.mkdir(parents=True)
        for name in _FILES:
            shutil.copyfile(source / name, target / name)
