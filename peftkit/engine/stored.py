"""What a run stores whatever its batches: weights as they lie, quantised or not, gradients, the optimizer's state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftkit.engine.adapter import base_of_adapted
from peftkit.engine.model import Base
from peftkit.engine.quantized import is_linear, is_skipped
from peftkit.launch_file import Sharding
from peftkit.plan import Plan
from peftkit.recipe.quantization import Quantization

_PAGED_FROM = 100_000  # smaller states are not paged (bitsandbytes 0.50, optim/optimizer.py)
_IN_8_BITS_FROM = 4096  # smaller parameters have states in float32 (same file)


@dataclass(frozen=True)
class Stored:
    """Bytes of one process.

    Attributes:
        weights: of what is frozen.
        adapter: of what is trained.
        gradients: of all that is trained.
        optimizer: the optimizer's state.
        step_scratch: what the optimizer needs while it steps.
        targets: weights of the layers that an adapter goes into.
        largest_block: the largest part that is gathered at once where weights are shared.
        quantised: ids of the weights that lie quantised.
        unquantised: bytes of those weights before they were.
        buckets: copies of gradients on their way to other processes.
        share: part of the gradients that this process keeps.
        certified: what the certificate loads while this process still has its part of the model: a whole one.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    step_scratch: int
    targets: int
    largest_block: int
    quantised: tuple[int, ...] = ()
    unquantised: int = 0
    buckets: int = 0
    share: float = 1.0
    certified: int = 0

    def gradient_share(self, gradients: int) -> int:
        """Bytes of gradients that are left of so many."""
        return round(gradients * self.share)

    def shared(self, sharding: Sharding) -> Stored:
        """The same for one of several processes."""
        count, kind = sharding.num_processes, sharding.kind
        if kind == "ddp":
            return self if count == 1 else dataclasses.replace(self, buckets=self.gradients)

        def part(size: int, shares: bool) -> int:
            return math.ceil(size / count) if shares else size

        everything = kind in ("fsdp", "zero3", "tp")
        gathered = 2 * self.largest_block if everything and count > 1 and kind != "tp" else 0  # one in use, one on its way
        weights = part(self.weights, everything) + gathered
        return dataclasses.replace(
            self,
            weights=2 * self.largest_block if sharding.offloads_weights else weights,
            adapter=part(self.adapter, everything),
            gradients=part(self.gradients, kind != "zero1"),
            optimizer=0 if sharding.offloads_optimizer else part(self.optimizer, True),
            step_scratch=0 if sharding.offloads_optimizer else part(self.step_scratch, True),
            share=1.0 if kind == "zero1" else 1 / count,
            certified=self.weights + self.adapter,
        )


def stored(plan: Plan, model: nn.Module) -> Stored:
    """What one process that trains alone stores.

    Args:
        plan: the plan.
        model: the model with its adapter, on the meta device.
    """
    quantization = plan.quantization
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    quantised = quantised_weights(model, quantization) if quantization is not None else {}

    def size(parameter: torch.Tensor) -> int:
        if quantization is not None and id(parameter) in quantised:
            return quantised_bytes(quantised[id(parameter)].shape, quantization)
        return parameter.numel() * parameter.element_size()

    adapter = sum(map(size, trained))
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    blocks = [sum(map(size, block.parameters())) for block in _blocks(model)]
    optim, device = plan.recipe.training.optim, plan.hardware.device
    return Stored(
        weights=sum(size(parameter) for parameter in parameters if not parameter.requires_grad) + buffers,
        adapter=adapter,
        gradients=adapter,
        optimizer=sum(state_bytes(optim, parameter.shape, parameter.element_size(), device) for parameter in trained),
        step_scratch=_step_scratch(optim, trained, device),
        targets=sum(size(weight) for weight in _targets(model)),
        largest_block=max(blocks, default=0),
        quantised=tuple(quantised),
        unquantised=sum(weight.numel() * weight.element_size() for weight in quantised.values()),
    )


