"""Quantised linear layers: how to load them, the trap of bitsandbytes on CPUs, and what their weights are in full."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftkit.engine.hardware import quantizing_device
from peftkit.engine.in_files import Keep, cast, in_memory
from peftkit.errors import LoadError
from peftkit.recipe.quantization import Quantization


def loading_options(
    quantization: Quantization | None, config: PretrainedConfig, device: torch.device | None = None
) -> dict[str, Any]:
    """What `from_pretrained` needs for a quantised model; settings of stored weights go into their config.

    Args:
        quantization: how; None: not at all, or as the checkpoint says.
        config: the model's config.
        device: where the weights shall lie; None: on this process's GPU, where it has one.

    Raises:
        LoadError: the weights should be stored quantised, and are not.
    """
    if quantization is None:
        return {}
    options: dict[str, Any] = {"device_map": {"": device or quantizing_device()}}
    if quantization.is_stored:
        if "quantization_config" not in vars(config):
            stored = f"a checkpoint that stores them quantised ({quantization})"
            what = f"`{config.name_or_path}` has plain weights, and the adapter was trained on {stored}"
            raise LoadError(f"{what}: name that one")
        if quantization.method == "bitsandbytes":
            stored = config.quantization_config
            stored |= {"llm_int8_skip_modules": [*(stored.get("llm_int8_skip_modules") or []), *quantization.skip_modules]}
            if quantization.computes_in:
                stored["bnb_4bit_compute_dtype"] = quantization.computes_in
        return options
    if quantization.method != "bitsandbytes":
        return {}  # quantised after loading
    return options | {"quantization_config": _bitsandbytes_config(quantization)}


def _bitsandbytes_config(quantization: Quantization) -> BitsAndBytesConfig:
    skipped = list(quantization.skip_modules)
    if quantization.bits == 8:
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=quantization.llm_int8_threshold, llm_int8_skip_modules=skipped
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype),
        bnb_4bit_quant_storage=getattr(torch, quantization.quant_storage),
        llm_int8_skip_modules=skipped,
    )


def make_safe(model: PreTrainedModel, quantization: Quantization | None, device: torch.device | None = None) -> PreTrainedModel:
    """The model that was just loaded, quantised where loading does not, and such that no forward pass changes its weights.

    On CPUs with AVX512-BF16 the first pass without gradients re-packs every `Linear4bit` in place: what reads its weight later
    (a merge, a gradient, DoRA's norms) is then wrong in silence (bitsandbytes 0.50.2).
    """
    if quantization is not None and not quantization.is_stored and quantization.method != "bitsandbytes":
        return _quantize(model, quantization, device or quantizing_device())
    for layer in bitsandbytes_layers(model):
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a cast at every product
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = False
    return model


def bitsandbytes_layers(model: nn.Module) -> Iterator[Any]:
    """Every quantised layer of bitsandbytes in a model; PEFT's layers around them have the same names and are none."""
    if "bitsandbytes" in sys.modules:
        from bitsandbytes.nn import Linear4bit, Linear8bitLt

        yield from (module for module in model.modules() if isinstance(module, Linear4bit | Linear8bitLt))


def _quantize(model: PreTrainedModel, quantization: Quantization, device: torch.device) -> PreTrainedModel:
    """The linear layers of a loaded model quantised by torchao or HQQ, in place."""
    names = [name for name in linear_names(model) if not is_skipped(name, quantization)]
    if quantization.method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in names, device=device)
        return model
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name in names:
        layer = model.get_submodule(name)
        settings = BaseQuantizeConfig(nbits=quantization.bits, group_size=quantization.group_size, axis=1)
        try:
            # Always by the same machine: on a GPU hqq looks for scales in float16, elsewhere in float32 (0.2.8).
            on = quantizing_device()
            new = HQQLinear(layer, settings, compute_dtype=getattr(torch, quantization.compute_dtype), device=str(on))
        except (AssertionError, RuntimeError) as error:
            raise LoadError(
                f"model.quantization: hqq cannot quantise `{name}` of {tuple(layer.weight.shape)}: {error}"
            ) from error
        if on != device:
            new.cuda(device)  # to any device: its `to` and `cpu` do nothing
        new.was_conv1d = getattr(layer, "was_conv1d", False)
        model.set_submodule(name, new)
    return model


