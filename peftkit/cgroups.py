"""The control groups that this process is in (Linux, version 2): what limits its memory, and what was ended there."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def control_groups() -> list[Path]:
    """Their folders, the innermost first, up to the root; none where they are not known."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    if own is None:
        return []
    folder = ROOT / own.lstrip("/")
    return [part for part in (folder, *folder.parents) if part.is_relative_to(ROOT)]
