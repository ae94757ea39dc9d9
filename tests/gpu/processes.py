"""peftkit as a process of its own, on the GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import Result


def start(*arguments: Any, program: str = "from peftkit.cli import main; main()", **variables: str) -> subprocess.Popen[str]:
    """`peftkit ARGUMENTS`, started; `program` is what Python runs."""
    environment = {name: value for name, value in os.environ.items() if name != "PEFTKIT_DEVICE"} | variables
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def finish(process: subprocess.Popen[str]) -> Result:
    """What it gave."""
    out, err = process.communicate(timeout=240)
    return Result(process.returncode, out, err)


def train_alone(recipe: Path, output: Path, *arguments: str, **variables: str) -> dict[str, Any]:
    """Train in a process that holds nothing else; the summary."""
    result = finish(start("train", recipe, "--output", output, "--json", *arguments, **variables))
    assert result.code == 0, result.err[-3000:]
    summary: dict[str, Any] = json.loads(result.out)
    return summary
