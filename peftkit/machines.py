"""Several machines: which one this is, and where the first one listens, from options, a scheduler or a launch file."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]

from peftkit.errors import RecipeError

DEFAULT_PORT = 29500
# How schedulers name the number of machines, the rank of this one, the address and the port of the first.
_VARIABLES = {
    "Kubeflow": ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"),
    "SkyPilot": ("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS", ""),
    "environment": ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
}


@dataclass(frozen=True)
class Machines:
    """The machines of a run. Each field is None where nothing says it.

    Attributes:
        count: how many there are.
        rank: which one this is, from 0.
        main_ip: name or address of the first.
        main_port: where it listens; 0: a free port, on a single machine.
    """

    count: int | None = None
    rank: int | None = None
    main_ip: str | None = None
    main_port: int | None = None

    def or_else(self, other: Machines) -> Machines:
        """What this says, and for the rest what the other says."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Machines(*(mine if mine is not None else theirs for mine, theirs in pairs))


def find_machines(stated: Machines, facts: Mapping[str, Any], environment: Mapping[str, str]) -> Machines:
    """The machines of a run: options come first, then the scheduler's environment, then the launch file.

    Args:
        stated: the options.
        facts: the launch file.
        environment: of this process.

    Raises:
        RecipeError: something is missing or cannot be.
    """
    keys = ("num_machines", "machine_rank", "main_process_ip", "main_process_port")
    of_file = Machines(*(facts.get(key) for key in keys))
    found = stated if stated.count == 1 else stated.or_else(scheduled_machines(environment))
    found = found.or_else(of_file)
    if (found.count or 1) == 1:
        _refuse_options_of_several(stated)
        return Machines(1, 0, "127.0.0.1", stated.main_port or 0)  # a fixed port would let jobs on one machine collide
    return _checked(found.or_else(Machines(main_port=DEFAULT_PORT)))


def _refuse_options_of_several(stated: Machines) -> None:
    for value, option in ((stated.rank, "--machine-rank"), (stated.main_ip, "--main-process-ip")):
        if value is not None:
            raise RecipeError(f"{option} {value}: has no effect on one machine; add `--num-machines`, or leave it out")


def _checked(machines: Machines) -> Machines:
    count, rank, main_ip, port = astuple(machines)
    if not isinstance(count, int) or count < 1:
        raise RecipeError(f"--num-machines: {count} is not allowed; it takes a whole number above 0")
    if not isinstance(rank, int) or not 0 <= rank < count:
        raise RecipeError(
            f"--machine-rank: {rank} is not allowed with {count} machines; each has its own, from 0 to {count - 1}"
        )
    if not main_ip:
        raise RecipeError("--main-process-ip: is missing; with several machines it is the address of the one with rank 0")
    if not isinstance(port, int) or not 0 < port < 2**16:
        raise RecipeError(f"--main-process-port: {port} is not allowed; several machines need the same port, 1 to 65535")
    return machines


def scheduled_machines(environment: Mapping[str, str]) -> Machines:
    """What a scheduler says: Slurm in a step of `srun`, Kubeflow Trainer, SkyPilot, or NNODES and its companions."""
    if "SLURM_STEP_NUM_NODES" in environment:  # a batch script is no step: it runs on the first machine alone
        return _slurm_machines(environment)
    for count, rank, address, port in _VARIABLES.values():
        if count in environment:
            return Machines(
                _number(environment, count),
                _number(environment, rank),
                (environment.get(address) or "").splitlines()[0] if environment.get(address) else None,
                _number(environment, port) if port in environment else None,
            )
    return Machines()


def _slurm_machines(environment: Mapping[str, str]) -> Machines:
    count, tasks = _number(environment, "SLURM_STEP_NUM_NODES"), _number(environment, "SLURM_STEP_NUM_TASKS")
    if count is not None and tasks is not None and tasks > count:
        raise RecipeError(f"srun has started {tasks} tasks on {count} machine(s); start one a machine: `--ntasks-per-node=1`")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    job = _number(environment, "SLURM_JOB_ID") or 0
    # Two jobs that share a machine must not share a port.
    return Machines(count, _number(environment, "SLURM_NODEID"), first_host(nodes), 20000 + job % 10000)


def first_host(nodes: str) -> str | None:
    """The first host of Slurm's list, such as `gpu01` for `gpu[01-04,7],cpu1`: as scontrol says, else read here."""
    if not nodes:
        return None
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        head = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
        return "".join(part or "" for part in head.groups()) if head else None


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise RecipeError(f"the environment variable {name} is `{text}`; a whole number belongs there")
    return int(text)


def interface_to(address: str, port: int) -> str | None:
    """The network interface that leads to a machine, such as `eth0`; None where it is not known.

    Gloo takes the interface of the host's own name unless told, which is often the loopback: other machines wait for ever.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, port))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    names = (name for name, addresses in psutil.net_if_addrs().items() if own in {entry.address for entry in addresses})
    return next(names, None)
