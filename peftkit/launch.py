"""Several processes: build the `accelerate launch` command line, run it, and end as the run ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from peftkit.errors import RecipeError
from peftkit.recipe import LoadedRecipe
from peftkit.recipe.sharded import why_not_sharded
from peftkit.run import newest_unfinished

WORKER_MARK = "PEFTKIT_WORKER"
EXIT_FILE = "PEFTKIT_EXIT_FILE"  # where the first worker that fails writes its exit code


@dataclass(frozen=True)
class Sharding:
    """How processes share what a run stores.

    Attributes:
        num_processes: how many there are.
        kind: `ddp`: each has everything; `fsdp`, `zero3`: weights, gradients and optimizer are shared out; `zero2`: gradients
            and optimizer; `zero1`: the optimizer.
        offloads_optimizer: whether its state waits in the CPU's memory.
        offloads_weights: whether the weights do.
    """

    num_processes: int = 1
    kind: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"
    offloads_optimizer: bool = False
    offloads_weights: bool = False


def read_sharding(processes: int | None, config: Path | None) -> Sharding:
    """What an accelerate launch file says of sharing, for `--processes` and `--launch`.

    Raises:
        RecipeError: there is no such file, or it is no launch file; the number of processes is none.
    """
    check_launch(processes, config)
    facts = _read_launch_file(config) if config is not None else {}
    count = processes or facts.get("num_processes") or 1
    if facts.get("distributed_type") == "FSDP":
        settings = facts.get("fsdp_config") or {}
        names = _fsdp_names(str(settings.get("fsdp_version", 1)))
        whole = next((str(settings[name]) for name in names if name in settings), "true")
        return _fsdp(count, whole, str(settings.get("fsdp_offload_params", False)))
    if facts.get("distributed_type") == "DEEPSPEED":
        settings = facts.get("deepspeed_config") or {}
        if file := settings.get("deepspeed_config_file"):
            return _zero_of_file(count, file)
        away = [str(settings.get(f"offload_{what}_device") or "none") for what in ("optimizer", "param")]
        return _zero(count, str(settings.get("zero_stage", 2)), *away)
    return Sharding(count)


def _read_launch_file(path: Path) -> dict[str, Any]:
    try:
        facts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"--launch: `{path}` cannot be read as YAML: {reason}; `accelerate config` writes such files"
        ) from error
    if not isinstance(facts, dict):
        raise RecipeError(f"--launch: `{path}` is no launch file of accelerate, which has a key and a value a line")
    count = facts.get("num_processes")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise RecipeError(f"--launch: `{path}`: num_processes: {count} is not allowed; it takes a whole number above 0")
    return facts


def _refuse_fsdp_1(config: Path, facts: dict[str, Any]) -> None:
    """FSDP1 flattens what it shares out, and saves none of it by name; its successor is in every torch that we take."""
    settings = facts.get("fsdp_config") or {}
    if str(facts.get("distributed_type")).upper() == "FSDP" and str(settings.get("fsdp_version", 1)) != "2":
        raise RecipeError(
            f"--launch: `{config}`: fsdp_config.fsdp_version: {settings.get('fsdp_version', 1)} is not supported; use 2, as "
            "configs/fsdp2.yaml does (`accelerate to-fsdp2` rewrites a file)"
        )


def refuse_unshardable(loaded: LoadedRecipe, sharding: Sharding) -> None:
    """Refuse a recipe that cannot train where processes share out weights, gradients or optimizer like this.

    Raises:
        RecipeError: with every key that stands in the way.
    """
    if problems := [loaded.problem(key, what) for key, what in why_not_sharded(loaded.recipe, sharding.kind)]:
        raise RecipeError(problems)


def worker_sharding(processes: int) -> Sharding:
    """How this process, which accelerate's launcher started, shares with the others."""
    facts = os.environ
    if facts.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        names = _fsdp_names(facts.get("FSDP_VERSION", "1"))
        stated = [facts.get(name.upper(), "") for name in names]  # the launcher sets both, and "None" where nothing was said
        whole = next((text for text in stated if text.lower() not in ("", "none")), "true")
        return _fsdp(processes, whole, facts.get("FSDP_OFFLOAD_PARAMS", "false"))
    if facts.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        if (file := facts.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
            return _zero_of_file(processes, file)
        away = [facts.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE") or "none" for what in ("OPTIMIZER", "PARAM")]
        return _zero(processes, facts.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") or "2", *away)
    return Sharding(processes)


def _fsdp(count: int, whole: str, offloads: str) -> Sharding:
    kind: Any = "fsdp" if whole.upper() in ("TRUE", "FULL_SHARD", "HYBRID_SHARD", "1", "4") else "zero2"
    away = offloads.lower() == "true"
    return Sharding(count, "ddp" if whole.upper() in ("NO_SHARD", "3") else kind, away, away)


def _zero(count: int, stage: str, optimizer: str, weights: str) -> Sharding:
    kinds: dict[str, Any] = {"1": "zero1", "2": "zero2", "3": "zero3"}
    # weights are offloaded at stage 3 alone, the only one that shares them out
    return Sharding(count, kinds.get(stage, "ddp"), optimizer != "none", weights != "none" and stage == "3")


def _zero_of_file(count: int, path: str) -> Sharding:
    """What a file of DeepSpeed's own says."""
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization") or {}
        away = [str((settings.get(f"offload_{what}") or {}).get("device") or "none") for what in ("optimizer", "param")]
        return _zero(count, str(settings.get("stage", 0)), *away)
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"--launch: its deepspeed_config_file `{path}` cannot be read as DeepSpeed's JSON: {error}"
        ) from error


def _fsdp_names(version: str) -> tuple[str, str]:
    """The keys that say whether weights are shared out too, the one that this version of FSDP reads first."""
    names = ("fsdp_reshard_after_forward", "fsdp_sharding_strategy")
    return names if version == "2" else (names[1], names[0])


def check_launch(processes: int | None, config: Path | None) -> None:
    """Refuse a launch file that does not exist, and a number of processes that is none.

    Raises:
        RecipeError: with what is wrong.
    """
    if config is not None and not config.is_file():
        raise RecipeError(f"--launch: there is no file `{config}`")
    if processes is not None and processes < 1:
        raise RecipeError(f"--processes: {processes} is not allowed; it takes a whole number above 0")


def is_worker() -> bool:
    """Whether this process was started by the launcher."""
    return os.environ.get(WORKER_MARK) == "1"


def report_exit(code: int) -> None:
    """Tell the launcher why this worker ends; the first one that fails is believed, the others fail because of it."""
    path = os.environ.get(EXIT_FILE)
    if path and code and is_worker():
        with contextlib.suppress(OSError), open(path, "x", encoding="utf-8") as file:
            file.write(str(code))


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


def launch(processes: int | None, config: Path | None, arguments: Sequence[str]) -> int:
    """Start the workers, hand signals on to them, and wait.

    Returns:
        The exit code: that of the worker that failed first (accelerate's launcher knows only 0 and 1), or the one of a
        process that a signal has ended before its workers heard it.

    Raises:
        RecipeError: the launch file does not exist, is none, or shares the weights out; the number of processes is none.
    """
    check_launch(processes, config)
    if config is not None:
        _refuse_fsdp_1(config, _read_launch_file(config))
    heard: list[int] = []
    with tempfile.TemporaryDirectory(prefix="peftkit-launch-") as folder:
        file = config or write_launch_file(Path(folder) / "launch.yaml")
        # A session of its own: Ctrl-C at the terminal reaches the workers once, through here.
        exit_file = Path(folder) / "exit_code"
        marks = {WORKER_MARK: "1", EXIT_FILE: str(exit_file)}
        child = subprocess.Popen(launch_command(processes, file, arguments), env=os.environ | marks, start_new_session=True)

        def hand_on(number: int, frame: Any) -> None:
            heard.append(number)
            child.send_signal(signal.SIGTERM)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, hand_on)
        if child.wait() == 0:
            return 0
        told = exit_file.read_text(encoding="utf-8") if exit_file.is_file() else ""
    return int(told) if told else 128 + heard[0] if heard else 1


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
