"""How much memory a process of a run may take, and whether a plan fits into it."""

from __future__ import annotations

import psutil  # type: ignore[import-untyped]

from peftkit.cgroups import control_groups
from peftkit.engine.fit import CONTEXT_BYTES, HOLES
from peftkit.engine.hardware import local_processes
from peftkit.plan import Hardware

# Of memory that is no GPU's: predictions for the CPU are within a tenth or so of what is measured (docs/memory.md).
_SAFE_SHARE = 0.9


def memory_of_process(hardware: Hardware) -> int:
    """Bytes that one process may hold: its GPU's; or its share of the machine's or container's, and no more than its limit."""
    if hardware.device == "cuda":
        return hardware.memory_bytes
    shared = min([hardware.memory_bytes, *_of_cgroup()])
    return min([shared // local_processes(hardware.num_processes), *_of_address_space()])


def usable_bytes(hardware: Hardware) -> int:
    """What the total of a memory plan may come to on this hardware."""
    memory = memory_of_process(hardware)
    if hardware.device == "cuda":
        return round((memory - CONTEXT_BYTES) / HOLES)
    return round(memory * _SAFE_SHARE)


def _of_cgroup() -> list[int]:
    """The limits of the control groups around this process (`memory.max`)."""
    try:
        paths = [folder / "memory.max" for folder in control_groups()]
        texts = [path.read_text().strip() for path in paths if path.is_file()]
    except OSError:
        return []
    return [int(text) for text in texts if text.isdigit()]


def _of_address_space() -> list[int]:
    """What `ulimit -v` leaves: it counts addresses, of which libraries take more than is ever resident."""
    try:
        import resource
    except ImportError:  # Windows
        return []
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return []
    info = psutil.Process().memory_info()
    return [max(0, limit - (info.vms - info.rss))]
