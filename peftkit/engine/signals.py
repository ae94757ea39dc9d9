"""Signals and the clock while training: a checkpoint at the next step boundary, agreed on by all processes."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator

from peftkit.stop import TIME_UP, handled, stop_now


class StopSignal:
    """The signal that asks for a stop, or TIME_UP; 0 while there is none.

    Args:
        max_seconds: time that training may take in this process; None: all that it needs.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        self.number = 0
        self.max_seconds = max_seconds
        self.started = time.monotonic()

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Signals are remembered until the step ends, and time begins to run; a second SIGINT stops at once."""

        def remember(number: int, frame: Any) -> None:
            if number == self.number == signal.SIGINT:
                stop_now(number)
            self.number = number

        self.started = time.monotonic()
        with handled(remember):
            yield

    def agreed(self, accelerator: Accelerator) -> int:
        """What any process was asked for, known to all of them; the clock is that of the main process."""
        number = self.number
        if accelerator.is_main_process and self.max_seconds is not None and time.monotonic() - self.started >= self.max_seconds:
            number = TIME_UP
        if accelerator.num_processes == 1:
            return number
        flag = torch.tensor(number, device=accelerator.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return int(flag)
