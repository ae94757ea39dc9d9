"""Why a process stops before its work is done: signals, Ctrl-C, its time; heard from the first second of a command on."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from peftkit.errors import Stopped

# SIGUSR1: Slurm's `--signal=USR1@300` sends it before the time of a job is up. Windows has none.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
STOPS = (75, 130)  # exit codes of a run that was asked to stop: run again with `--resume`; by Ctrl-C
TIME_UP = 1000  # in place of the number of a signal, and greater: `training.max_seconds` have passed


class _StopNow(BaseException):
    """Raised by a signal; no Exception, which a library could take for a failure of its own and go on."""

    def __init__(self, number: int) -> None:
        self.number = number


def stop_now(number: int, frame: Any = None) -> None:
    """Stop where the process is: as a signal handler."""
    raise _StopNow(number)


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], None], signals: Sequence[int] = SIGNALS) -> Iterator[None]:
    """Signals that ask for a stop go to this handler meanwhile; outside the main thread there are none."""
    old: dict[int, Any] = {}
    for number in signals:
        with contextlib.suppress(ValueError):
            old[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for restored, previous in old.items():
            signal.signal(restored, previous)


@contextlib.contextmanager
def stops_at_once(where: str, signals: Sequence[int] = SIGNALS) -> Iterator[None]:
    """A signal ends the block at once, its clean-up aside: while nothing is being trained there is nothing to save.

    Raises:
        Stopped: with the signal and `where`.
    """
    try:
        with handled(stop_now, signals):
            yield
    except _StopNow as stop:
        raise stopped(stop.number, where) from None


def stopped(number: int, where: str) -> Stopped:
    """The error for a stop by this signal, or by TIME_UP."""
    by = "training.max_seconds" if number == TIME_UP else signal.Signals(number).name
    return Stopped(f"stopped by {by} {where}", 130 if number == signal.SIGINT else 75)
