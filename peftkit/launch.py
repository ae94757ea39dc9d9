"""Several processes: build the `accelerate launch` command line, run it, and end as the run ended."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from peftkit.errors import RecipeError
from peftkit.guides import SHARDED
from peftkit.launch_file import (
    Sharding,
    check_launch,
    check_parallelism,
    check_sharded,
    fsdp_names,
    fsdp_sharding,
    read_launch_file,
    resolved_launch_file,
    with_fsdp_settled,
    zero_of_file,
    zero_sharding,
)
from peftkit.machines import Machines, find_machines, interface_to
from peftkit.recipe import LoadedRecipe
from peftkit.recipe.sharded import why_not_sharded, why_not_split
from peftkit.run import Run, newest_unfinished, write_json
from peftkit.stop import handled
from peftkit.supervise import OUTCOME_FILE, Job, descendants
from peftkit.worker import adopt_orphans, begin, end_with_parent, exit_path

WORKER_MARK = "PEFTKIT_WORKER"
OPTIONS = "PEFTKIT_LAUNCH_OPTIONS"  # with which the job was started
JOB_DIR = "PEFTKIT_JOB_DIR"  # the folder that launcher and workers share on a machine
DIVIDED_BY = "PEFTKIT_DIVIDED_BY"  # processes that divide each layer
CP_SIZE = "PEFTKIT_CP_SIZE"  # processes that share out the tokens of each row
FSDP_ON_CPU = "PEFTKIT_FSDP_ON_CPU"  # "1": FSDP2 on CPUs, for tests


def refuse_unshardable(loaded: LoadedRecipe, sharding: Sharding) -> None:
    """Refuse a recipe that cannot train where processes share out weights, gradients or optimizer like this.

    Raises:
        RecipeError: with every key that stands in the way.
    """
    found = chain(why_not_sharded(loaded.recipe, sharding.kind), why_not_split(loaded.recipe) if sharding.cp_size > 1 else ())
    if problems := [loaded.problem(key, what) for key, what in found]:
        raise RecipeError(problems, guide=SHARDED)


def started_with(kind: str) -> bool:
    """Whether accelerate's launcher has started this process with `FSDP` or `DEEPSPEED`."""
    return os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true"


def divided_by() -> int:
    """Among how many processes each layer is divided."""
    return int(os.environ.get(DIVIDED_BY, "1")) if is_worker() else 1


def cp_size() -> int:
    """Among how many processes the tokens of each row are shared out."""
    return int(os.environ.get(CP_SIZE, "1")) if is_worker() else 1


def worker_sharding(processes: int) -> Sharding:
    """How this process, which accelerate's launcher started, shares with the others, that have so many times other rows."""
    return dataclasses.replace(_stored_sharding(processes * cp_size()), cp_size=cp_size())


