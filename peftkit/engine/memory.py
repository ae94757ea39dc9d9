"""A first estimate of the memory of a run, by part, from shapes alone."""

from __future__ import annotations

from typing import Any

from peftkit.engine.blueprint import Blueprint
from peftkit.plan import Plan

_STATE_BYTES = {  # optimizer bytes per trained parameter
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "paged_adamw_32bit": 8.0,
    "adamw_bnb_8bit": 2.0,
    "paged_adamw_8bit": 2.0,
    "sgd": 0.0,
    "adafactor": 0.1,  # row and column sums only (Shazeer and Stern 2018, arXiv:1804.04235)
}


def estimate_memory(plan: Plan, blueprint: Blueprint, num_tokens: int) -> dict[str, int]:
    """Bytes by part of one process at the peak of a step.

    Activations follow Korthikanti et al. 2022 (arXiv:2205.05198), section 4: 34 bytes per token, hidden unit and layer at 16
    bits, plus the logits and their gradient in float32 for language tasks.

    Args:
        plan: the plan.
        blueprint: the model on the meta device.
        num_tokens: tokens of the longest micro-batch, padding included.
    """
    frozen = adapter = gradients = 0
    for parameter in blueprint.model.parameters():
        size = parameter.numel() * parameter.element_size()
        adapter += size if parameter.requires_grad else 0
        gradients += size if parameter.requires_grad else 0
        frozen += 0 if parameter.requires_grad else size
    optimizer = round(blueprint.trainable_params * _STATE_BYTES[plan.recipe.training.optim])
    parts = {"weights": frozen, "adapter": adapter, "gradients": gradients, "optimizer": optimizer}
    parts["activations"] = _activations(plan, blueprint, num_tokens)
    return parts | {"total": sum(parts.values())}


def _activations(plan: Plan, blueprint: Blueprint, num_tokens: int) -> int:
    config: Any = blueprint.config.get_text_config()
    hidden = getattr(config, "hidden_size", getattr(config, "d_model", 0))
    layers = getattr(config, "num_hidden_layers", getattr(config, "num_layers", 0))
    factor = 1 if plan.mixed_precision != "no" or plan.dtype != "float32" else 2
    per_layer = 34 * factor * hidden * num_tokens
    kept = per_layer * layers
    if plan.recipe.training.gradient_checkpointing:
        kept = 2 * factor * hidden * num_tokens * layers + per_layer
    vocabulary = getattr(config, "vocab_size", 0) if plan.task.generates else 0
    return round(kept + 3 * 4 * num_tokens * vocabulary)
