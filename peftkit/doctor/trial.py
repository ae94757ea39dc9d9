"""Trials, each in a child process with a time limit: a library that crashes or hangs takes nothing else along."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MODULE = "peftkit.doctor.tried_torch"


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        facts: what it found; empty where it failed.
        fault: why it failed; empty where it did not.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""


def attempt(name: str, device: str, seconds: float, module: str = _MODULE) -> Outcome:
    """Try something in a process of its own.

    Args:
        name: the trial, see `tried_torch.TRIALS`.
        device: torch device type.
        seconds: after which it is ended.
        module: where trials are.
    """
    with tempfile.TemporaryDirectory(prefix="peftkit-doctor-") as folder, tempfile.TemporaryFile() as said:
        file = Path(folder) / "facts.json"
        command = [sys.executable, "-m", module, name, device, str(file)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return Outcome(fault=f"did not end within {seconds:g} s")
        finally:
            _end(process)
        said.seek(0)
        return _outcome(code, file, said.read().decode(errors="replace"))


def _outcome(code: int, file: Path, said: str) -> Outcome:
    if code == 0:
        return Outcome(json.loads(file.read_text(encoding="utf-8")))
    if code < 0:
        return Outcome(fault=f"crashed ({signal.Signals(-code).name})")
    return Outcome(fault=([line for line in said.splitlines() if line.strip()] or [f"exit code {code}"])[-1])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a trial with all that it has started, such as compilers."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
    process.wait()


def attempt_all(trials: Sequence[tuple[str, str, float]]) -> dict[str, Outcome]:
    """Several trials (name, device, seconds) at the same time."""
    with ThreadPoolExecutor(max_workers=len(trials)) as pool:
        return dict(zip([name for name, _, _ in trials], pool.map(lambda trial: attempt(*trial), trials), strict=True))
