"""The run's largest pass before its first step: memory that does not suffice shows at once, not hours later."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import DistributedType
from torch import nn
from torch.utils._pytree import tree_map

from peftkit.engine.checkpoint import rng_state, set_rng_state
from peftkit.engine.guard import NoMemoryError, is_out_of_memory, reclaim
from peftkit.engine.hardware import WHOLE_MODELS
from peftkit.engine.largest import LargestPass, find_largest_pass
from peftkit.engine.sharding import is_sharded, own_part
from peftkit.engine.stored import state_bytes
from peftkit.plan import with_micro_batch
from peftkit.resolved import resolved_yaml
from peftkit.run import write_text
from peftkit.tasks.example import Example

if TYPE_CHECKING:
    from peftkit.engine.trainer import Trainer

# Buffers up to this size are copied: counts, running means, frequencies of positions. Larger ones hold weights (GPTQ's), which
# no forward pass changes.
_COPIED_BYTES = 2**20


def run_largest_pass(trainer: Trainer) -> None:
    """Run the largest pass of a run forward and backward, without a step, and leave everything as it was.

    Every process runs its own share of that pass. Where `training.micro_batch_size` is auto and memory does not suffice in
    one of them, all halve it and try again, down to 1; a number in the recipe is never changed. Of a stream, whose rows are
    not known, the pass is the largest of the rows that were checked. DeepSpeed keeps gradients to itself until its step, so
    there nothing is tried. Where FSDP shares the weights, a process without memory leaves the others waiting in the middle
    of the pass: it ends the run.

    Raises:
        NoMemoryError: it does not suffice.
    """
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED or trainer.progress.step >= trainer.total_steps:
        return
    _agree_on_micro_batch(trainer)
    plan = trainer.plan
    while (found := _pass_to_try(trainer)) is not None:
        training = trainer.plan.recipe.training
        chunk = trainer.chunks(trainer.data.sample.step(found.step, training.batch_size, training.seed))[found.number]
        if _fits(trainer, chunk, found):
            break
        _halve_micro_batch(trainer, NoMemoryError("in the largest pass, before the first step", trainer.plan, [chunk]))
    if trainer.plan is not plan and trainer.accelerator.is_main_process:
        write_text(trainer.run.resolved_path, resolved_yaml(trainer.plan))


def _halve_micro_batch(trainer: Trainer, failed: NoMemoryError) -> None:
    """Go on with smaller passes, where the recipe leaves that open.

    Raises:
        NoMemoryError: it does not, or they are as small as can be.
    """
    before = trainer.plan.micro_batch_size
    open_to_it = trainer.plan.decides("training.micro_batch_size") and before > 1
    if not open_to_it or not _has_whole_model(trainer):
        raise failed
    trainer.take_plan(with_micro_batch(trainer.plan, before // 2, f"memory did not suffice for {before}"))
    what = f"note: out of memory {failed.place}; going on with training.micro_batch_size {before // 2}, the same result"
    trainer.reporter.note(what)


def _agree_on_micro_batch(trainer: Trainer) -> None:
    """Take the first process's decision: machines with less memory may have made another."""
    if trainer.accelerator.num_processes == 1 or not trainer.plan.decides("training.micro_batch_size"):
        return
    sizes = [trainer.plan.micro_batch_size]
    torch.distributed.broadcast_object_list(sizes)
    if sizes[0] != trainer.plan.micro_batch_size:
        trainer.take_plan(with_micro_batch(trainer.plan, sizes[0], "decided by the first process"))


def _pass_to_try(trainer: Trainer) -> LargestPass | None:
    """The largest pass; None where it is in the next step anyway, which needs no more memory than that on the CPU."""
    plan = dataclasses.replace(trainer.plan, rows=trainer.paths.rows)
    found = find_largest_pass(plan, trainer.data, trainer.model)
    is_next = found.step == trainer.progress.step and trainer.accelerator.device.type == "cpu"
    return None if is_next and not plan.decides("training.micro_batch_size") else found


def _fits(trainer: Trainer, chunk: list[Example], found: LargestPass) -> bool:
    """Whether every process has memory for its share of a pass; gradients are gone afterwards, all else is as before."""
    fits = True
    try:
        with _unchanged(trainer.model), _unchanged_method(trainer), _optimizer_state(trainer):
            if found.count > 1:  # as earlier passes of the step leave them
                for parameter in trainer.trained:
                    parameter.grad = torch.zeros_like(parameter)
            trainer.try_pass(chunk)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    finally:
        for parameter in trainer.trained:
            parameter.grad = None
    if not fits:
        reclaim()
    return _in_all_processes(trainer, fits)


def _has_whole_model(trainer: Trainer) -> bool:
    """Whether this process computes passes by itself."""
    return trainer.accelerator.distributed_type in WHOLE_MODELS and not is_sharded(trainer.model)


def _in_all_processes(trainer: Trainer, fits: bool) -> bool:
    if trainer.accelerator.num_processes == 1 or not _has_whole_model(trainer):
        return fits
    flag = torch.tensor(int(fits), device=trainer.accelerator.device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag)


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """A pass that leaves random numbers, buffers and whatever modules keep as they were."""
    random = rng_state()
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    buffers = [buffer for buffer in model.buffers() if buffer.numel() * buffer.element_size() <= _COPIED_BYTES]
    copies = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        for module, state, own_buffers in kept:
            vars(module).clear()
            vars(module).update(state)
            module._buffers.clear()
            module._buffers.update(own_buffers)
        with torch.no_grad():  # some buffers are leaves that gradients flow to (MonteCLoRA)
            for buffer, copy in zip(buffers, copies, strict=True):
                buffer.copy_(copy)
        set_rng_state(random)


@contextlib.contextmanager
def _unchanged_method(trainer: Trainer) -> Iterator[None]:
    """A pass that leaves what a method keeps beside its tensors as it was, such as samples that are drawn and not yet used."""
    own = trainer.parts.get("adapter")
    state = tree_map(_copied, own.state_dict()) if own is not None else None
    try:
        yield
    finally:
        if own is not None:
            own.load_state_dict(state)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def _optimizer_state(trainer: Trainer) -> Iterator[None]:
    """As much memory of a GPU taken as the optimizer's state will need, where there is none yet.

    Not on the CPU: pages of its memory are taken when they are written to.
    """
    device, optim = trainer.accelerator.device, trainer.plan.recipe.training.optim
    if device.type != "cuda" or trainer.optimizer.state:
        yield
        return
    own = map(own_part, trainer.trained)
    size = sum(state_bytes(optim, part.shape, part.element_size(), device.type) for part in own)
    held = [torch.empty(size, dtype=torch.uint8, device=device)]
    try:
        yield
    finally:
        held.clear()
        torch.cuda.empty_cache()  # the state comes in many pieces, for which one large block is no place
