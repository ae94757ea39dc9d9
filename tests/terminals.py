"""`peftkit` at a pseudo-terminal, as a person types."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_SECONDS = 30.0
PROMPTS = ("]: ", "none yet): ")  # how questions end
CTRL_C, CTRL_D = "\x03", "\x04"


def talk(folder: Path, arguments: Sequence[Any], answers: Sequence[str]) -> tuple[int, str]:
    """Call `peftkit ARGUMENTS` in a folder and give an answer to each of its questions; the exit code and what was shown.

    An answer is followed by Enter, unless it is a control character.
    """
    with _started(folder, [str(argument) for argument in arguments]) as (terminal, process):
        shown, asked, answer = "", iter(answers), None
        while piece := _read(terminal, is_interrupted=answer == CTRL_C):
            shown += piece
            if shown.endswith(PROMPTS) and (answer := next(asked, None)) is not None:
                time.sleep(0.1)  # a Ctrl-C that comes before readline waits is seen by it at the next key only
                os.write(terminal, (answer if answer in (CTRL_C, CTRL_D) else f"{answer}\n").encode())
        assert next(asked, None) is None, f"fewer questions than answers:\n{shown}"
        return process.wait(_SECONDS), shown.replace("\r\n", "\n")


@contextlib.contextmanager
def _started(folder: Path, arguments: list[str]) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    own, theirs = pty.openpty()
    # Ctrl-C is sent to the processes of which this is the controlling terminal, which `login_tty` makes it.
    login = f"os.login_tty({theirs}); signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's jobs ignore it
    code = f"import os, runpy, signal; {login}; runpy.run_module('peftkit', run_name='__main__', alter_sys=True)"
    environment = os.environ | {"COLUMNS": "200", "TERM": "dumb"}
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=folder, pass_fds=[theirs], env=environment)
    os.close(theirs)
    try:
        yield own, process
    finally:
        process.kill()
        process.wait()
        os.close(own)


def _read(terminal: int, *, is_interrupted: bool) -> str:
    """What is written next; empty where the process has ended. A Ctrl-C without an effect is given again, as a person does."""
    end = time.monotonic() + _SECONDS
    while not select.select([terminal], [], [], 1.0)[0]:
        assert time.monotonic() < end, "nothing was written for half a minute"
        if is_interrupted:
            os.write(terminal, CTRL_C.encode())
    try:
        return os.read(terminal, 2**16).decode(errors="replace")
    except OSError:  # Linux says so when the other end is closed
        return ""
