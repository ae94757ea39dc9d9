"""Launch files of accelerate: what they say of sharing, what is wrong with them, and the file that is used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml

from peftkit.errors import RecipeError
from peftkit.machines import Machines
from peftkit.shipped import here_or_shipped

DISTRIBUTED_TYPES = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")

_NOT_OF_FSDP = {
    "fsdp_cpu_ram_efficient_loading": "true is not supported: every process reads the weights, to prove its shorter ways on "
    "them; use false",
    "fsdp_activation_checkpointing": "the recipe decides: `training.gradient_checkpointing: true`",
}


_KINDS = {"tp_size": ("MULTI_GPU",), "cp_size": ("MULTI_GPU", "MULTI_CPU", "FSDP")}  # distributed_type that each goes with
_NOT_PARALLEL = {
    "dp_replicate_size": "processes that share out rows are DDP's; leave it out",
    "dp_shard_size": "processes that share out weights are FSDP2's: `distributed_type: FSDP` (configs/fsdp2.yaml)",
    "sp_size": "DeepSpeed's way to share out the tokens of a row; ours is parallelism_config_cp_size",
}


@dataclass(frozen=True)
class Sharding:
    """How processes share what a run stores.

    Attributes:
        num_processes: how many there are.
        kind: `ddp`: each has everything; `fsdp`, `zero3`: weights, gradients and optimizer are shared out; `zero2`: gradients
            and optimizer; `zero1`: the optimizer; `tp`: each layer is divided, and all of them compute every row.
        offloads_optimizer: whether its state waits in the CPU's memory.
        offloads_weights: whether the weights do.
        cp_size: processes that share out the tokens of each row.
    """

    num_processes: int = 1
    kind: Literal["ddp", "fsdp", "zero1", "zero2", "zero3", "tp"] = "ddp"
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    cp_size: int = 1

    @property
    def counts(self) -> dict[str, Any]:
        """Among how many processes rows, layers and tokens are shared out, in the words of `peftkit.plan.Hardware`."""
        rows, layers = (1, self.num_processes) if self.kind == "tp" else (self.num_processes // self.cp_size, 1)
        return {"num_processes": rows, "divided_by": layers, "cp_size": self.cp_size}


def read_sharding(processes: int | None, config: Path | None) -> Sharding:
    """What an accelerate launch file says of sharing, for `--processes` and `--launch`.

    Raises:
        RecipeError: there is no such file, or it is no launch file; the number of processes is none.
    """
    check_launch(processes, config)
    facts = read_launch_file(config) if config is not None else {}
    count = processes or facts.get("num_processes") or 1
    parallel = check_parallelism(facts, count)
    if parallel["tp_size"] > 1:
        return Sharding(count, "tp")
    return dataclasses.replace(_stored_sharding(facts, count), cp_size=parallel["cp_size"])


def _stored_sharding(facts: Mapping[str, Any], count: int) -> Sharding:
    """How so many processes share what is stored."""
    if facts.get("distributed_type") == "FSDP":
        settings = facts.get("fsdp_config") or {}
        names = fsdp_names(str(settings.get("fsdp_version", 1)))
        whole = next((str(settings[name]) for name in names if name in settings), "true")
        return fsdp_sharding(count, whole, str(settings.get("fsdp_offload_params", False)))
    if facts.get("distributed_type") == "DEEPSPEED":
        settings = facts.get("deepspeed_config") or {}
        if file := settings.get("deepspeed_config_file"):
            return zero_of_file(count, file)
        away = [str(settings.get(f"offload_{what}_device") or "none") for what in ("optimizer", "param")]
        return zero_sharding(count, str(settings.get("zero_stage", 2)), *away)
    return Sharding(count)


def read_launch_file(path: Path) -> dict[str, Any]:
    """The keys and values of a launch file.

    Raises:
        RecipeError: it cannot be read, is none, or its number of processes is none.
    """
    path = here_or_shipped(path)
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


def fsdp_sharding(count: int, whole: str, offloads: str) -> Sharding:
    """Sharing by FSDP, of what a launch file or accelerate's environment says: is all of it shared out, is it offloaded."""
    kind: Any = "fsdp" if whole.upper() in ("TRUE", "FULL_SHARD", "HYBRID_SHARD", "1", "4") else "zero2"
    away = offloads.lower() == "true"
    return Sharding(count, "ddp" if whole.upper() in ("NO_SHARD", "3") else kind, away, away)


