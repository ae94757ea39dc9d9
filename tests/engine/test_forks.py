"""Forks that stand in for processes in tests are what processes would be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.forks import Forked

PROGRAMS = [
    ["-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)", "more"],
    ["-c", "import os, sys; print(os.environ['PLACE'], os.getcwd(), sys.argv[1:], __name__)", "--set", "a=b c"],
    ["-c", "import sys; sys.exit('in words')"],
    ["-c", "1 / 0"],
    ["-c", "import os, signal; print(signal.getsignal(signal.SIGTERM)); os.kill(os.getpid(), signal.SIGKILL)"],
    ["-m", "peftkit", "explain", "adapter.r"],
    ["-m", "peftkit", "explain", "adapter.q"],
]


def result_of(start: Any, arguments: list[str], folder: Path) -> tuple[int, str, str]:
    """Exit code, stdout, and the last line of stderr."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder}
    process = start([sys.executable, *arguments], env=os.environ | {"PLACE": "here"}, **options)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, "".join(err.splitlines()[-1:])


@pytest.mark.parametrize("arguments", PROGRAMS, ids=lambda arguments: arguments[1][:30])
def test_a_fork_does_what_a_process_does(arguments: list[str], tmp_path: Path) -> None:
    assert result_of(Forked, arguments, tmp_path) == result_of(subprocess.Popen, arguments, tmp_path)


def test_a_fork_is_a_child_that_hears_signals_and_starts_forks() -> None:
    program = """
import os, subprocess, sys, time
command = [sys.executable, "-c", "import os, sys; print(os.getppid(), 'torch' in sys.modules)"]
child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
print(os.getppid(), child.stdout.split() == [str(os.getpid()), "True"], flush=True)
time.sleep(60)
"""
    process = Forked([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == f"{os.getpid()} True\n"
    process.terminate()
    assert process.wait(20) == -signal.SIGTERM
