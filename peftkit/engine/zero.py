"""DeepSpeed ZeRO: its engine takes the optimizer's steps, and keeps a float32 copy of what it trains in parts of its own.

Read from DeepSpeed 0.19: `utils/tensor_fragment.py` gives and takes whole tensors of a parameter, `runtime/zero` divides them.
Only runs that a launch file starts with DeepSpeed import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from peftkit.plan import Plan


def settle(accelerator: Accelerator, plan: Plan, step: nn.Module) -> None:
    """Tell DeepSpeed what the recipe says, and divide the weights (stage 3) before one device has to hold all of them."""
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = plan.micro_batch_size
    config["gradient_accumulation_steps"] = 1  # passes are counted by the loop
    config["gradient_clipping"] = plan.recipe.training.max_grad_norm or 0.0
    if config["zero_optimization"].get("stage") == 3:
        import deepspeed

        plugin.deepspeed_config_process(
            must_match=False,
            train_micro_batch_size_per_gpu=plan.micro_batch_size,
            train_batch_size=plan.micro_batch_size * accelerator.num_processes,
        )
        deepspeed.zero.Init(module=step, config_dict_or_path=config, dtype=torch.float32)


def is_divided(parameter: torch.Tensor) -> bool:
    """Whether ZeRO 3 has divided a parameter."""
    return getattr(parameter, "ds_id", None) is not None


def gathered(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter that ZeRO 3 has divided, whole in every process."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
        return parameter.detach().clone()


def assign(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """Give a trained parameter other values, and the float32 copy that the optimizer steps on."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    tensor = tensor.to(parameter.device)
    if not is_divided(parameter):
        parameter.data.copy_(tensor)
        safe_set_full_fp32_param(parameter, tensor)
        return
    part = _own_part(parameter, tensor)
    parameter.ds_tensor.data.copy_(part)  # type: ignore[attr-defined]
    safe_set_local_fp32_param(parameter, part)


def _own_part(parameter: Any, tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter's values: equal parts in the order of ranks, the last one filled up with zeros."""
    size, rank = parameter.ds_tensor.ds_numel, torch.distributed.get_rank()
    flat = nn.functional.pad(tensor.flatten(), (0, size * torch.distributed.get_world_size() - tensor.numel()))
    return flat.narrow(0, size * rank, size)


@dataclass(frozen=True)
class ZeroState:
    """The state of an optimizer that ZeRO has divided, in the form that a lone process has it in.

    Attributes:
        optimizer: DeepSpeed's.
        parameters: what is trained, in the order of the optimizer that DeepSpeed was given.
        groups: that optimizer's groups, with the places of their parameters.
    """

    optimizer: Any
    parameters: list[nn.Parameter]
    groups: list[dict[str, Any]]

    def state_dict(self) -> dict[str, Any]:
        """State by the place of each parameter, every tensor whole and on the CPU."""
        from deepspeed.utils import safe_get_full_optimizer_state

        own: dict[str, Any] = next(iter(self._base.state.values()), {})
        names = [name for name, value in own.items() if torch.is_tensor(value) and value.dim() > 0]
        numbers = {name: value for name, value in own.items() if name not in names}
        state = {}
        for place, parameter in enumerate(self.parameters if own else []):
            tensors = {name: safe_get_full_optimizer_state(parameter, name).cpu() for name in names}
            state[place] = numbers | tensors
        now = [{name: value for name, value in group.items() if name != "params"} for group in self._base.param_groups]
        return {"state": state, "param_groups": [old | new for old, new in zip(self.groups, now, strict=True)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put `state_dict` back."""
        for group, stored in zip(self._base.param_groups, state["param_groups"], strict=True):
            group |= {name: value for name, value in stored.items() if name != "params"}
        if not state["state"]:
            return
        first = state["state"][0]
        for flat in (part for group in self._base.param_groups for part in group["params"]):
            for name, value in first.items():
                is_tensor = torch.is_tensor(value) and value.dim() > 0
                self._base.state[flat][name] = torch.zeros_like(flat) if is_tensor else value
        for place, parameter in enumerate(self.parameters):
            for name, value in state["state"][place].items():
                if torch.is_tensor(value) and value.dim() > 0:
                    self._set(parameter, name, value)

    def _set(self, parameter: nn.Parameter, name: str, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        value = value.to(parameter.device)
        if is_divided(parameter):
            safe_set_local_optimizer_state(parameter, _own_part(parameter, value), name)
            return
        self.optimizer._lazy_init_hp_params_optimizer_state()
        safe_set_full_optimizer_state(parameter, value, name)

    @property
    def _base(self) -> Any:
        """The optimizer that DeepSpeed's steps with, whose parameters are parts."""
        return self.optimizer.optimizer
