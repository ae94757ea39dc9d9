"""What a run says while it trains: lines of metrics, status, trackers, the terminal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

from accelerate import Accelerator

from peftkit.engine.checkpoint import Progress
from peftkit.engine.evaluate import flat_metrics
from peftkit.engine.hardware import peak_memory_bytes
from peftkit.plan import Plan
from peftkit.run import Run


class Reporter(Protocol):
    """Who hears of the run's progress."""

    def start(self, total_steps: int, first_step: int) -> None:
        """Training begins."""

    def step(self, line: dict[str, Any], total_steps: int) -> None:
        """A step was logged."""

    def advance(self, step: int) -> None:
        """A step is done."""

    def evaluation(self, line: dict[str, Any]) -> None:
        """A split was evaluated."""

    def note(self, text: str) -> None:
        """Something to know."""

    def stop(self) -> None:
        """Training is over."""


@dataclass
class Journal:
    """Writes down what happens, from the main process alone.

    Attributes:
        plan: says how often.
        run: where to.
        accelerator: its trackers hear of the numbers too.
        reporter: who else hears of them.
        total_steps: of the run.
    """

    plan: Plan
    run: Run
    accelerator: Accelerator
    reporter: Reporter
    total_steps: int
    _next_status: float = 0.0

    def step(self, progress: Progress, learning_rate: float, grad_norm: float) -> None:
        """Write a line about the steps since the last one, where one is due."""
        ends = progress.step == self.total_steps or progress.stopped_early
        if not progress.loss_targets or (progress.step % self.plan.recipe.training.logging_steps and not ends):
            return
        line = {
            "step": progress.step,
            "loss": progress.loss_sum / progress.loss_targets,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "target_tokens": progress.target_tokens,
            "seconds": round(progress.seconds, 3),
            "memory_bytes": peak_memory_bytes(self.plan.hardware.device),
            "rows": progress.rows,
        }
        line |= {"skipped_steps": progress.skipped_steps} if progress.skipped_steps else {}
        line |= {"spike": True} if progress.spikes else {}
        progress.loss_sum, progress.loss_targets, progress.spikes, progress.rows = 0.0, 0, 0, ""
        if self.accelerator.is_main_process:
            self.run.append_metrics(line)
        if time.monotonic() >= self._next_status:
            self.write_status(progress.step)
        numbers = {f"train/{name}": value for name, value in flat_metrics(line).items() if name != "step"}
        self.accelerator.log(numbers, step=progress.step)
        self.reporter.step(line, self.total_steps)

    def write_status(self, step: int) -> None:
        """Say in status.json how far the run is."""
        self._next_status = time.monotonic() + 1.0  # it waits for the disk, some milliseconds each time
        if self.accelerator.is_main_process:
            self.run.write_status("training", step=step, total_steps=self.total_steps)
