"""Several processes: build the `accelerate launch` command line, run it, and end as the run ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from peftkit.errors import RecipeError
from peftkit.recipe import LoadedRecipe
from peftkit.run import Run, newest_unfinished

WORKER_MARK = "PEFTKIT_WORKER"


def is_worker() -> bool:
    """Whether this process was started by the launcher."""
    return os.environ.get(WORKER_MARK) == "1"


def worker_run_dir(loaded: LoadedRecipe, output: Path | None, resume: bool) -> Path:
    """The run directory, named before the workers start, so that all of them write to one."""
    if output is not None:
        return output
    if resume and (run := newest_unfinished(loaded.recipe)) is not None:
        return run.dir
    return Path(loaded.recipe.output.dir) / f"{loaded.recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def worker_arguments(loaded: LoadedRecipe, run_dir: Path, resume: bool, as_json: bool) -> list[str]:
    """The `peftkit train` arguments of each worker."""
    overrides = [part for text in loaded.overrides for part in ("--set", text)]
    arguments = ["train", str(loaded.path), *overrides, "--output", str(run_dir)]
    return arguments + ["--resume"] * resume + ["--json"] * as_json


def launch_command(processes: int | None, config: Path, arguments: Sequence[str]) -> list[str]:
    """The command line that starts the workers.

    Args:
        processes: number of processes; None leaves it to the launch file.
        config: accelerate's launch file.
        arguments: arguments of `peftkit` in each worker.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    if processes is not None:
        command += ["--num_processes", str(processes)]
    return [*command, "-m", "peftkit", *arguments]


def launch(processes: int | None, config: Path | None, run_dir: Path, arguments: Sequence[str]) -> int:
    """Start the workers, hand signals on to them, and wait.

    Returns:
        The exit code: that of the run (status.json has it; the launcher itself knows only 0 and 1).

    Raises:
        RecipeError: the launch file does not exist, or the number of processes is no number of processes.
    """
    if config is not None and not config.is_file():
        raise RecipeError(f"--launch: there is no file `{config}`")
    if processes is not None and processes < 1:
        raise RecipeError(f"--processes: {processes} is not allowed; it takes a whole number above 0")
    with tempfile.TemporaryDirectory(prefix="peftkit-launch-") as folder:
        file = config or write_launch_file(Path(folder) / "launch.yaml")
        # A session of its own: Ctrl-C at the terminal reaches the workers once, through here.
        child = subprocess.Popen(
            launch_command(processes, file, arguments), env=os.environ | {WORKER_MARK: "1"}, start_new_session=True
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: child.send_signal(signal.SIGTERM))
        code = child.wait()
    return int(Run(run_dir).read_status().get("exit_code") or 1) if code else 0


def write_launch_file(path: Path) -> Path:
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
    path.write_text(yaml.safe_dump(facts), encoding="utf-8")
    return path


def _has_gpu() -> bool:
    return os.environ.get("PEFTKIT_DEVICE") != "cpu" and (Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists())