def zero_sharding(count: int, stage: str, optimizer: str, weights: str) -> Sharding:
    """Sharing by DeepSpeed: ZeRO's stage, and the devices that optimizer and weights are offloaded to."""
    kinds: dict[str, Any] = {"1": "zero1", "2": "zero2", "3": "zero3"}
    # weights are offloaded at stage 3 alone, the only one that shares them out
    return Sharding(count, kinds.get(stage, "ddp"), optimizer != "none", weights != "none" and stage == "3")


def zero_of_file(count: int, path: str) -> Sharding:
    """What a file of DeepSpeed's own says."""
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization") or {}
        away = [str((settings.get(f"offload_{what}") or {}).get("device") or "none") for what in ("optimizer", "param")]
        return zero_sharding(count, str(settings.get("stage", 0)), *away)
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"--launch: its deepspeed_config_file `{path}` cannot be read as DeepSpeed's JSON: {error}"
        ) from error


def fsdp_names(version: str) -> tuple[str, str]:
    """The keys that say whether weights are shared out too, the one that this version of FSDP reads first."""
    names = ("fsdp_reshard_after_forward", "fsdp_sharding_strategy")
    return names if version == "2" else (names[1], names[0])


def check_launch(processes: int | None, config: Path | None) -> None:
    """Refuse a launch file that does not exist, and a number of processes that is none.

    Raises:
        RecipeError: with what is wrong.
    """
    if config is not None and not here_or_shipped(config).is_file():
        raise RecipeError(f"--launch: there is no file `{config}`")
    if processes is not None and processes < 1:
        raise RecipeError(f"--processes: {processes} is not allowed; it takes a whole number above 0")


def resolved_launch_file(
    facts: Mapping[str, Any], processes: int | None, machines: Machines, mixed_precision: str, *, has_gpu: bool
) -> dict[str, Any]:
    """The launch file that is used: the user's, with what it leaves open or says in vain on this machine.

    Args:
        facts: the user's; empty where there is none.
        processes: of each machine; None leaves it to the launch file, whose `num_processes` counts all machines.
        machines: of the run.
        mixed_precision: what the recipe says.
        has_gpu: whether processes compute on GPUs.

    Raises:
        RecipeError: a key of it cannot be, or contradicts the recipe.
    """
    kind = str(facts.get("distributed_type", "MULTI_GPU")).upper()
    _check_kind(kind)
    _check_mixed_precision(facts.get("mixed_precision"), mixed_precision)
    count = _num_processes(facts, processes, machines)
    check_parallelism(facts, count)
    if kind in ("NO", "MULTI_CPU"):
        # Each of them starts one process, whatever its number is, and says nothing (accelerate 1.15).
        kind = "MULTI_GPU"
    return {
        "compute_environment": "LOCAL_MACHINE",
        "dynamo_backend": "NO",
        "same_network": True,  # torchrun's static rendezvous: the first machine's address and port are all that it needs
        **facts,
        "distributed_type": kind,
        "use_cpu": not has_gpu,
        "num_processes": count,
        "num_machines": machines.count,
        "machine_rank": machines.rank,
        "main_process_ip": machines.main_ip,
        "main_process_port": machines.main_port,
        "mixed_precision": "no",  # the recipe's is given to accelerate by the workers
    }


