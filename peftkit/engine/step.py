"""What one micro-batch goes through: the model, and for tasks that learn tokens the loss without whole logits."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from peftkit.engine.adapter import base_of_adapted
from peftkit.engine.hardware import autocast
from peftkit.engine.token_loss import Head, chunked_loss
from peftkit.tasks.example import IGNORE_INDEX, Batch, Runtime
from peftkit.tasks.language_torch import split_labels


class Step(nn.Module):
    """The model as the loop and its wrappers (autocast, DDP) call it.

    Attributes:
        model: the model with its adapter.
        runtime: the task on tensors.
        head: the output layer, where the loss is taken from hidden states; None: from what the model returns.
        label_smoothing: of the loss.
        precision: autocast, in accelerate's words: FSDP2 and DeepSpeed leave it to the step.
        splits_rows: whether the batches that it learns from are parts of rows.
    """

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        head: Head | None = None,
        label_smoothing: float = 0.0,
        precision: str = "no",
    ) -> None:
        super().__init__()
        self.model = model
        self.runtime, self.head, self.label_smoothing, self.precision = runtime, head, label_smoothing, precision
        self.splits_rows = False
        self.kept_whole: list[nn.Parameter] = []  # what FSDP2 leaves alone, see `engine.sharding`
        # FSDP2 gathers these layers one after the other (accelerate 1.15 asks the module that it prepares).
        self._no_split_modules = list(getattr(base_of_adapted(model), "_no_split_modules", None) or [])

    def forward(self, batch: Batch, *, outputs_only: bool = False) -> torch.Tensor:
        """The task's loss summed over the batch's targets, shape (); or what its `loss_sum` and `score` take.

        With a head, outputs are hidden states (B, T, D).
        """
        if self.precision == "no":  # as whoever calls has set autocast
            return self._forward(batch, outputs_only)
        with autocast(batch["labels"].device.type, self.precision):
            return self._forward(batch, outputs_only)

    def _forward(self, batch: Batch, outputs_only: bool) -> torch.Tensor:
        if self.head is None:
            outputs = self.runtime.forward(self.model, batch)
        else:
            outputs = self.head.states(self.model, self.runtime.inputs(self.model, batch))
        if outputs_only:
            return outputs
        if self.splits_rows:
            outputs = functional.pad(outputs, (0, 0, 0, 1))  # a place less than labels, see `context_parallel.split_batch`
        if self.head is None:
            return self.runtime.loss_sum(outputs, batch["labels"], self.label_smoothing)
        states, labels = self.runtime.align(outputs, batch["labels"])
        targets, weights = split_labels(labels)
        targets = targets.flatten()
        places = _places_of(targets)
        chosen = states.flatten(0, 1).index_select(0, places)
        weights = None if weights is None else weights.flatten()[places]
        return chunked_loss(chosen, targets[places], weights, self.head, self.label_smoothing)


def _places_of(targets: torch.Tensor) -> torch.Tensor:
    """Where in (T,) the targets are; on the meta device, where values are not known, everywhere."""
    if targets.is_meta:
        return torch.arange(len(targets), device=targets.device)
    return torch.nonzero(targets != IGNORE_INDEX)[:, 0]
