"""SIGTERM and SIGINT while training: a checkpoint at the next step boundary, agreed on by all processes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator


class StopSignal:
    """The signal that asks for a stop; 0 while there is none."""

    def __init__(self) -> None:
        self.number = 0

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """SIGTERM and the first SIGINT are remembered; a second SIGINT stops at once."""

        def remember(number: int, frame: Any) -> None:
            if number == self.number == signal.SIGINT:
                raise KeyboardInterrupt
            self.number = number

        old: dict[signal.Signals, Callable[..., Any] | int | None] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not the main thread: no signals there
                old[number] = signal.signal(number, remember)
        try:
            yield
        finally:
            for restored, handler in old.items():
                signal.signal(restored, handler)

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal that any process got, known to all of them."""
        if accelerator.num_processes == 1:
            return self.number
        flag = torch.tensor(self.number, device=accelerator.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return int(flag)
