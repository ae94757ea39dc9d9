"""Several processes: build the `accelerate launch` command line and replace this process with it."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

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
        processes: number of processes; None leaves it to the config.
        config: accelerate's launch file; None: one machine, GPUs where there are any.
        arguments: arguments of `peftkit` in each worker.
    """
    config = config or _config_file()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
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


def _config_file() -> Path:
    """A launch file for this machine: MULTI_GPU with use_cpu is gloo on the CPU (MULTI_CPU and `--cpu` start a single process
    in silence, accelerate 1.15); port 0 lets jobs on one machine not collide."""
    facts = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "use_cpu": not _has_gpu(),
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": 1,
        "main_process_port": 0,
        "mixed_precision": "no",
        "dynamo_backend": "NO",
    }
    with tempfile.NamedTemporaryFile("w", prefix="peftkit-launch-", suffix=".yaml", delete=False) as handle:
        yaml.safe_dump(facts, handle)
    return Path(handle.name)


def _has_gpu() -> bool:
    return os.environ.get("PEFTKIT_DEVICE") != "cpu" and (Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists())
