"""Memory and disk that run out, told in words and with what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import torch
from torch import nn

from peftkit.engine.data import Data
from peftkit.errors import ResourceError
from peftkit.plan import Plan

_CPU_EXHAUSTED = ("can't allocate memory", "cannot allocate memory", "not enough memory")


@contextlib.contextmanager
def explain_exhaustion(plan: Plan, data: Data) -> Iterator[None]:
    """Turn exhaustion of memory or disk into a ResourceError.

    Raises:
        ResourceError: with the shape of the batch and the settings that need less.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(_memory_text(plan, data)) from error
    except RuntimeError as error:
        if any(text in str(error).lower() for text in _CPU_EXHAUSTED):
            raise ResourceError(_memory_text(plan, data)) from error
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"the disk is full: {error.filename or 'the run directory'} could not be written") from error
        raise


def release(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let go of the weights of a model, which is no model afterwards, and of its optimizer's state.

    Its modules are emptied rather than their tensors: quantised layers keep weights in places of their own, and not every
    kind of tensor has an empty one. What is trained the optimizer and DDP hold as well; these tensors are emptied.
    """
    for parameter in model.parameters():
        parameter.grad = None
        if parameter.requires_grad:
            parameter.data = parameter.data.new_empty(0)
    for module in list(model.modules()):
        vars(module).clear()
    optimizer.state.clear()


def _memory_text(plan: Plan, data: Data) -> str:
    longest = int(data.sample.lengths.max())
    remedies = []
    if plan.micro_batch_size > 1:
        remedies.append(f"training.micro_batch_size: {plan.micro_batch_size // 2} (same result, less at a time)")
    if not plan.recipe.training.gradient_checkpointing:
        remedies.append("training.gradient_checkpointing: true (a third more time)")
    if plan.dtype == "float32":
        remedies.append("model.dtype: bfloat16 (half the weights)")
    remedies.append("`peftkit plan RECIPE --fit GPU_GIB` proposes settings for a GPU of that size")
    remedies.append(f"data.max_length below {longest} with data.truncation")
    shape = f"{plan.micro_batch_size} x {longest} tokens"
    return f"out of memory on {plan.hardware.device_name} with micro-batches of up to {shape}. What helps:\n  " + "\n  ".join(
        remedies
    )