def linear_names(model: nn.Module) -> list[str]:
    """Names of the layers that can be quantised."""
    return [name for name, module in model.named_modules() if is_linear(module)]


def is_linear(module: nn.Module) -> bool:
    """Whether a layer can be quantised."""
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def is_skipped(name: str, quantization: Quantization) -> bool:
    """Whether a module stays as it is: it, or what it is part of, is among `skip_modules`."""
    return any(f"{name}.".startswith(f"{skipped}.") for skipped in quantization.skip_modules)


def dequantized(model: PreTrainedModel, keep: Keep = in_memory) -> PreTrainedModel:
    """The model with plain linear layers of the weights that its quantised ones stand for, these in float32, in place.

    It knows nothing of having been quantised: saved, it is a model like any other.

    Args:
        model: the model.
        keep: where the weights go.

    Raises:
        LoadError: there are quantised layers whose weights cannot be read.
    """
    for name, module in list(model.named_modules()):
        weight = full_weight(module)
        if weight is None:
            continue
        outputs, inputs = weight.shape
        plain = nn.Linear(inputs, outputs, bias=False, device="meta")
        plain.weight = nn.Parameter(keep(weight.float()), requires_grad=False)
        if module.bias is not None:  # HQQ's is no parameter
            plain.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
        if getattr(module, "source_cls", None) is Conv1D or getattr(module, "was_conv1d", False):
            plain.was_conv1d = True  # type: ignore[assignment]
        model.set_submodule(name, plain)
    _forget_quantization(model)
    return model


def _forget_quantization(model: PreTrainedModel) -> None:
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:  # saving goes back through them, and quantised weights have no way back
        model._weight_conversions = [
            item
            for item in conversions
            if not any(getattr(step, "hf_quantizer", None) for step in getattr(item, "operations", ()))
        ]
    for mark in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(mark, None)
    for config in (model.config, model.config.get_text_config()):
        config.__dict__.pop("quantization_config", None)
        config.__dict__.pop("_is_quantized", None)
    for part in model.modules():
        part.__dict__.pop("is_quantized", None)


def full_weight(module: Any) -> torch.Tensor | None:
    """The weight (outputs, inputs) that a quantised layer stands for; None for all other modules.

    Raises:
        LoadError: the layer is of a kind whose weight cannot be read.
    """
    kind = type(module).__name__
    if kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        state = copy.copy(module.weight.quant_state)
        assert not getattr(state, "packing_format_for_cpu", False), "make_safe keeps layers from being re-packed"
        state.dtype = torch.float32  # it would round to the dtype of the checkpoint, which the products do not
        return dequantize_4bit(module.weight.data, state).detach()
    if kind == "Linear8bitLt":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scale = module.weight.SCB if module.state.SCB is None else module.state.SCB
        return int8_vectorwise_dequant(module.weight.data, scale).detach()
    if kind == "HQQLinear":
        return _hqq_in_float32(module).dequantize().detach()
    if isinstance(module, nn.Linear) and type(module.weight.data).__module__.startswith("torchao."):
        weight: Any = module.weight
        return weight.dequantize(output_dtype=torch.float32).detach()
    if kind.endswith("QuantLinear") or kind.startswith("WQLinear"):
        raise LoadError(f"layers of type {kind} cannot be turned into plain ones here; use the library that made them")
    return None


def _hqq_in_float32(layer: Any) -> Any:
    for name, value in layer.meta.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            layer.meta[name] = value.float()
    layer.compute_dtype = layer.meta["compute_dtype"] = torch.float32
    if layer.bias is not None:
        layer.bias = layer.bias.float()
    return layer


def compute_in_float32(model: nn.Module, keep: Keep = in_memory) -> nn.Module:
    """The model with every product in float32, and no rounding of inputs where that can be had: what a merge is measured by."""
    packed = set()
    for layer in bitsandbytes_layers(model):
        packed.add(id(layer.weight))
        if type(layer).__name__ == "Linear4bit":
            layer.compute_dtype = layer.weight.quant_state.dtype = torch.float32
        else:  # on the CPU, 8-bit layers round their inputs to 8 bits in evaluation and not in training
            layer.register_forward_pre_hook(lambda module, args: module.train() and None)
    for module in model.modules():
        if type(module).__name__ == "HQQLinear":
            _hqq_in_float32(module)
    return cast(model, torch.float32, keep, packed)  # weights packed in a floating type are bits, not numbers
