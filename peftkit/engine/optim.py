"""Optimizers and schedules, from torch, transformers, bitsandbytes and peft."""

from __future__ import annotations

from typing import Any

import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn
from transformers import Adafactor, get_scheduler

from peftkit.engine.tensor_parallel import divides_layers
from peftkit.plan import Plan, warmup_steps


def build_optimizer(model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """The optimizer over the trained parameters; weight decay on matrices only, not on biases and norms."""
    training = plan.recipe.training
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return torch.optim.SGD([torch.zeros(1)])  # a run of no steps
    if training.optim == "lorafa":
        section: Any = plan.recipe.adapter
        return create_lorafa_optimizer(
            model, section.r, section.lora_alpha, plan.learning_rate, weight_decay=training.weight_decay
        )
    optimizer_class, arguments = _class_and_arguments(plan)
    if divides_layers(model):  # tensors that are divided and others cannot be stepped together; the numbers are the same
        arguments |= {"foreach": False} | ({"fused": False} if "fused" in arguments else {})
    if training.loraplus_lr_ratio is not None:
        if training.loraplus_lr_embedding is not None:
            arguments["loraplus_lr_embedding"] = training.loraplus_lr_embedding
        arguments["loraplus_weight_decay"] = training.weight_decay
        return create_loraplus_optimizer(
            model, optimizer_class, lr=plan.learning_rate, loraplus_lr_ratio=training.loraplus_lr_ratio, **arguments
        )
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = {
        name: parameter
        for name, parameter in trained.items()
        if parameter.ndim >= 2 and not any(part in name for part in plan.method.no_decay)
    }
    groups = [
        {"params": list(matrices.values()), "weight_decay": training.weight_decay},
        {"params": [parameter for name, parameter in trained.items() if name not in matrices], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return optimizer_class(groups, lr=plan.learning_rate, **arguments)


def _class_and_arguments(plan: Plan) -> tuple[Any, dict[str, Any]]:
    training = plan.recipe.training
    adam = {"betas": (training.adam_beta1, training.adam_beta2), "eps": training.adam_epsilon}
    if training.optim in ("adamw_torch", "adamw_torch_fused"):
        return torch.optim.AdamW, adam | {"fused": training.optim == "adamw_torch_fused"}
    if training.optim == "sgd":
        return torch.optim.SGD, {}
    if training.optim == "adafactor":
        # A fixed learning rate with a schedule of ours, as transformers' Trainer uses it.
        return Adafactor, {"scale_parameter": False, "relative_step": False}
    import bitsandbytes as bnb

    name = {"adamw_bnb_8bit": "AdamW8bit", "paged_adamw_32bit": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}
    return getattr(bnb.optim, name[training.optim]), adam


def build_scheduler(optimizer: torch.optim.Optimizer, plan: Plan, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of the learning rate over `total_steps` optimizer steps."""
    training = plan.recipe.training
    return get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_steps(plan, total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=dict(training.lr_scheduler_kwargs) or None,
    )
