"""X-LoRA on tensors: experts from their folders, the gate saved whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
from peft.tuners.xlora import model as xlora_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file

from peftkit.errors import LoadError

_GATE = "internal_xlora_classifier."
_EXPERTS = "experts"


def config_fields(section: Any, model: Any, context: Any) -> dict[str, Any]:
    """The width of the gate's input, and the experts' folders by number."""
    model.config.use_cache = False  # the gate reads the whole sequence at every step
    adapters = {str(number): str(context.find_adapter(name)) for number, name in enumerate(section.adapters)}
    return {"hidden_size": model.config.get_text_config().hidden_size, "adapters": adapters}


def attach(build: Any, model: Any, config: Any, context: Any) -> Any:
    """The adapted model; on the meta device the experts are shapes too."""
    adapted = _build(build, model, config)
    return adapted.to("meta") if context.shapes_only else adapted


def _build(build: Any, model: Any, config: Any) -> Any:
    with _own_loading():
        return build(model, config)


@contextmanager
def _own_loading() -> Iterator[None]:
    """PEFT 0.21 can map an expert's tensors only onto models of Llama's layout."""
    with patch.object(xlora_model, "_load_adapter_into_lora_model", _load_expert):
        yield


def _load_expert(lora_model: Any, adapter_name: str, model_id: str, **options: Any) -> None:
    config = peft.LoraConfig.from_pretrained(model_id)
    config.inference_mode, config.modules_to_save = False, None
    lora_model.peft_config[adapter_name] = config
    lora_model.inject_adapter(lora_model.model, adapter_name)
    tensors = {
        name.removeprefix("base_model."): tensor
        for name, tensor in load_file(Path(model_id) / "adapter_model.safetensors").items()
    }
    tensors = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    if next(lora_model.parameters()).is_meta:
        return
    result = set_peft_model_state_dict(lora_model, tensors, adapter_name=adapter_name)
    if result.unexpected_keys:
        raise LoadError(f"the expert {model_id} does not fit: no place for {', '.join(result.unexpected_keys[:3])}")


def adapter_state(adapted: Any) -> dict[str, torch.Tensor]:
    """The gate, and the experts where they are trained on; PEFT 0.21 leaves the gate's first layer out."""
    names = [
        name
        for name, parameter in adapted.base_model.named_parameters()
        if _GATE in name or (".lora_" in name and parameter.requires_grad)
    ]
    return {name: adapted.base_model.get_parameter(name).detach().cpu().clone().contiguous() for name in names}


def save(adapted: Any, folder: Path) -> None:
    """Copy the experts into the folder, which is then whole."""
    for number, source in adapted.active_peft_config.adapters.items():
        target = folder / _EXPERTS / number
        target.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(Path(source) / name, target / name)


def load(build: Any, base: Any, config: Any, folder: Path) -> Any:
    """The adapted model of a saved folder."""
    base.config.use_cache = False
    config.adapters = {number: str(folder / _EXPERTS / number) for number in config.adapters}
    adapted = _build(build, base, config)
    own = dict(adapted.base_model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(folder / "adapter_model.safetensors").items():
            own[name].copy_(tensor)
    return adapted
