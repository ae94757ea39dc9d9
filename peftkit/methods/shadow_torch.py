"""Shadow on tensors: the loss of its own small network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.shadow.model import _pool_last_token

LossSum = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def batch_penalty(adapted: Any, batch: dict[str, torch.Tensor], loss_sum: LossSum) -> torch.Tensor | float:
    """The task's loss of the shadow network alone, times `auxiliary_loss_weight` (ShadowPEFT, eq. 8-9); a sum over targets."""
    tuner, config = adapted.base_model, adapted.active_peft_config
    state, head = tuner._seed_shadow_state, tuner._resolve_shadow_head(adapted.active_adapter)
    if not config.auxiliary_loss_weight or state is None or head is None:
        return 0.0
    if not tuner._shadow_head_is_lm.get(adapted.active_adapter, False):
        state = _pool_last_token(state, batch["attention_mask"])
    return config.auxiliary_loss_weight * loss_sum(head(state), batch["labels"])
