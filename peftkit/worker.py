"""What a launched worker does for the launcher that watches it: signs of life, a log of its own, an end with its parent."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

SECONDS_BETWEEN_SIGNS = 1.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # man 2 prctl


@dataclass
class _Progress:
    """How far this process is: a number that grows, and words."""

    count: int = 0
    where: str = "starting"


_PROGRESS = _Progress()


def beat(where: str) -> None:
    """Say that this process has got on, and to where; it costs two assignments."""
    _PROGRESS.count += 1
    _PROGRESS.where = where


def sign_path(job_dir: Path, rank: int) -> Path:
    """The file with a rank's last sign of life."""
    return job_dir / f"rank-{rank}.json"


def exit_path(job_dir: Path, rank: int) -> Path:
    """The file where a rank says why it ends."""
    return job_dir / f"exit-{rank}.json"


def begin(job_dir: Path, rank: int, log_path: Path, *, keeps_terminal: bool) -> None:
    """Make this process one that its launcher can watch.

    SIGTERM comes when its parent dies; SIGUSR2 writes the stack of every thread to the log; a thread gives signs of life.

    Args:
        job_dir: folder that launcher and workers share on this machine.
        rank: of this process.
        log_path: where its output goes, and its stack when it crashes.
        keeps_terminal: whether it goes on writing to the terminal.
    """
    end_with_parent()
    log = log_path.open("a", encoding="utf-8")
    if not keeps_terminal:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.enable(file=log)
    faulthandler.register(signal.SIGUSR2, file=log)
    arguments = (sign_path(job_dir, rank), threading.get_ident())
    threading.Thread(target=_give_signs, args=arguments, name="signs of life", daemon=True).start()


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the kernel send a signal to this process when the one that started it dies (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Become the parent of processes whose own parent, a descendant of this one, dies: they can be found then (Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _give_signs(path: Path, main_thread: int) -> None:
    """Write a sign whenever the main thread has got on: it has beaten, or is at another place of the code.

    Places show the progress of libraries that know nothing of beats, such as loading a model; beats show that of a loop whose
    time goes into one call. A thread that waits for other processes does neither.
    """
    seen: object = None
    while path.parent.is_dir():
        frame = sys._current_frames().get(main_thread)
        now = (_PROGRESS.count, _place(frame))
        if now != seen:
            seen = now
            sign = {"pid": os.getpid(), "count": _PROGRESS.count, "where": _PROGRESS.where} | _innermost(frame)
            temporary = path.with_suffix(".new")
            try:
                temporary.write_text(json.dumps(sign), encoding="utf-8")
                temporary.replace(path)
            except OSError:
                return  # the launcher is gone, and its folder with it
        del frame  # what its locals hold must not live on here
        time.sleep(SECONDS_BETWEEN_SIGNS)


def _place(frame: FrameType | None) -> list[tuple[int, int]]:
    """Where each function of a stack is; not the frames themselves, which would keep their tensors."""
    place = []
    while frame is not None:
        place.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return place


def _innermost(frame: FrameType | None) -> dict[str, Any]:
    """The function that runs, in words, and whether it is torch's, where processes wait for each other."""
    if frame is None:
        return {"at": "", "in_torch": False}
    file = Path(frame.f_code.co_filename)
    return {"at": f"{frame.f_code.co_name} ({file.name}:{frame.f_lineno})", "in_torch": "torch" in file.parts}


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process of the job is gone: gloo's words, or an error of torch's own."""
    words = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL")
    return type(error).__name__.startswith("Dist") or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
