"""AdaMSS on tensors: adaptive allocation of subspaces, where the recipe asks for it."""

from __future__ import annotations

from typing import Any

from peft.tuners.adamss.layer import AdamssLayer

from peftkit.errors import Problem, RecipeError

_AVERAGES = ("exp_avg_ipt_A", "exp_avg_ipt_B", "exp_avg_unc_A", "exp_avg_unc_B")


def config_fields(section: Any, model: Any, context: Any) -> dict[str, Any]:
    """No further fields.

    Raises:
        RecipeError: the run is over before the allocation begins.
    """
    if section.use_asa and context.total_steps is not None and context.total_steps <= section.init_warmup:
        what = f"is {section.init_warmup}, the run has {context.total_steps} steps: no subspace would ever be masked"
        raise RecipeError([Problem("", "adapter.init_warmup", what)])
    return {}


def after_step(adapted: Any, step: int) -> None:
    """Score the subspaces and mask the least important ones (`use_asa`); `step` counts from 0."""
    if adapted.active_peft_config.use_asa:
        adapted.base_model.update_and_allocate(step + 1)


def _layers(adapted: Any) -> dict[str, AdamssLayer]:
    return {name: module for name, module in adapted.named_modules() if isinstance(module, AdamssLayer)}


def extra_state(adapted: Any) -> dict[str, Any]:
    """Which parameters are masked, and the importance of each subspace so far."""
    averages = {name: {key: getattr(layer, key) for key in _AVERAGES} for name, layer in _layers(adapted).items()}
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    return {"averages": averages, "trained": trained}


def load_extra_state(adapted: Any, state: dict[str, Any]) -> None:
    """Put `extra_state` back."""
    trained = set(state["trained"])
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad = name in trained
    for name, layer in _layers(adapted).items():
        for key in _AVERAGES:
            setattr(layer, key, state["averages"][name][key])
