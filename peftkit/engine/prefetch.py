"""What the next steps need, prepared by a thread while this step computes."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from peftkit.tasks.example import Batch

T = TypeVar("T")
_Item = tuple[int, T | None, BaseException | None]


class Prefetcher(Generic[T]):
    """Prepares steps in order, a few ahead of those that are asked for; use it in a `with` block, which ends the thread.

    The results are those of calling `prepare` step by step: one thread calls it, in the order of the steps. It must draw no
    random numbers that others draw too, and nobody else may read what it reads.

    Args:
        prepare: makes what a step needs.
        first: the first step.
        last: the step after the last one.
        ahead: steps that may lie ready.
    """

    def __init__(self, prepare: Callable[[int], T], first: int, last: int, ahead: int = 2) -> None:
        self._prepare, self._next, self._last = prepare, first, last
        self._ready: queue.Queue[_Item[T]] = queue.Queue(ahead)
        self._stopped = threading.Event()
        # A daemon: where the process ends by an error elsewhere, it does not wait for this thread.
        self._thread = threading.Thread(target=self._work, args=(first,), name="peftkit-prefetch", daemon=True)
        self._thread.start()

    def get(self, step: int) -> T:
        """What `prepare` gives for a step; steps are asked for in order, each once.

        Raises:
            whatever `prepare` raised for it.
        """
        assert step == self._next < self._last, f"step {step} is not the next one, {self._next} of {self._last}"
        _, result, error = self._ready.get()
        self._next += 1
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def stop(self) -> None:
        """End the thread; what lies ready is dropped."""
        self._stopped.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()
        self._thread.join()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _work(self, first: int) -> None:
        for step in range(first, self._last):
            if self._stopped.is_set():
                return
            try:
                item: _Item[T] = (step, self._prepare(step), None)
            except BaseException as error:
                self._put((step, None, error))
                return
            self._put(item)

    def _put(self, item: _Item[T]) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.1)
                return


def pinned(batch: Batch) -> Batch:
    """The batch in memory that a GPU can copy from while it computes; the same batch where there is none."""
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if torch.cuda.is_available() else batch


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; the copy of a pinned one does not wait."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