def quantised_bytes(shape: Sequence[int], quantization: Quantization) -> int:
    """Bytes of a matrix (outputs, inputs) as bitsandbytes (0.50), torchao (0.18) or HQQ (0.2.8) stores it.

    bitsandbytes, 4 bits: half a byte a number and a scale for each 64 of them, in float32 or, quantised once more, in a byte
    and a float32 for each 256 scales and one for their mean; the table of 16 values. 8 bits: a byte a number and a float32 a
    row; torchao: a zero more. HQQ: groups with a scale and a zero in the type that it computes in; ten numbers of 3 bits in 4
    bytes. GPTQ and AWQ are counted as bitsandbytes is.
    """
    count = math.prod(shape)
    if quantization.method == "hqq":
        groups = count // quantization.group_size
        packed = (
            math.ceil(groups / 10) * 4 * quantization.group_size if quantization.bits == 3 else count * quantization.bits // 8
        )
        return packed + 2 * groups * getattr(torch, quantization.compute_dtype).itemsize
    if quantization.bits == 8:
        return count + (5 if quantization.method == "torchao" else 4) * shape[0]
    scales = math.ceil(count / 64)
    packed = math.ceil(count * quantization.bits / 8)
    if not quantization.double_quant:
        return packed + 4 * scales + 4 * 16
    return packed + scales + 4 * math.ceil(scales / 256) + 4 + 4 * (16 + 256)


def state_bytes(optim: str, shape: Sequence[int], element_bytes: int, device: str) -> int:
    """Bytes that an optimizer keeps on the device for a parameter."""
    count = math.prod(shape)
    if optim == "sgd":
        return 0
    if optim == "adafactor":  # sums over rows and columns (Shazeer and Stern 2018, arXiv:1804.04235)
        return 4 * (math.prod(shape[:-1]) + math.prod([*shape[:-2], shape[-1]])) if len(shape) >= 2 else 4 * count
    if optim.startswith("paged_") and count >= _PAGED_FROM and device == "cuda":
        return 0  # in memory that the GPU borrows from the CPU
    if "8bit" in optim:
        scales = 4 * math.ceil(count / 256)
        return 2 * (count + scales) + 2 * 4 * 256 if count >= _IN_8_BITS_FROM else 8 * count
    return 8 * count if "32bit" in optim else 2 * element_bytes * count


def _step_scratch(optim: str, trained: Sequence[nn.Parameter], device: str) -> int:
    sizes = [parameter.numel() * max(4, parameter.element_size()) for parameter in trained]
    if not sizes or optim == "adamw_torch_fused" or "8bit" in optim or optim.startswith("paged_"):
        return 0
    if optim == "adafactor":
        return 4 * max(sizes)  # the update, its square, and two factors of it
    return sum(sizes) if optim == "adamw_torch" and device == "cuda" else 2 * max(sizes)


def quantised_weights(model: nn.Module, quantization: Quantization) -> dict[int, torch.Tensor]:
    """The weights (outputs, inputs) that will lie quantised, by their ids in a model that has its adapter already."""
    result = {}
    for name, module in _modules_of_base(base_of_adapted(model)):
        if is_linear(module) and not is_skipped(name, quantization) and not module.weight.requires_grad:
            result[id(module.weight)] = module.weight.T if isinstance(module, Conv1D) else module.weight
    return result


def _modules_of_base(module: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The base's own modules by the names that they had before PEFT put layers of its own around them."""
    if "base_layer" in module._modules:
        yield from _modules_of_base(module.base_layer, name)
        return
    yield name, module
    for child, inside in module.named_children():
        yield from _modules_of_base(inside, f"{name}.{child}" if name else child)


def _targets(model: nn.Module) -> Iterator[torch.Tensor]:
    """The frozen weights of layers that hold something trained."""
    for module in model.modules():
        layer = getattr(module, "base_layer", module)
        own = {id(parameter) for parameter in layer.parameters(recurse=False)}
        trains = any(parameter.requires_grad for parameter in module.parameters() if id(parameter) not in own)
        if isinstance(layer, nn.Linear | Conv1D) and trains and not layer.weight.requires_grad:
            yield layer.weight


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of every stack, and the embeddings."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            yield from module
        elif isinstance(module, nn.Embedding):
            yield module


def _local_folder(base: Base) -> Path:
    """The folder of a checkpoint, or for a name on the hub that of its files that are here already."""
    if Path(base.path).is_dir():
        return Path(base.path)
    found = try_to_load_from_cache(base.path, "config.json", revision=base.revision)
    return Path(found).parent if isinstance(found, str) else Path(base.path)


def checkpoint_bytes(base: Base, dtype: str) -> int:
    """Bytes of a local checkpoint that loading reads beside the weights it makes of them.

    Weights of the same dtype are the file itself, mapped into memory; of others the file's are there as well.
    """
    files = sorted(_local_folder(base).glob("*.safetensors")) if base.init == "pretrained" else []
    if not files:
        return 0
    try:
        with safe_open(files[0], "pt") as handle:
            name = next(iter(handle.keys()), None)
            stored = handle.get_slice(name).get_dtype() if name is not None else ""
    except SafetensorError:  # loading will say so
        return 0
    same = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}.get(dtype) == stored
    return 0 if same else sum(file.stat().st_size for file in files)
