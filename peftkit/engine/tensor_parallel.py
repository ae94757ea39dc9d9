"""Layers that processes divide among them (tensor parallelism): all of them compute each row together.

transformers divides the base model's linear layers as it loads them, by the plan of the model's class (Megatron-LM, Shoeybi et
al. 2019, arXiv:1909.08053, section 3), and PEFT divides a LoRA's matrices like the layer that they are around. Everything else,
and every row, is in all processes; so are gradients of what is not divided.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

DIVISIBLE = ("colwise", "rowwise")  # what PEFT (0.21) can divide a LoRA by


def loading_options(processes: int) -> dict[str, Any]:
    """How transformers is asked to divide a model among processes; nothing where there is but one."""
    return {"distributed_config": DistributedConfig(tp_size=processes)} if processes > 1 else {}


def divides_layers(model: nn.Module) -> bool:
    """Whether processes divide the layers of a model, adapted or not: transformers writes that into its config."""
    return getattr(getattr(getattr(model, "config", None), "distributed_config", None), "tp_size", None) not in (None, 1)


def indivisible(model: PreTrainedModel, processes: int, targets: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What of a model cannot be divided among so many processes.

    Args:
        model: the base model, on the meta device.
        processes: how many divide each layer.
        targets: names of the modules that get an adapter.
    """
    kind, plan = model.config.model_type, getattr(model, "tp_plan", None)
    if not plan:
        yield "model.name_or_path", f"transformers has no plan to divide a `{kind}` by; use FSDP2 (configs/fsdp2.yaml)"
        return
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(model.config.get_text_config(), key, None)
        if isinstance(heads, int) and heads % processes:
            yield "model.name_or_path", f"its {heads} {key.removeprefix('num_')} cannot be divided among {processes} processes"
    for name in targets:
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is not None and style not in DIVISIBLE:
            yield "adapter.target_modules", f"`{name}` is divided as `{style}`, which PEFT cannot divide an adapter by"
            return


@contextlib.contextmanager
def weights_look_whole(model: nn.Module) -> Iterator[None]:
    """Layers that are divided show PEFT weights of their whole shape, without memory.

    It draws an adapter for the whole layer then, the same as one process does, and divides it after; by the weights' own parts
    (0.21) it would draw rows that are the same in all processes, and leave layers that say a wrong size.
    """
    linear = [module for module in model.modules() if type(module) is nn.Linear]
    parts = [(module, module.weight) for module in linear if isinstance(module.weight, DTensor)]
    for module, weight in parts:
        stand_in = torch.empty(1, dtype=weight.dtype, device=weight.device).expand(weight.shape)
        module._parameters["weight"] = nn.Parameter(stand_in, requires_grad=False)
    try:
        yield
    finally:
        for module, weight in parts:
            weight.requires_grad = False  # PEFT has frozen the stand-in
            module._parameters["weight"] = weight  # type: ignore[assignment]


def clipped_norm(trained: Sequence[nn.Parameter], limit: float | None) -> float:
    """The norm of all gradients, divided ones counted whole, before they are clipped to a limit."""
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    norm = get_total_norm([part.full_tensor() if isinstance(part, DTensor) else part for part in gradients])
    if limit is not None:
        clip_grads_with_norm_(trained, limit, norm, foreach=False)
    return float(norm)