def with_fsdp_settled(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A launch file with what accelerate would take otherwise for FSDP where nothing is stated; others as they are.

    Raises:
        RecipeError: it asks for FSDP1, which flattens what it shares out and saves none of it by name (FSDP2 is in every torch
            that we take), or for what peftkit does itself.
    """
    if str(facts.get("distributed_type")).upper() != "FSDP":
        return dict(facts)
    stated = dict(facts.get("fsdp_config") or {})
    version = stated.get("fsdp_version", 1)
    if str(version) != "2":
        raise RecipeError(
            f"--launch: fsdp_config.fsdp_version: {version} is not supported; use 2, as configs/fsdp2.yaml does "
            "(`accelerate to-fsdp2` rewrites a file)"
        )
    for key, why in _NOT_OF_FSDP.items():
        if str(stated.get(key, "false")).lower() == "true":
            raise RecipeError(f"--launch: fsdp_config.{key}: {why}")
    usual = {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True}
    return {**facts, "fsdp_config": usual | stated | dict.fromkeys(_NOT_OF_FSDP, False)}


def check_parallelism(facts: Mapping[str, Any], count: int) -> dict[str, int]:
    """`tp_size`, the processes that divide each layer, and `cp_size`, those that share out the tokens of each row.

    Args:
        facts: the launch file.
        count: all processes.

    Raises:
        RecipeError: it asks for a kind that is not there, or for numbers or kinds that do not go together.
    """
    stated = {
        str(key).removeprefix("parallelism_config_"): value for key, value in (facts.get("parallelism_config") or {}).items()
    }
    for name, why in _NOT_PARALLEL.items():
        if str(stated.get(name, 1)) != "1":
            raise RecipeError(f"--launch: parallelism_config_{name}: {stated[name]} is not supported: {why}")
    sizes = {name: stated.get(name, 1) for name in _KINDS}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise RecipeError(f"--launch: parallelism_config_{name}: {size} is not allowed; it takes a whole number above 0")
        if size > 1 and str(facts.get("distributed_type", "MULTI_GPU")).upper() not in _KINDS[name]:
            raise RecipeError(f"--launch: parallelism_config_{name} needs distributed_type: {' or '.join(_KINDS[name])}")
    layers, tokens = sizes.values()
    if layers > 1 and tokens > 1:
        raise RecipeError("--launch: parallelism_config_tp_size and parallelism_config_cp_size do not go together: use one")
    if layers not in (1, count):
        raise RecipeError(
            f"--launch: parallelism_config_tp_size: {layers} is not num_processes, {count}, all of which divide each layer"
        )
    if count % tokens:
        raise RecipeError(
            f"--launch: parallelism_config_cp_size: {tokens} does not divide num_processes, {count}: so many share each row"
        )
    return sizes


def check_sharded(kind: str, *, has_gpu: bool) -> None:
    """Refuse FSDP without GPUs, which accelerate would turn into DDP in silence, and DeepSpeed that is not installed.

    Raises:
        RecipeError: it cannot run here.
    """
    if kind == "FSDP" and not has_gpu:
        raise RecipeError(
            "--launch: distributed_type FSDP: FSDP shares weights out over GPUs; this machine has none in use. "
            "Train with a launch file of type MULTI_GPU, or with --processes"
        )
    if kind == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise RecipeError(
            "--launch: distributed_type DEEPSPEED needs the package deepspeed: `pip install 'peftkit[deepspeed]'`"
        )


def _check_kind(kind: str) -> None:
    if kind not in DISTRIBUTED_TYPES:
        known = ", ".join(DISTRIBUTED_TYPES)
        raise RecipeError(f"--launch: distributed_type {kind} is not allowed; it takes one of {known}")


def _check_mixed_precision(of_file: Any, of_recipe: str) -> None:
    """YAML reads a bare `no` as false; `auto` in the recipe is decided later, and contradicts nothing."""
    stated = "no" if of_file in (None, False) else str(of_file)
    if stated != "no" and of_recipe not in ("auto", stated):
        raise RecipeError(
            f"--launch: mixed_precision {stated} contradicts training.mixed_precision: {of_recipe}; the recipe decides: "
            f"take it out of the launch file, or add `--set training.mixed_precision={stated}`"
        )


def _num_processes(facts: Mapping[str, Any], processes: int | None, machines: Machines) -> int:
    """Processes on all machines."""
    count = machines.count or 1
    if processes is not None:
        return processes * count
    stated, of_file = facts.get("num_processes") or 1, facts.get("num_machines") or 1
    total = stated if of_file == count else stated * count // of_file
    if total % count:
        raise RecipeError(
            f"--launch: num_processes: {stated} cannot be shared out evenly over {count} machines; it counts all of them"
        )
    return int(total)
