"""One process writes to a run directory at a time.

`.run.lock` is locked by the operating system, which lets go of it when the process ends, however that ends; such locks do not
reach every file system and other hosts, so `run.lock` says who holds it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from filelock import FileLock, Timeout

from peftkit.errors import RecipeError
from peftkit.run import Run, write_json

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SAME_START_SECONDS = 2.0  # psutil reckons from the time of boot, which moves when the clock is set


@contextlib.contextmanager
def lock(run: Run, note: Callable[[str], None], *, force: bool) -> Iterator[None]:
    """Hold a run directory as long as the block runs.

    Args:
        run: the run.
        note: told of a lock that a process left which has ended, and of one that is broken.
        force: break the lock of another host, whose processes cannot be seen from here.

    Raises:
        RecipeError: another process holds it, with its host and number.
    """
    guard = FileLock(run.dir / ".run.lock", blocking=False)
    try:
        guard.acquire()
    except Timeout as error:
        raise RecipeError(_taken(run, _read(run.lock_path))) from error
    try:
        _replace(run, _read(run.lock_path), note, force)
        yield
    finally:
        if _is_own(_read(run.lock_path)):
            run.lock_path.unlink(missing_ok=True)
        guard.release()


def live_holder(run: Run) -> str:
    """Who writes to a run now, as far as that can be told from here; empty where nobody does."""
    try:
        holder = _read(run.lock_path)
    except OSError:
        return ""
    if not holder:
        return ""
    own, who = _facts(), f"process {holder.get('pid')}"
    if holder.get("host") != own["host"]:
        return f"{who} on {holder.get('host')}, which cannot be seen from here"
    return who if _is_running(holder, own) else ""


def _replace(run: Run, holder: dict[str, Any], note: Callable[[str], None], force: bool) -> None:
    own = _facts()
    if holder and not _is_own(holder):
        who = f"process {holder.get('pid')} on {holder.get('host')}"
        if holder.get("host") == own["host"]:
            if _is_running(holder, own):
                raise RecipeError(_taken(run, holder))
            note(f"note: {run.lock_path} was left by {who}, which has ended")
        elif force:
            note(f"note: --force: the lock of {who} is broken")
        else:
            what = f"{_taken(run, holder)}, another host, whose processes cannot be seen from here"
            raise RecipeError(f"{what}. Once it has surely ended, `--resume --force` breaks its lock")
    write_json(run.lock_path, own)


def _taken(run: Run, holder: dict[str, Any]) -> str:
    who = f"process {holder['pid']} on {holder['host']}" if "pid" in holder and "host" in holder else "another process"
    return f"{run.dir} is in use by {who}"


def _read(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_own(holder: dict[str, Any]) -> bool:
    return holder == _facts()


def _facts() -> dict[str, Any]:
    process = psutil.Process()
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else str(int(psutil.boot_time()))
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": process.create_time(), "boot_id": boot}


def _is_running(holder: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether the holder, on this host, runs still: another process may have got its number since."""
    if holder.get("boot_id") != own["boot_id"]:
        return False
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, KeyError, TypeError, ValueError):
        started = psutil.Process(int(holder["pid"])).create_time()
        return abs(float(started) - float(holder["started"])) < _SAME_START_SECONDS
    return False
