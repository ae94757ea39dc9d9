"""Memory and disk that run out, told in words and with what to do."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor

from peftkit.errors import ResourceError
from peftkit.guides import MEMORY

if TYPE_CHECKING:
    from peftkit.engine.data import Data
    from peftkit.plan import Plan
    from peftkit.tasks.example import Example

# Allocators and libraries raise plain RuntimeErrors too: only their texts tell.
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "status_alloc_failed")
_DISK_FULL = ("no space left on device", "disk quota exceeded", "unexpected pos")  # safetensors twice, torch.save
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)


class NoMemoryError(MemoryError):
    """A training pass that memory did not suffice for.

    Attributes:
        when: where in the run.
        plan: as it was then.
        shape: sequences and tokens of the largest of these passes.
        origins: its rows.
    """

    def __init__(self, when: str, plan: Plan, chunks: Sequence[Sequence[Example]]) -> None:
        def shape(chunk: Sequence[Example]) -> tuple[int, int]:
            return sum(len(row.sequences) for row in chunk), max(row.length for row in chunk)

        largest = max(chunks, key=lambda chunk: math.prod(shape(chunk)))
        self.when, self.plan, self.shape = when, plan, shape(largest)
        self.origins = [origin for row in largest for origin in row.origin.split(", ")]
        super().__init__(self.place)

    @property
    def place(self) -> str:
        """When, and with how much."""
        return f"{self.when}: {self.shape[0]} x {self.shape[1]} tokens"


@contextlib.contextmanager
def explain_exhaustion(memory_text: Callable[[], str]) -> Iterator[None]:
    """Turn exhaustion of memory or disk, and what the file system refuses, into a ResourceError.

    Args:
        memory_text: says where memory has run out and what helps.

    Raises:
        ResourceError: in words.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise ResourceError(memory_text(), guide=MEMORY) from error
        if is_disk_full(error):
            raise ResourceError(f"the disk is full: {_file_of(error)} could not be written; make room there") from error
        if isinstance(error, OSError) and error.errno in _REFUSED:
            what = f"{_file_of(error)} cannot be used: {error.strerror}"
            raise ResourceError(f"{what}; change who may read and write there, or name another place") from error
        raise


@contextlib.contextmanager
def memory_told(when: str, plan: Plan, chunks: Sequence[Sequence[Example]]) -> Iterator[None]:
    """Say of memory that runs out in a step which passes it was needed for.

    Raises:
        NoMemoryError: naming them.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise NoMemoryError(when, plan, chunks) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_told = isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NO_MEMORY)
    return is_told or isinstance(error, MemoryError | torch.OutOfMemoryError)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that nothing more can be written."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, RuntimeError | SafetensorError) and any(text in str(error).lower() for text in _DISK_FULL)


def raise_if_exhausted(error: Exception) -> None:
    """Raise an error again that tells of exhaustion, before it is taken for another: the command says what helps."""
    if is_out_of_memory(error) or is_disk_full(error):
        raise error


def memory_text(what: str, remedies: Sequence[str]) -> str:
    """Where memory has run out, and what helps."""
    return f"out of memory {what}. What helps:\n  " + "\n  ".join(remedies)


def rebuilding_text(what: str) -> str:
    """The same where an adapter becomes another model, on the CPU."""
    held = "the adapter and the largest layer in float32, and the whole of a base that is quantised or has random weights"
    return memory_text(what, [f"a machine with more memory: it must hold {held}"])


def answering_remedies(batch_size: int) -> list[str]:
    """What needs less memory where rows are answered or scored in batches."""
    fewer = [f"--batch-size {batch_size // 2} (same answers, fewer rows at a time)"] if batch_size > 1 else []
    return [*fewer, "shorter rows, or fewer new tokens where text is written", "a machine with more memory"]


def _file_of(error: Exception) -> str:
    return str(getattr(error, "filename", None) or "a file of the output")


def release(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let go of the weights of a model, which is no model afterwards, and of its optimizer's state.

    Its modules are emptied rather than their tensors: quantised layers keep weights in places of their own, and not every
    kind of tensor has an empty one. What is trained the optimizer and DDP hold as well; these tensors are emptied.
    """
    for parameter in model.parameters():
        parameter.grad = None
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.new_empty(0)
    for module in list(model.modules()):
        vars(module).clear()
    optimizer.state.clear()
    give_back_heap()


def give_back_heap() -> None:
    """Return what the process's heap holds free to the system: glibc keeps the holes that training left, hundreds of MiB."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def reclaim() -> None:
    """Return what is free to the device and to the system; cycles of modules go too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    give_back_heap()


def training_remedies(plan: Plan, data: Data) -> list[str]:
    """Settings that need less, without a memory plan."""
    longest = int(data.sample.lengths.max())
    remedies = []
    if plan.micro_batch_size > 1:
        remedies.append(f"training.micro_batch_size: {plan.micro_batch_size // 2} (same result, less at a time)")
    if not plan.recipe.training.gradient_checkpointing:
        remedies.append("training.gradient_checkpointing: true (a third more time)")
    if plan.dtype == "float32":
        remedies.append("model.dtype: bfloat16 (half the weights)")
    remedies.append("`peftkit plan RECIPE --fit GPU_GIB` proposes settings for a GPU of that size")
    return [*remedies, f"data.max_length below {longest} with data.truncation"]


def training_memory_text(plan: Plan, data: Data) -> str:
    """The shape of the batch, and settings that need less."""
    shape = f"{plan.micro_batch_size} x {int(data.sample.lengths.max())} tokens"
    what = f"on {plan.hardware.device_name} with micro-batches of up to {shape}"
    return memory_text(what, training_remedies(plan, data))
