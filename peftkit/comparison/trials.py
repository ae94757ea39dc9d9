"""The runs of a comparison, each a process of its own: started, watched, stopped with this one, and what became of each."""

from __future__ import annotations

import itertools
import re
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

from filelock import FileLock, Timeout

from peftkit.errors import RecipeError
from peftkit.launch import start_trial
from peftkit.run import Run
from peftkit.stop import STOPS, handled

POLL_SECONDS = 0.1
TIMED_STEPS, UNTIMED_STEPS = 25, 5  # of a run that is only timed, and those at its start that do not count
_ENDING_SECONDS = 60.0  # for a run whose comparison was killed: it writes a checkpoint
_HEADLINE = re.compile(r"^peftkit: .*\(exit \d+\):$", re.MULTILINE)


@dataclass(frozen=True)
class Trial:
    """One run of a comparison.

    Attributes:
        variant: its variant's name.
        seed: of the run.
        dir: its run directory.
        recipe: the recipe's file.
        overrides: `--set` arguments.
    """

    variant: str
    seed: int
    dir: Path
    recipe: Path
    overrides: tuple[str, ...]

    @property
    def log_path(self) -> Path:
        """What its process prints."""
        return self.dir.with_name(f"{self.dir.name}.log")

    @property
    def is_done(self) -> bool:
        """Whether it has been trained, evaluated and certified."""
        return bool(Run(self.dir).read_status().get("state") == "done")

    def arguments(self) -> list[str]:
        """The module and arguments that train it, or go on with it where it has begun."""
        begun = Run(self.dir).resolved_path.is_file()
        changes = [part for text in self.overrides for part in ("--set", text)]
        return ["peftkit", "train", str(self.recipe), *changes, "--output", str(self.dir), *["--resume"] * begun]

    def error(self, code: int) -> str:
        """Why it ended like this, in a line."""
        if code < 0:
            name = signal.Signals(-code).name
            return f"ended by {name}" + (": often the kernel, when memory ran out" if -code == signal.SIGKILL else "")
        text = self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.is_file() else ""
        reports = [text[found.end() :].strip() for found in _HEADLINE.finditer(text)]
        return (reports[-1] if reports and reports[-1] else "no word; its log ends above").splitlines()[0]


def begin(trial: Trial, slot: int, jobs: int) -> Popen[bytes]:
    """Start a trial's process.

    Raises:
        RecipeError: a process of a comparison that was killed still writes to its directory.
    """
    if trial.dir.exists():
        _wait_until_free(trial.dir)
        if not Run(trial.dir).resolved_path.is_file():
            shutil.rmtree(trial.dir)  # it ended before it was a run
    return start_trial(trial.arguments(), trial.log_path, slot, jobs)


def _wait_until_free(folder: Path) -> None:
    lock = FileLock(folder / ".run.lock", timeout=_ENDING_SECONDS)
    try:
        with lock:
            return
    except Timeout:
        raise RecipeError(f"{folder} is in use by another process; end that one first") from None


@dataclass
class _Running:
    trial: Trial
    process: Popen[bytes]
    started: float
    heard: int = 0  # how many of the signals that came it has been sent


def run_all(queue: Iterator[Trial], jobs: int, start: Callable[[Trial], None], end: Callable[[Trial, int, float], None]) -> int:
    """Run trials, so many at once, until there is none left or a signal asks to stop; that signal, or 0.

    A signal is handed on to the trials, which end with a checkpoint; a second Ctrl-C ends them at once.

    Args:
        queue: gives the next trial when there is room for it.
        jobs: how many at once.
        start: told of a trial that begins.
        end: told of one that has ended, with its exit code (negative: a signal's number) and its seconds.
    """
    running: dict[int, _Running] = {}
    signals: list[int] = []
    with handled(lambda number, frame: signals.append(number)):
        try:
            while True:
                while not signals and len(running) < jobs and (trial := next(queue, None)):
                    slot = min(set(range(jobs)) - running.keys())
                    running[slot] = _Running(trial, begin(trial, slot, jobs), time.monotonic())
                    start(trial)
                if not running:
                    return signals[0] if signals else 0
                time.sleep(POLL_SECONDS)
                _hand_on(running, signals)
                for slot, job in list(running.items()):
                    code = job.process.poll()
                    if code is not None:
                        del running[slot]
                        end(job.trial, code, time.monotonic() - job.started)
        finally:
            for job in running.values():
                job.process.kill()
                job.process.wait()


def _hand_on(running: dict[int, _Running], signals: list[int]) -> None:
    for job in running.values():
        for place in range(job.heard, len(signals)):
            again = signals[place] == signal.SIGINT and signal.SIGINT in signals[:place]
            job.process.send_signal(signal.SIGKILL if again else signals[place])
        job.heard = len(signals)


def state_after(code: int) -> str:
    """What a trial is whose process has ended like this: one that was stopped can go on."""
    return "done" if code == 0 else "pending" if code in STOPS else "failed"


def exit_code_of(code: int) -> int:
    """A process's exit code as a shell tells it: 137 where SIGKILL ended it."""
    return code if code >= 0 else 128 - code


def timed_steps(trial: Trial, seconds: float) -> int:
    """Optimizer steps that take so many seconds, by the median step of a timed run."""
    times = [line["seconds"] for line in Run(trial.dir).read_training_lines()]
    each = [after - before for before, after in itertools.pairwise(times)][UNTIMED_STEPS:]
    return max(1, int(seconds / max(statistics.median(each), 1e-6)))


def figures(run: Run, split: str) -> dict[str, Any]:
    """What a trained run says of itself, as an entry of compare.json has it."""
    summary, lines = run.read_status()["summary"], run.read_training_lines()
    return {
        "metrics": {name: value for name, value in summary["metrics_by_split"][split].items() if _is_number(value)},
        "trainable_params": summary["trainable_params"],
        "adapter_bytes": sum(path.stat().st_size for path in run.adapter_dir.glob("*.safetensors")),
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "train_seconds": summary["train_seconds"],
        "target_tokens_per_second": summary["target_tokens_per_second"],
        "target_tokens": lines[-1]["target_tokens"] if lines else 0,
        "steps": summary["global_step"],
        "forgetting": summary.get("forgetting", {}).get("rise"),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