def _stored_sharding(processes: int) -> Sharding:
    facts = os.environ
    if divided_by() > 1:
        return Sharding(divided_by(), "tp")
    if started_with("FSDP"):
        names = fsdp_names(facts.get("FSDP_VERSION", "1"))
        stated = [facts.get(name.upper(), "") for name in names]  # the launcher sets both, and "None" where nothing was said
        whole = next((text for text in stated if text.lower() not in ("", "none")), "true")
        return fsdp_sharding(processes, whole, facts.get("FSDP_OFFLOAD_PARAMS", "false"))
    if started_with("DEEPSPEED"):
        if (file := facts.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
            return zero_of_file(processes, file)
        away = [facts.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE") or "none" for what in ("OPTIMIZER", "PARAM")]
        return zero_sharding(processes, facts.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") or "2", *away)
    return Sharding(processes)


def is_worker() -> bool:
    """Whether this process was started by the launcher."""
    return os.environ.get(WORKER_MARK) == "1"


def launch_options() -> list[str]:
    """The options of processes and machines with which this worker's job was started."""
    return shlex.split(os.environ.get(OPTIONS, "")) if is_worker() else []


def begin_worker(output: Path | None) -> None:
    """Let the launcher watch this process, if one has started it."""
    folder = os.environ.get(JOB_DIR)
    if folder and is_worker() and output is not None:
        rank = int(os.environ.get("RANK", "0"))
        begin(Path(folder), rank, Run(output).worker_log_path(rank), keeps_terminal=_is_first_here())


def _is_first_here() -> bool:
    """Whether this is the first worker of its machine, the one that keeps the terminal."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def report_exit(code: int, message: str = "", *, lost_peer: bool = False) -> None:
    """Tell the launcher why this worker ends.

    Args:
        code: the exit code.
        message: why, for users.
        lost_peer: whether it ends only because another process is gone.
    """
    folder, rank = os.environ.get(JOB_DIR), int(os.environ.get("RANK", "0"))
    if not folder or not code or not is_worker():
        return
    facts = {"code": code, "rank": rank, "message": message, "lost_peer": lost_peer, "at_terminal": _is_first_here()}
    with contextlib.suppress(OSError):
        write_json(exit_path(Path(folder), rank), facts)


def run_of_workers(facts: dict[str, Any], loaded: LoadedRecipe, output: Path | None, resume: bool) -> Run:
    """The run directory, named before the workers start, so that all of them write to one.

    Args:
        facts: the resolved launch file.
        loaded: the recipe.
        output: `--output`.
        resume: whether a run goes on.

    Raises:
        RecipeError: it holds something already, or several machines would each make one up.
    """
    if facts["num_machines"] > 1 and output is None:
        raise RecipeError("--output: several machines need it: the same folder for all, on a disk that all of them see")
    run = Run(worker_run_dir(loaded, output, resume))
    if not resume and facts["machine_rank"] == 0:
        run.require_new()
    return run


def describe(facts: dict[str, Any]) -> str:
    """The machines of a resolved launch file, in words."""
    count = facts["num_machines"]
    address = f"{facts['main_process_ip']}:{facts['main_process_port']}"
    return (
        f"machine {facts['machine_rank']} of {count}, {facts['num_processes'] // count} process(es) each, meeting at {address}"
    )


def worker_run_dir(loaded: LoadedRecipe, output: Path | None, resume: bool) -> Path:
    """The directory named by `--output`, or that of the newest unfinished run, or a new one."""
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


def launch_command(launch_file: Path, outcome_path: Path, arguments: Sequence[str]) -> list[str]:
    """The command line that starts the workers.

    Args:
        launch_file: accelerate's, resolved.
        outcome_path: where the agent says how the workers ended.
        arguments: arguments of `peftkit` in each worker.
    """
    command = [sys.executable, "-m", "peftkit.agent", str(os.getpid()), str(outcome_path), "--config_file", str(launch_file)]
    return [*command, "-m", "peftkit", *arguments]


@dataclass(frozen=True)
class Launch:
    """What the command line says of processes and machines.

    Attributes:
        processes: of each machine; None leaves it to the launch file.
        config: a launch file.
        hang_timeout: seconds without progress after which the job is ended; 0: never.
        machines: what options say of machines.
    """

    processes: int | None = None
    config: Path | None = None
    hang_timeout: float = 1800.0
    machines: Machines = field(default_factory=Machines)

    @property
    def options(self) -> list[str]:
        """The options that say the same."""
        machines = self.machines
        stated = {
            "--processes": self.processes,
            "--launch": self.config,
            "--num-machines": machines.count,
            "--machine-rank": machines.rank,
            "--main-process-ip": machines.main_ip,
            "--main-process-port": machines.main_port,
        }
        return [part for name, value in stated.items() if value is not None for part in (name, str(value))]

    @property
    def is_wanted(self) -> bool:
        """Whether anything asks for launched processes, and this is not one of them."""
        return (self.processes, self.config, self.machines.count) != (None, None, None) and not is_worker()


def resolve(asked: Launch, mixed_precision: str) -> dict[str, Any]:
    """The launch file of a run on this machine.

    Raises:
        RecipeError: the launch file does not exist, is none, or cannot be followed here; a number is none.
    """
    check_launch(asked.processes, asked.config)
    facts = read_launch_file(asked.config) if asked.config is not None else {}
    kind = str(facts.get("distributed_type")).upper()
    facts = with_fsdp_settled(facts)
    check_sharded(kind, has_gpu=_has_gpu() or os.environ.get(FSDP_ON_CPU) == "1")
    machines = find_machines(asked.machines, facts, os.environ)
    has_gpu = _has_gpu() and not facts.get("use_cpu")
    return resolved_launch_file(facts, asked.processes, machines, mixed_precision, has_gpu=has_gpu)


def launch(facts: dict[str, Any], run: Run, asked: Launch, arguments: Sequence[str]) -> int:
    """Start the workers, hand signals on to them, watch them, and wait.

    Args:
        facts: the resolved launch file.
        run: the run directory, which gets the workers' logs.
        asked: what the command line says.
        arguments: arguments of `peftkit` in each worker.

    Returns:
        The exit code: that of the worker that failed first (accelerate's launcher knows only 0 and 1), or the one of a
        process that a signal has ended before its workers heard it.

    Raises:
        JobError: a worker died or hung, or failed and could not say so at the terminal.
    """
    adopt_orphans()
    run.logs_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="peftkit-launch-") as folder:
        file = Path(folder) / "launch.yaml"
        parallel = check_parallelism(facts, facts["num_processes"])
        # accelerate (1.15) knows parallelism of GPUs alone; on CPUs, for tests, transformers and PEFT do without. Tokens are
        # shared out by `engine.context_parallel`, of which it needs to know nothing.
        is_told = parallel["tp_size"] > 1 and not facts["use_cpu"]
        written = {key: value for key, value in facts.items() if key != "parallelism_config" or is_told}
        file.write_text(yaml.safe_dump(written), encoding="utf-8")
        marks = {WORKER_MARK: "1", JOB_DIR: folder, OPTIONS: shlex.join(asked.options)}
        marks |= {DIVIDED_BY: str(parallel["tp_size"]), CP_SIZE: str(parallel["cp_size"])}
        environment = os.environ | marks | _interface(facts)
        command = launch_command(file, Path(folder) / OUTCOME_FILE, arguments)
        # A session of its own: Ctrl-C at the terminal reaches the workers once, through here.
        others = {process.pid for process in descendants()}
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        job = Job(process, Path(folder), run, asked.hang_timeout, others)
        with handled(job.hand_on):
            try:
                return job.wait()
            finally:
                job.kill()


def _interface(facts: dict[str, Any]) -> dict[str, str]:
    """Tell gloo the network interface between the machines, where the user has not."""
    if facts["num_machines"] == 1 or "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    name = interface_to(facts["main_process_ip"], facts["main_process_port"])
    return {"GLOO_SOCKET_IFNAME": name} if name else {}


def _has_gpu() -> bool:
    return os.environ.get("PEFTKIT_DEVICE") != "cpu" and (Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists())


def start_trial(arguments: Sequence[str], log_path: Path, slot: int, jobs: int) -> subprocess.Popen[bytes]:
    """Start `python -m ARGUMENTS` as one of several processes at once, which end (by SIGTERM) when this one dies.

    Each has a GPU of its own, or its share of the CPU's cores where OMP_NUM_THREADS says nothing.

    Args:
        arguments: a module and its arguments.
        log_path: what it prints is added there.
        slot: its place among those that run at once, from 0.
        jobs: how many run at once.
    """
    environment, own = dict(os.environ), os.getpid()
    if gpus := visible_gpus():
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot]
    elif jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))

    def end_with_this() -> None:
        end_with_parent()
        if os.getppid() != own:
            os._exit(1)  # it died before the kernel was told

    command = [sys.executable, "-m", *arguments]
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        # A session of its own: Ctrl-C at the terminal reaches it once, through here.
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=end_with_this if sys.platform == "linux" else None,  # noqa: PLW1509 - no thread runs here
        )  # fmt: skip


def visible_gpus() -> list[str]:
    """The CUDA GPUs that this process may use, as CUDA_VISIBLE_DEVICES calls them; found without torch."""
    if os.environ.get("PEFTKIT_DEVICE") == "cpu":
        return []
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    if stated is not None:
        return [name.strip() for name in stated.split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def require_room(jobs: int) -> None:
    """Refuse more trials at once than there are GPUs.

    Raises:
        RecipeError: there are fewer, but not none.
    """
    gpus = visible_gpus()
    if gpus and jobs > len(gpus):
        raise RecipeError(f"--jobs {jobs}: every trial has a GPU of its own, and there are {len(gpus)}; use {len(gpus)}")


def api_key_of_environment() -> str | None:
    """The key that clients of `peftkit serve` must know, where it is set; here since the environment is read here."""
    return os.environ.get("PEFTKIT_API_KEY")


def become(command: Sequence[str], variables: Mapping[str, str]) -> None:
    """Replace this process by another program, with further environment variables."""
    os.execvpe(command[0], list(command), os.environ | variables)
