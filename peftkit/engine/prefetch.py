"""What the next steps need, prepared by a thread while this step computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

from peftkit.tasks.example import Batch

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Prepares steps in order, a few ahead of those that are asked for; use it in a `with` block, which ends the thread.

    The results are those of calling `prepare` step by step: one thread calls it, in the order of the steps. It must draw no
    random numbers that others draw too, and nobody else may read what it reads.

    Args:
        prepare: makes what a step needs.
        first: the first step.
        last: the step after the last one.
        ahead: steps that may lie ready.
        gpu: index of the GPU that the thread works for. A thread begins with the first one as its own, and pinning memory there
            would take half a GiB of it for every process of another.
    """

    def __init__(self, prepare: Callable[[int], T], first: int, last: int, ahead: int = 2, *, gpu: int | None = None) -> None:
        self._prepare, self._steps = prepare, iter(range(first, last))
        self._thread = ThreadPoolExecutor(1, "peftkit-prefetch", _begin, (gpu,))
        self._ready: deque[tuple[int, Future[T]]] = deque()
        for _ in range(ahead):
            self._submit()

    def get(self, step: int) -> T:
        """What `prepare` gives for a step; steps are asked for in order, each once.

        Raises:
            whatever `prepare` raised for it.
        """
        due, result = self._ready.popleft()
        assert step == due, f"step {step} is not the next one, {due}"
        self._submit()
        return result.result()

    def _submit(self) -> None:
        if (step := next(self._steps, None)) is not None:
            self._ready.append((step, self._thread.submit(self._prepare, step)))

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)


def _begin(gpu: int | None) -> None:
    if gpu is not None:
        torch.cuda.set_device(gpu)


def pinned(batch: Batch, device: torch.device) -> Batch:
    """The batch in memory that a GPU can copy from while it computes; the same batch where none does."""
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if device.type == "cuda" else batch


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; the copy of a pinned one does not wait."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
