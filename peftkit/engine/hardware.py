"""What this machine is, as plain facts; the only place beside `launch` that reads environment variables."""

from __future__ import annotations

import os
import platform
import sys
from datetime import timedelta
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ParallelismConfig,
)
from accelerate.state import AcceleratorState, DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy

from peftkit.launch import FSDP_ON_CPU, cp_size, divided_by, is_worker, started_with
from peftkit.plan import Hardware, Plan
from peftkit.run import Run

# Ways to train where each process has a model and an optimizer of its own: alone, and by DDP.
WHOLE_MODELS = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def detect_hardware() -> Hardware:
    """Facts about the device that this process trains on; PEFTKIT_DEVICE=cpu hides a GPU."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1")) // (divided_by() * cp_size())
    index = _cuda_index()
    if index is not None:
        facts = torch.cuda.get_device_properties(index)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware("cuda", facts.name, native, facts.total_memory, num_processes, divided_by(), cp_size())
    memory = psutil.virtual_memory().total
    if torch.backends.mps.is_available() and not _is_forced_to_cpu():
        return Hardware("mps", "Apple GPU", True, memory, num_processes)
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() or platform.machine() == "arm64"
    return Hardware("cpu", "the CPU", bool(native), memory, num_processes, divided_by(), cp_size())


def _is_forced_to_cpu() -> bool:
    return os.environ.get("PEFTKIT_DEVICE") == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


def _cuda_index() -> int | None:
    """The GPU of this process; None where it has none."""
    return int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() and not _is_forced_to_cpu() else None


def quantizing_device() -> torch.device:
    """Where weights are quantised while they are loaded: on this process's GPU, or else on the CPU."""
    index = _cuda_index()
    return torch.device("cpu") if index is None else torch.device("cuda", index)


def process_device() -> torch.device:
    """Where this process computes; PEFTKIT_DEVICE=cpu hides a GPU."""
    device: torch.device = Accelerator(cpu=_is_forced_to_cpu()).device
    return device


def _fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """How the launch file shares weights out by FSDP2; None where it does not.

    Every tensor keeps its dtype and gradients are summed in float32: autocast does what `mixed_precision` asks for.
    """
    if not started_with("FSDP"):
        return None
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))


def start_accelerator(plan: Plan, run: Run) -> Accelerator:
    """Devices, processes, autocast and trackers of a run."""
    trackers = plan.recipe.output.report_to
    # The precision of a process's first Accelerator would hold for all later ones (accelerate 1.15).
    AcceleratorState._reset_state()
    unused = plan.method.skips_parameters(plan.recipe.adapter)
    parallel = ParallelismConfig(tp_size=divided_by()) if divided_by() > 1 else None
    plugin, zero = _fsdp_plugin(), started_with("DEEPSPEED")
    # Others wait while rank 0 certifies; a launched job that hangs is ended by its launcher, long before this.
    waiting = [InitProcessGroupKwargs(timeout=timedelta(days=1))] if is_worker() else []
    accelerator = Accelerator(
        # A process without rows to evaluate makes no forward pass, and would leave others waiting to share buffers.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused, broadcast_buffers=False), *waiting],
        mixed_precision="no" if zero else plan.mixed_precision,  # DeepSpeed's own would round what is trained
        cpu=plan.hardware.device == "cpu",
        parallelism_config=None if plan.hardware.device == "cpu" else parallel,  # CPUs are refused one, and need none
        fsdp_plugin=None if plan.hardware.device == "cpu" else plugin,
        log_with=list(trackers) or None,
        project_dir=str(run.dir),
    )
    if plugin is not None and os.environ.get(FSDP_ON_CPU) == "1":
        # accelerate (1.15) takes FSDP on a CPU for DDP, though FSDP2 works there: so that it can be tested without GPUs
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    if trackers:
        accelerator.init_trackers(
            plan.recipe.name or "peftkit", config={"recipe": run.resolved_path.read_text(encoding="utf-8")}
        )
    return accelerator


def autocast(device: str, mixed_precision: str) -> torch.autocast:
    """Autocast as accelerate does it in training; nothing for `no`."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


def process_index() -> int:
    """Rank of this process among all."""
    return int(os.environ.get("RANK", "0"))


def local_processes(num_processes: int) -> int:
    """Processes on this machine, of so many."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(num_processes)))


def resident_bytes() -> int:
    """What this process holds in the machine's memory now: libraries, tokenizer, indices of the rows."""
    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes(device: str) -> int:
    """Most memory that this process has held so far: on the GPU, or resident on the CPU.

    Linux tells it in /proc (`man 5 proc`, VmHWM): its `ru_maxrss` begins with what the process that started this one held.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
