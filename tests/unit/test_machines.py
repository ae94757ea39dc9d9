"""Which machine this is, and what becomes of a launch file."""

from __future__ import annotations

import subprocess
from typing import Any

import psutil
import pytest

from peftkit import launch_file
from peftkit.errors import RecipeError
from peftkit.launch_file import check_sharded, resolved_launch_file
from peftkit.machines import Machines, find_machines, first_host, interface_to

TWO = {"num_machines": 2, "machine_rank": 0, "main_process_ip": "10.0.0.1", "main_process_port": 29500, "num_processes": 8}
ONE = Machines(1, 0, "127.0.0.1", 0)
SLURM = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "70123"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        (SLURM | {"SLURM_JOB_NODELIST": "gpu[07-08]"}, Machines(2, 1, "gpu07", 20123)),
        (
            {"PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_MASTER_ADDR": "job-node-0-0.job", "PET_MASTER_PORT": "29400"},
            Machines(4, 3, "job-node-0-0.job", 29400),
        ),
        (
            {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.1.0.4\n10.1.0.5"},
            Machines(2, 0, "10.1.0.4", 29500),
        ),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}, Machines(2, 1, "a", 29500)),
        ({"SLURM_NNODES": "2", "SLURM_NODEID": "0"}, ONE),  # the batch script itself, which runs on one machine
        ({"PET_NNODES": "1", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "29400"}, ONE),
        ({}, ONE),
    ],
)
def test_the_scheduler_says_which_machine_this_is(environment: dict[str, str], found: Machines) -> None:
    assert find_machines(Machines(), {}, environment) == found


def test_options_come_before_the_scheduler_and_the_scheduler_before_the_file() -> None:
    environment = {"NNODES": "2", "NODE_RANK": "1"}
    assert find_machines(Machines(main_port=1234), TWO, environment) == Machines(2, 1, "10.0.0.1", 1234)
    assert find_machines(Machines(3, 2), TWO, environment) == Machines(3, 2, "10.0.0.1", 29500)
    assert find_machines(Machines(1), TWO, environment) == ONE


@pytest.mark.parametrize(
    ("stated", "environment", "words"),
    [
        (Machines(2, 2, "a"), {}, "--machine-rank: 2 is not allowed with 2 machines"),
        (Machines(2, None, "a"), {}, "--machine-rank: None is not allowed"),
        (Machines(2, 0), {}, "--main-process-ip: is missing"),
        (Machines(2, 0, "a", 0), {}, "--main-process-port: 0 is not allowed; several machines need the same port"),
        (Machines(rank=1), {}, "--machine-rank 1: has no effect on one machine"),
        (Machines(), {"NNODES": "1:4"}, "the environment variable NNODES is `1:4`; a whole number"),
        (Machines(), SLURM | {"SLURM_STEP_NUM_TASKS": "8"}, "srun has started 8 tasks on 2 machine.*--ntasks-per-node=1"),
    ],
)
def test_machines_that_cannot_be_are_refused(stated: Machines, environment: dict[str, str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        find_machines(stated, {}, environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[01-04,7],cpu1", "gpu01"),
        ("gpu[3,5]", "gpu3"),
        ("node-a,node-b", "node-a"),
        ("rack[2-3]-n", "rack2-n"),
        ("one", "one"),
        ("", None),
    ],
)
def test_the_first_host_of_a_slurm_list_is_found_without_scontrol(
    monkeypatch: pytest.MonkeyPatch, nodes: str, first: str | None
) -> None:
    def missing(*arguments: Any, **options: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert first_host(nodes) == first


def test_the_interface_to_a_machine_is_the_one_of_its_route() -> None:
    assert interface_to("127.0.0.1", 29500) in psutil.net_if_addrs()
    assert interface_to("no such host", 29500) is None


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU", "multi_gpu"])
def test_types_that_start_one_process_in_silence_are_rewritten(kind: str) -> None:
    facts = resolved_launch_file({"distributed_type": kind, "main_process_port": 29500}, 4, ONE, "auto", has_gpu=False)
    assert (facts["distributed_type"], facts["use_cpu"], facts["num_processes"]) == ("MULTI_GPU", True, 4)
    assert facts["main_process_port"] == 0


def test_other_keys_of_a_launch_file_are_kept() -> None:
    given = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}, "num_processes": 2, "gpu_ids": "0,1"}
    facts = resolved_launch_file(given, None, ONE, "bf16", has_gpu=True)
    assert (facts["fsdp_config"], facts["gpu_ids"], facts["num_processes"], facts["use_cpu"]) == (
        {"fsdp_version": 2}, "0,1", 2, False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("processes", "given", "total"),
    [(4, {}, 8), (None, TWO, 8), (None, {"num_processes": 4}, 8), (None, {}, 2)],
    ids=["per machine", "the file's total", "a file for one machine", "one each"],
)
def test_processes_are_counted_over_all_machines(processes: int | None, given: dict[str, Any], total: int) -> None:
    facts = resolved_launch_file(given, processes, Machines(2, 1, "10.0.0.1", 29500), "auto", has_gpu=False)
    assert (facts["num_processes"], facts["machine_rank"], facts["num_machines"]) == (total, 1, 2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"distributed_type": "MEGATRON_LM"}, "distributed_type MEGATRON_LM is not allowed; it takes one of NO, MULTI_CPU"),
        ({"mixed_precision": "bf16"}, "mixed_precision bf16 contradicts training.mixed_precision: no; the recipe decides"),
        ({"num_machines": 2, "num_processes": 5}, "num_processes: 5 cannot be shared out evenly over 2 machines"),
    ],
)
def test_what_a_launch_file_cannot_say_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        resolved_launch_file(given, None, Machines(2, 0, "a", 29500), "no", has_gpu=False)


@pytest.mark.parametrize(("of_file", "of_recipe"), [(False, "fp16"), ("no", "bf16"), ("bf16", "auto"), ("bf16", "bf16")])
def test_the_recipe_decides_the_precision(of_file: Any, of_recipe: str) -> None:
    assert resolved_launch_file({"mixed_precision": of_file}, 2, ONE, of_recipe, has_gpu=True)["mixed_precision"] == "no"


def test_sharding_that_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="FSDP shares weights out over GPUs; this machine has none in use"):
        check_sharded("FSDP", has_gpu=False)
    check_sharded("FSDP", has_gpu=True)
    monkeypatch.setattr(launch_file, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"needs the package deepspeed: `pip install 'peftkit\[deepspeed\]'`"):
        check_sharded("DEEPSPEED", has_gpu=True)
