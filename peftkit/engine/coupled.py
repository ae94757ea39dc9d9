"""Losses that couple the rows of a step (in-batch negatives), equal for every split into processes and micro-batches.

GradCache (Gao et al. 2021, arXiv:2101.06983): embed everything without a graph, take the gradient of the whole step's loss by
the embeddings, then embed each micro-batch again and send its part of that gradient through the model.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from peftkit.engine.checkpoint import rng_state, set_rng_state
from peftkit.engine.sharding import backward

if TYPE_CHECKING:
    from peftkit.engine.trainer import Trainer

Batch = dict[str, torch.Tensor]


def coupled_backward(trainer: Trainer, batches: list[Batch], num_targets: float) -> torch.Tensor:
    """This process's share of the step's mean loss; gradients are left in the parameters.

    Args:
        trainer: the run.
        batches: this process's micro-batches, on its device.
        num_targets: targets of the whole step over all processes.
    """
    runtime, accelerator = trainer.runtime, trainer.accelerator
    states, vectors = [], []
    with torch.no_grad():
        for batch in batches:
            states.append(rng_state())
            vectors.append(trainer.wrapped(batch, outputs_only=True))
    labels = [batch["labels"] for batch in batches]
    sizes = [len(part) for part in vectors]
    loss, gradient = _loss_and_gradient(trainer, torch.cat(vectors), runtime.join_labels(labels), num_targets)
    after = rng_state()
    for number, (batch, state, part) in enumerate(zip(batches, states, gradient.split(sizes), strict=True)):
        set_rng_state(state)  # the same dropout as in the first pass
        last = number == len(batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(trainer.wrapped):
            again = trainer.wrapped(batch, outputs_only=True)
            backward(accelerator, trainer.wrapped, (again * part).sum() * trainer.share[0], last=last)
    set_rng_state(after)
    return loss / trainer.share[0]


def _loss_and_gradient(
    trainer: Trainer, vectors: torch.Tensor, labels: torch.Tensor, num_targets: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole step's mean loss, and its gradient by this process's vectors (N, D)."""
    runtime, (world, rank) = trainer.runtime, trainer.share
    if world == 1:
        own = vectors.detach().requires_grad_(True)
        everything, joined = own, labels
    else:
        parts: list[tuple[torch.Tensor, torch.Tensor]] = [None] * world  # type: ignore[list-item]
        torch.distributed.all_gather_object(parts, (vectors.cpu(), labels.cpu()))
        tensors = [part.to(vectors.device) for part, _ in parts]
        own = tensors[rank] = tensors[rank].requires_grad_(True)
        everything = torch.cat(tensors)
        joined = runtime.join_labels([part.to(vectors.device) for _, part in parts])
    with torch.enable_grad():
        loss = trainer.loss_sum(everything, joined) / num_targets
        (gradient,) = torch.autograd.grad(loss, own)
    return loss.detach(), gradient
