"""Several processes: build the `accelerate launch` command line and replace this process with it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from peftkit.errors import RecipeError
from peftkit.recipe import LoadedRecipe

WORKER_MARK = "PEFTKIT_WORKER"


def is_worker() -> bool:
    """Whether this process was started by the launcher."""
    return os.environ.get(WORKER_MARK) == "1"


def worker_arguments(loaded: LoadedRecipe, output: Path | None, resume: bool, as_json: bool) -> list[str]:
    """The `peftkit train` arguments of each worker; the run directory is named here, so that all write to one."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    if output is None and not resume:
        output = Path(loaded.recipe.output.dir) / f"{loaded.recipe.name}-{stamp}"
    arguments = ["train", str(loaded.path)]
    for text in loaded.overrides:
        arguments += ["--set", text]
    arguments += ["--output", str(output)] if output is not None else []
    return arguments + ["--resume"] * resume + ["--json"] * as_json


def launch_command(processes: int | None, config: Path | None, arguments: Sequence[str]) -> list[str]:
    """The command line that starts the workers.

    Args:
        processes: number of processes on this machine; None leaves it to the config.
        config: accelerate's launch file; None: one machine, as many processes as said, GPUs where there are any.
        arguments: arguments of `peftkit` in each worker.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if config is not None:
        command += ["--config_file", str(config)]
    else:
        # `--multi_gpu --cpu` is gloo on the CPU; `--cpu` alone starts one process in silence (accelerate 1.15).
        command += ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", "0"]
        if not _has_gpu():
            command += ["--cpu"]
    if processes is not None:
        command += ["--num_processes", str(processes)]
    return [*command, "-m", "peftkit", *arguments]


def launch(processes: int | None, config: Path | None, arguments: Sequence[str]) -> None:
    """Replace this process with the launcher; does not return.

    Raises:
        RecipeError: the launch file does not exist, or the number of processes is no number of processes.
    """
    if config is not None and not config.is_file():
        raise RecipeError(f"--launch: there is no file `{config}`")
    if processes is not None and processes < 1:
        raise RecipeError(f"--processes: {processes} is not allowed; it takes a whole number above 0")
    os.environ[WORKER_MARK] = "1"
    command = launch_command(processes, config, arguments)
    os.execv(command[0], command)


def _has_gpu() -> bool:
    return os.environ.get("PEFTKIT_DEVICE") != "cpu" and (Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists())
