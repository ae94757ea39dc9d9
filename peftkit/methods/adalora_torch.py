"""AdaLoRA on tensors: the schedule of its budget, its term of the loss, and the state that a checkpoint needs."""

from __future__ import annotations

from typing import Any

import torch

from peftkit.errors import Problem, RecipeError


def config_fields(section: Any, model: Any, context: Any) -> dict[str, Any]:
    """`total_step` from the plan.

    Raises:
        RecipeError: `tinit` and `tfinal` leave no step to shrink the budget in.
    """
    total = context.total_steps
    if total is None:
        return {"total_step": section.tinit + section.tfinal + 1}
    if max(section.tinit + section.tfinal, section.tfinal + 1) >= total:  # PEFT 0.21 needs two steps before the last phase
        what = (
            f"`tinit` + `tfinal` is {section.tinit + section.tfinal}, the run has {total} steps: none is left to prune ranks in"
        )
        raise RecipeError([Problem("", "adapter.tinit", what)])
    return {"total_step": total}


def after_attach(adapted: Any, section: Any, context: Any) -> None:
    """Rank counters are no weights; on the meta device PEFT 0.21 marks them as trained."""
    for name, parameter in adapted.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad = False


def penalty(adapted: Any) -> torch.Tensor:
    """Distance of the singular vectors from orthogonality, times `orth_reg_weight` (Zhang et al. 2023, eq. 4)."""
    terms = []
    for name, matrix in adapted.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            gram = matrix @ matrix.T if ".lora_A." in name else matrix.T @ matrix
            terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
    weight: float = adapted.active_peft_config.orth_reg_weight
    return weight * torch.stack(terms).mean()


def after_step(adapted: Any, step: int) -> None:
    """Move the budget and mask the least important ranks; `step` counts from 0."""
    adapted.base_model.update_and_allocate(step + 1)


_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def before_save(adapted: Any) -> None:
    """Keep the ranks that are not zero: between two prunings some that were pruned have grown again."""
    layers = {name: tensor for name, tensor in adapted.base_model.model.named_parameters() if ".lora_E." in name}
    adapted.active_peft_config.rank_pattern = {name: (tensor != 0).flatten().tolist() for name, tensor in layers.items()}


def extra_state(adapted: Any) -> dict[str, Any]:
    """Importance of every rank so far, and the ranks that are left."""
    allocator = adapted.base_model.rankallocator
    pattern = adapted.active_peft_config.rank_pattern
    return {name: dict(getattr(allocator, name)) for name in _AVERAGES} | {"rank_pattern": pattern}


def load_extra_state(adapted: Any, state: dict[str, Any]) -> None:
    """Put `extra_state` back."""
    for name in _AVERAGES:
        setattr(adapted.base_model.rankallocator, name, state[name])
    adapted.active_peft_config.rank_pattern = state["rank_pattern"]


def report(adapted: Any) -> dict[str, Any]:
    """The rank that each module ended with."""
    pattern = adapted.active_peft_config.rank_pattern or {}
    return {"ranks": {name.partition(".lora_E")[0]: sum(kept) for name, kept in pattern.items()}}
