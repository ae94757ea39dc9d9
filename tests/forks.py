"""Python processes that start in milliseconds: forks of one that has imported the libraries.

A process that imports torch, transformers and peft computes for 6 s before it begins. `Forked` is a `subprocess.Popen` without
that: a process with a pid, environment, streams, signals and an exit code of its own; the Python processes that it starts are
forks too. It is no cold start: tests about imports, memory and start-up use `subprocess`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub

_EXECUTE = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_SIGNATURE = inspect.signature(_EXECUTE)
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_LIBRARIES = ("torch.distributed.run", "accelerate.commands.launch", "transformers", "peft", "datasets", "sklearn.metrics")
_WORK = ("peftkit.commands.train", "peftkit.engine.sharding", "transformers.models.llama.modeling_llama")


class Forked(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen([sys.executable, ...])` as a fork of a process that this one keeps for it."""

    def _execute_child(self, *arguments: Any) -> None:
        call = _SIGNATURE.bind(self, *arguments).arguments
        assert call["preexec_fn"] is None  # it cannot be sent
        start = _start_of(call)
        channel = _parent_of_forks(start["environment"].get("PYTHONPATH", ""))
        socket.send_fds(channel, [json.dumps(start).encode()], _streams(call))
        _created(self, int(channel.recv(100)), call)


def _start_of(call: dict[str, Any]) -> dict[str, Any]:
    """What the new process must be told: plain data."""
    environment = os.environ if call["env"] is None else call["env"]
    return {
        "arguments": [os.fspath(part) for part in call["args"]],
        "environment": dict(environment),
        "folder": os.fspath(call["cwd"] or os.getcwd()),
        "new_session": call["start_new_session"],
    }


def _streams(call: dict[str, Any]) -> list[int]:
    """The descriptors of stdin, stdout and stderr; -1 is this process's own."""
    return [own if call[name] < 0 else call[name] for own, name in enumerate(("p2cread", "c2pwrite", "errwrite"))]


def _created(process: Any, pid: int, call: dict[str, Any]) -> None:
    """Do what `Popen` does when its child is there."""
    process.pid, process._child_created = pid, True
    process._close_pipe_fds(*(call[name] for name in _PIPES))


@functools.cache
def _parent_of_forks(search_path: str) -> socket.socket:
    """A socket to the process that forks, with these folders as PYTHONPATH; that process ends with this one."""
    from peftkit.worker import adopt_orphans

    adopt_orphans()  # the processes below, whose first parent ends at once
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.forks", str(there.fileno())]
    environment = os.environ | {"PYTHONPATH": search_path}
    options: dict[str, Any] = {"cwd": Path(__file__).parents[1], "stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    subprocess.Popen(command, pass_fds=[there.fileno()], env=environment, **options)
    there.close()
    return here


def _serve(channel: socket.socket) -> None:
    """Fork for every start that is asked for; answer with the pid."""
    for name in (*_LIBRARIES, *_WORK):
        __import__(name)
    assert threading.active_count() == 1  # threads do not survive a fork
    subprocess.Popen._execute_child = _execute_child  # type: ignore[attr-defined]
    os.fsync = lambda file: None  # as in the tests' own process, see conftest.py
    while True:
        message, streams, *_ = socket.recv_fds(channel, 2**20, 3)
        if not message:
            os._exit(0)  # freeing what was imported would take seconds
        pid = _fork_orphan(json.loads(message), streams)
        for stream in streams:
            os.close(stream)
        channel.send(str(pid).encode())


def _fork_orphan(start: dict[str, Any], streams: list[int]) -> int:
    """Start a process whose parent becomes the one that asked for it, see `adopt_orphans`."""
    reader, writer = os.pipe()
    if not (between := os.fork()):
        if pid := os.fork():
            os.write(writer, str(pid).encode())
            os._exit(0)
        _become(start, streams)
    os.waitpid(between, 0)
    pid = int(os.read(reader, 100))
    os.close(reader)
    os.close(writer)
    return pid


def _execute_child(process: Any, *arguments: Any) -> None:
    """What replaces the method of `Popen` in forks: Python is forked again, all else is executed."""
    call = _SIGNATURE.bind(process, *arguments).arguments
    if isinstance(call["args"], str) or call["args"][0] != sys.executable:
        _EXECUTE(process, *arguments)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        for name in [name for name in sys.modules if name.partition(".")[0] == "peftkit"]:
            del sys.modules[name]  # which may have a state here
        _become(_start_of(call), _streams(call), call["preexec_fn"])
    _created(process, pid, call)


def _become(start: dict[str, Any], streams: list[int], before: Callable[[], None] | None = None) -> None:
    """Turn this fork into the process that was asked for; it does not return."""
    code = 1
    try:
        if start["new_session"]:
            os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        if before is not None:
            before()
        os.closerange(3, 4096)
        _forget_parent()
        os.chdir(start["folder"])
        assert start["environment"].get("PYTHONPATH", "") == os.environ.get("PYTHONPATH", "")
        os.environ.clear()
        os.environ.update(start["environment"])
        huggingface_hub.constants.HF_HOME = os.environ["HF_HOME"]  # read when it was imported; tests change it
        sys.path[0] = start["folder"]
        code = _exit_code(start["arguments"][1:])
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


def _forget_parent() -> None:
    """Drop what executing a program would: handlers of signals and of the end."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    atexit._clear()


def _exit_code(arguments: list[str]) -> int:
    """Run `-m MODULE`, `-c PROGRAM` or a file with its arguments, as `python` would."""
    if arguments[0] == "-u":
        arguments = arguments[1:]
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(arguments[1], {"__name__": "__main__"})
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
